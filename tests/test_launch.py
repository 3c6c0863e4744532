"""Files that start runs on machines that are not here: their syntax, and what they ask of jaxft."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxft import cli
from jaxft.flags import read_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "running.md"
SCRIPTS = ("launch/tpu.sh", "launch/slurm.sbatch")


def commands_of_jaxft(text: str) -> list[list[str]]:
    """Returns the arguments of each `jaxft` command in a script or document."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M)
    joined = re.sub(r"\\\n\s*", " ", text)
    # Both scripts pass their flags on.
    joined = re.sub(
        r"(launch/tpu\.sh train|sbatch launch/slurm\.sbatch)\b",
        "jaxft train --config=configs/cluster.py",
        joined,
    )
    found = re.findall(
        r"(?:^|[ /'`])jaxft ((?:train|eval|doctor|shardings)\b[^`'\n>&]*)", joined, re.M
    )
    # What stands for the reader's own is left out.
    own = re.compile(r'"\$@"|…')
    return [shlex.split(own.sub("", line.split(" # ")[0])) for line in found]


def parse(arguments: list[str], monkeypatch: Any) -> None:
    """Parses a command as jaxft does: unknown flags and keys, and wrong values, raise."""
    monkeypatch.chdir(ROOT)
    options, rest = cli.make_parser().parse_known_args(arguments)
    overrides = cli._overrides(rest, options)
    if overrides or getattr(options, "config", ""):
        read_config(options.config, overrides, training=arguments[0] == "train")


def dry_run(*arguments: str, **variables: str) -> list[list[str]]:
    """Returns the commands that `launch/tpu.sh` would run, split as a shell does."""
    split = "while read -r line; do eval \"printf '%s\\0' $line\"; printf '\\1\\0'; done"
    script = f"set -euo pipefail; DRY_RUN=1 launch/tpu.sh {shlex.join(arguments)} | {{ {split}; }}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    parts = done.stdout.split("\1\0")[:-1]
    return [part.split("\0")[:-1] for part in parts]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_that_stops_at_the_first_error(name):
    path = ROOT / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    # Options of sbatch count only before the first command.
    assert "#SBATCH" not in text.partition("\nset -euo pipefail\n")[2]


@pytest.mark.parametrize("path", [DOCUMENT, ROOT / "launch/slurm.sbatch"])
def test_every_command_is_one_that_jaxft_understands(path, monkeypatch):
    commands = commands_of_jaxft(path.read_text())
    assert len(commands) >= (9 if path == DOCUMENT else 1)
    for arguments in commands:
        parse(arguments, monkeypatch)


def test_every_file_and_key_that_the_document_names_exists():
    text = DOCUMENT.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DOCUMENT.parent / link).exists(), link
    for name in re.findall(r"\b(?:launch|configs|tests)/[\w.]+\w", text):
        assert (ROOT / name).exists(), name
    for key in re.findall(r"`((?:train|data|model|mesh)\.\w+)`", text):
        read_config("", [f"--config.{key}=1"], validate=False)


def test_a_slice_is_asked_for_and_given_back():
    (create,) = dry_run("create", NAME="one", TYPE="v5litepod-16", CAPACITY="")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "one"]
    assert "--node-id=one" in create and "--accelerator-type=v5litepod-16" in create
    assert "--spot" not in create
    (create,) = dry_run("create", NAME="two", SLICES="2")
    assert {"--node-count=2", "--node-prefix=two", "--spot"} < set(create)
    (delete,) = dry_run("delete", NAME="two")
    assert delete[4:6] == ["delete", "two"]


def test_every_slice_gets_the_code_and_every_host_installs_it():
    _, first, second, install = dry_run("install", NAME="two", SLICES="2")
    assert [first[6], second[6]] == ["two-0:", "two-1:"]
    assert {"--worker=all", "--node=all"} < set(install)
    script = install[-1].removeprefix("--command=")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "mount -t nfs 10.0.0.2:/share /shared" in script


def test_the_command_on_a_host_starts_jaxft_and_can_be_stopped(tmp_path, monkeypatch):
    flags = ["--config.optim.learning_rate=2e-5", "--config.data.train=a b.jsonl"]
    (train,) = dry_run("train", *flags)
    (stop,) = dry_run("stop")
    program = tmp_path / "jaxft" / ".venv" / "bin" / "jaxft"
    program.parent.mkdir(parents=True)
    program.write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s\\n" "$@"\n'
        'trap "echo saved; exit" TERM\n'
        "while true; do sleep 0.05; done\n"
    )
    program.chmod(0o755)

    def on_host(command: list[str]) -> None:
        script = command[-1].removeprefix("--command=")
        subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)

    log = tmp_path / "jaxft" / "train.log"
    on_host(train)
    wait_for(lambda: log.exists() and log.read_text().endswith(f"{flags[-1]}\n"))
    arguments = log.read_text().splitlines()
    parse(arguments, monkeypatch)
    assert arguments[0] == "train" and "--resume" in arguments
    time.sleep(0.2)  # until the trap is set
    on_host(stop)
    wait_for(lambda: log.read_text().endswith("saved\n"))


def wait_for(condition: Any) -> None:
    """Waits up to ten seconds."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_jobset_has_the_fields_of_its_api(monkeypatch):
    manifest = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    assert set(manifest["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (group,) = manifest["spec"]["replicatedJobs"]
    assert set(group) == {"name", "replicas", "template"}
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # the JobSet restarts all pods, not one
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = resources["limits"]["google.com/tpu"] * job["parallelism"]
    assert chips == int(rows) * int(columns)
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    program, *arguments = container["command"]
    assert program == "jaxft" and "--resume" in arguments
    assert f"--config.mesh.data={group['replicas']}" in arguments
    parse(arguments, monkeypatch)


def test_the_image_has_what_the_manifest_runs():
    text = (ROOT / "launch/Dockerfile").read_text()
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    assert {"jaxft", "configs", "pyproject.toml", "README.md", "LICENSE"} <= copied
