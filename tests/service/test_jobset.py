"""Jobs of the service as JobSets: their manifests, and a stub of the API that they are sent to."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxft import cli
from jaxft.errors import ConfigError
from jaxft.service.executors import ExecutorError, Launch, State, listing
from jaxft.service.executors import kubernetes as credentials
from jaxft.service.executors.jobset import JobSets
from tests.service.stub_kubernetes import JOBSET, StubKubernetes, strange
from tests.test_launch import ROOT

MANIFEST, SERVICE = ROOT / "launch/jobset.yaml", ROOT / "launch/service.yaml"
GIVEN = [f"manifest={MANIFEST}", "image=registry/jaxft:1"]
LAUNCH = Launch(
    job="ftjob-AbCdEfGhIjKlMnOpQrStUvWx",
    attempt=2,
    config=Path("/shared/service/jobs/a/config.json"),
    log=Path("/shared/service/jobs/a/log.txt"),
)
NAME = "ftjob-abcdefghijklmnopqrstuvwx-2"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubKubernetes]:
    monkeypatch.setattr(listing, "AGE", 0)
    with StubKubernetes({"secret": "edit", "weak": "view"}) as api:
        yield api


def kubeconfig(folder: Path, server: str, user: dict[str, Any], **cluster: Any) -> str:
    """Writes the file that names a cluster; returns its path as the executor's option."""
    content = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "ml"}}],
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "other", "user": {}}, {"name": "u", "user": user}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(content))
    return f"kubeconfig={folder / 'kubeconfig'}"


def test_a_launch_is_one_jobset_from_its_creation_to_its_end(api, tmp_path):
    jobsets = JobSets.from_options([*GIVEN, kubeconfig(tmp_path, api.url, {"token": "secret"})])
    assert jobsets.find(LAUNCH) is None
    assert jobsets.submit(LAUNCH) == NAME == jobsets.find(LAUNCH)
    assert jobsets.submit(LAUNCH) == NAME and len(api.objects) == 1  # 409 is the launch itself
    assert jobsets.find(replace(LAUNCH, attempt=1)) is None
    ((namespace, _),) = api.objects
    assert namespace == "ml"  # of the context

    assert jobsets.state(NAME) is State.WAITING  # without a status
    group = {"name": "slice", "ready": 1, "active": 2, "succeeded": 0, "failed": 0, "suspended": 0}
    queued = [{"type": "Suspended", "status": "True"}]
    api.report(NAME, conditions=queued, replicatedJobsStatus=[group | {"ready": 2}])
    assert jobsets.state(NAME) is State.WAITING
    api.report(NAME, conditions=[{"type": "Suspended", "status": "False"}])
    assert jobsets.state(NAME) is State.WAITING
    api.report(NAME, replicatedJobsStatus=[group])  # the second slice waits for its nodes
    assert jobsets.state(NAME) is State.WAITING
    api.report(NAME, replicatedJobsStatus=[group | {"ready": 2}])
    assert jobsets.state(NAME) is State.RUNNING
    for end in ("Completed", "Failed"):
        api.report(NAME, conditions=[{"type": end, "status": "True"}], terminalState=end)
        assert jobsets.state(NAME) is State.ENDED

    api.report(NAME, replicatedJobsStatus=[group | {"ready": 2}])
    jobsets.stop(NAME)
    api.report(NAME, replicatedJobsStatus=[group])
    assert jobsets.state(NAME) is State.RUNNING  # its pods are saving
    jobsets.stop(NAME)
    api.end_pods(NAME)
    assert jobsets.state(NAME) is State.ENDED and jobsets.find(LAUNCH) is None
    jobsets.stop(NAME)

    # Ids that differ by case alone are no one job.
    jobsets.submit(replace(LAUNCH, job=LAUNCH.job.lower()))
    with pytest.raises(ExecutorError, match=f"Another JobSet is called {NAME}"):
        jobsets.submit(LAUNCH)


def test_what_the_api_refuses_is_said(api, tmp_path):
    def connect(token: str, *options: str) -> JobSets:
        return JobSets.from_options(
            [*GIVEN, kubeconfig(tmp_path, api.url, {"token": token}), *options]
        )

    with pytest.raises(ExecutorError, match="answers 401: Unauthorized The credentials are not"):
        connect("wrong").state(NAME)
    with pytest.raises(ExecutorError, match=r"403: .*cannot create.* Give the account"):
        connect("weak").submit(LAUNCH)
    manifest = yaml.safe_load(MANIFEST.read_text())
    manifest["spec"]["replicatedJobs"][0]["replica"] = 2
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(manifest))
    odd = connect("secret", f"manifest={tmp_path / 'odd.yaml'}")
    with pytest.raises(ExecutorError, match=r'unknown field "spec.replicatedJobs\[0\].replica"'):
        odd.submit(LAUNCH)
    gone = kubeconfig(tmp_path, "http://127.0.0.1:9", {"token": "secret"})
    with pytest.raises(ExecutorError, match=r"at http://127.0.0.1:9 does not answer"):
        JobSets.from_options([*GIVEN, gone]).state(NAME)


def test_a_manifest_is_filled_in(api, tmp_path):
    jobsets = JobSets.from_options(
        [
            *GIVEN,
            kubeconfig(tmp_path, api.url, {"token": "secret"}),
            "namespace=tuning",
            "replicas=3",
            "claim=filestore",
            "node_selector=cloud.google.com/gke-tpu-topology=8x8",
        ]
    )
    before = yaml.safe_load(MANIFEST.read_text())
    jobset = jobsets.describe(LAUNCH)
    assert not list(strange(jobset, JOBSET)) and not list(strange(before, JOBSET))
    assert jobset["metadata"]["labels"] == {"jaxft-job": LAUNCH.job, "jaxft-attempt": "2"}
    assert jobset["spec"]["ttlSecondsAfterFinished"] > 3600
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 0}  # the worker starts it again
    (group,) = jobset["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (group["replicas"], container["image"]) == (3, "registry/jaxft:1")
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "filestore"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert "cloud.google.com/gke-tpu-accelerator" in pod["nodeSelector"]
    assert container["command"][3:] == [
        str(LAUNCH.log),
        "jaxft",
        "train",
        f"--config={LAUNCH.config}",
        "--config.strategy=hsdp",
        "--config.mesh.data=3",
        "--resume",
    ]
    jobsets.submit(LAUNCH)
    assert list(api.objects) == [("tuning", NAME)]

    jobsets.check_seen([Path("/shared/service"), Path("org/model")])
    with pytest.raises(ConfigError, match=r"Pods do not see /shared2: they mount /shared\."):
        jobsets.check_seen([Path("/shared/service"), Path("/shared2")])


def test_a_container_becomes_the_run_and_writes_its_log(tmp_path):
    log = tmp_path / "log 1.txt"
    before = JobSets(None, "ml", yaml.safe_load(MANIFEST.read_text())).describe(LAUNCH)  # pyright: ignore
    container = before["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    shell = container["containers"][0]["command"][:3]
    for host, name in [("x-slice-0-0", log.name), ("x-slice-1-0", f"{log.name}.x-slice-1-0")]:
        process = subprocess.Popen(
            [*shell, str(log), "sh", "-c", 'echo "$$ $1"', "_", "a b"],
            env=os.environ | {"HOSTNAME": host},
            stdout=subprocess.PIPE,
            text=True,
        )
        printed, _ = process.communicate(timeout=10)
        assert (tmp_path / name).read_text() == f"{process.pid} a b\n"
        assert printed == f"This process prints to {tmp_path / name}.\n"


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("imag=x", "'imag=x' is no option .* Did you mean 'image'"),
        ("image", "'image' is no option"),
        ("replicas=0", "'replicas=0' is no whole number"),
        ("node_selector=x", "write node_selector=KEY=VALUE"),
        ("manifest=none.yaml", "The manifest cannot be read: .*none.yaml"),
        ("image=REGION-docker.pkg.dev/PROJECT/x", "The manifest's image is 'REGION"),
        ("kubeconfig=none.yaml", "none.yaml.* Name a kubeconfig with"),
    ],
)
def test_options_that_cannot_be_used_are_refused(option, problem):
    with pytest.raises(ConfigError, match=problem):
        JobSets.from_options([*GIVEN, option])


def test_manifests_that_cannot_run_a_job_are_refused(tmp_path):
    file = tmp_path / "manifest.yaml"

    def refused(text: str, problem: str) -> None:
        file.write_text(text)
        with pytest.raises(ConfigError, match=f"manifest.yaml: {problem}"):
            JobSets.from_options([*GIVEN, f"manifest={file}"])

    text = MANIFEST.read_text()
    refused("", "lacks")
    refused(text.replace("v1alpha2", "v1"), "is no JobSet of")
    refused(text.replace("- --resume", "- --overwrite"), "the command .* has no --resume")
    refused(text.replace("- --config=", "- --confg="), "the command .* has no --config=")
    refused(text.replace("containers:", "container:"), "lacks 'containers'")


def test_a_pod_asks_with_its_service_account_over_tls(tmp_path, monkeypatch):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl, which makes a certificate")
    certificate = tmp_path / "ca.crt", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=stub"
    name = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-out", str(certificate[0]), "-keyout", str(certificate[1])]
    subprocess.run([*make.split(), *name, *files], check=True, capture_output=True)
    (tmp_path / "namespace").write_text("pods\n")
    (tmp_path / "token").write_text("old")
    monkeypatch.setattr(credentials, "_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with StubKubernetes({"new": "edit"}, certificate) as api:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        jobsets = JobSets.from_options(GIVEN)
        (tmp_path / "token").write_text("new\n")  # as each hour
        jobsets.submit(LAUNCH)
        assert list(api.objects) == [("pods", NAME)]
        # The same by a kubeconfig that holds the certificate; without it nothing is trusted.
        data = base64.b64encode(certificate[0].read_bytes()).decode()
        user = {"tokenFile": "token"}
        known = kubeconfig(tmp_path, api.url, user, **{"certificate-authority-data": data})
        assert JobSets.from_options([*GIVEN, "namespace=pods", known]).find(LAUNCH) == NAME
        with pytest.raises(ExecutorError, match="CERTIFICATE_VERIFY_FAILED"):
            JobSets.from_options([*GIVEN, kubeconfig(tmp_path, api.url, user)]).find(LAUNCH)
    (tmp_path / "token").unlink()
    with pytest.raises(ExecutorError, match="The token cannot be read"):
        jobsets.find(LAUNCH)
    (tmp_path / "namespace").unlink()
    with pytest.raises(ConfigError, match="this pod has no service account"):
        JobSets.from_options(GIVEN)


def test_a_program_gives_tokens_until_they_expire(api, tmp_path):
    program = tmp_path / "plugin"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$KUBERNETES_EXEC_INFO" >>"$0.calls"\n'
        f"cat {tmp_path}/answer || {{ echo 'log in first' >&2; exit 1; }}\n"
    )
    program.chmod(0o755)
    entry = {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": str(program)}
    user = {"exec": entry | {"args": None, "provideClusterInfo": True}}
    jobsets = JobSets.from_options([*GIVEN, kubeconfig(tmp_path, api.url, user)])

    def answer(**status: str) -> None:
        (tmp_path / "answer").write_text(json.dumps({"kind": "ExecCredential", "status": status}))

    def calls() -> list[str]:
        return (tmp_path / "plugin.calls").read_text().splitlines()

    with pytest.raises(ExecutorError, match=r"(?s)gives no credentials: .*log in first"):
        jobsets.find(LAUNCH)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 30))
    answer(token="secret", expirationTimestamp=stamp)  # within the minute
    jobsets.find(LAUNCH)
    answer(token="secret", expirationTimestamp="2096-01-01T00:00:00Z")
    jobsets.find(LAUNCH)
    jobsets.find(LAUNCH)
    assert len(calls()) == 3
    assert json.loads(calls()[0])["spec"]["cluster"]["server"] == api.url


def test_credentials_that_are_not_understood_are_refused(tmp_path):
    def refused(user: dict[str, Any], problem: str, **cluster: Any) -> None:
        with pytest.raises(ConfigError, match=problem):
            JobSets.from_options([*GIVEN, kubeconfig(tmp_path, "https://c", user, **cluster)])

    refused({"auth-provider": {}}, "auth-provider is not understood")
    refused({}, "insecure-skip-tls-verify is not", **{"insecure-skip-tls-verify": True})
    refused({"client-certificate": "none.pem"}, "none.pem")
    (tmp_path / "kubeconfig").write_text("current-context: here\ncontexts: []\n")
    with pytest.raises(ConfigError, match="no context is called 'here'"):
        JobSets.from_options([*GIVEN, f"kubeconfig={tmp_path / 'kubeconfig'}"])


def test_the_service_in_a_pod_may_do_what_it_does(api, tmp_path):
    """All that the executor asks of the API is in its role, and its command is one of jaxft."""
    account, role, binding, claim, deployment = yaml.safe_load_all(SERVICE.read_text())
    name = account["metadata"]["name"]
    jobsets = JobSets.from_options([*GIVEN, kubeconfig(tmp_path, api.url, {"token": "secret"})])
    jobsets.submit(LAUNCH)
    jobsets.submit(LAUNCH)
    jobsets.stop(NAME)
    (rule,) = role["rules"]
    assert set(rule["verbs"]) == api.verbs
    assert (rule["apiGroups"], rule["resources"]) == (["jobset.x-k8s.io"], ["jobsets"])
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name}]

    pod = deployment["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == name
    claims = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"]}
    assert claims["database"] == claim["metadata"]["name"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == claims.keys()
    program, *arguments = container["command"]
    options = cli.make_parser().parse_args(arguments)
    assert program == "jaxft" and options.executor == "jobset"
    (option,) = options.executor_option
    assert option == "manifest=/shared/jobset.yaml"
    jobsets.check_seen(map(Path, [options.workdir, *options.models]))
