"""Jobs on Kubernetes, each a JobSet made of a manifest such as launch/jobset.yaml.

The service runs in a pod of the cluster, or on a machine beside it: its workdir lies on the volume
that the manifest mounts, under the same path.

**This has been tested against a stub of the API alone, made by its documentation (JobSet v1alpha2),
and has not run on a cluster yet.**
"""

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxft.errors import ConfigError, nearest
from jaxft.service.executors import ExecutorError, Launch, State
from jaxft.service.executors.kubernetes import Cluster, KubernetesError, connect
from jaxft.service.executors.listing import Listing
from jaxft.service.settings import Settings

_VERSION = "jobset.x-k8s.io/v1alpha2"
_JOB, _ATTEMPT = "jaxft-job", "jaxft-attempt"  # labels

# Seconds for which a JobSet that has ended is kept, to be found and looked at.
_KEPT = 86_400

# What launch/jobset.yaml has in place of an image.
_PLACEHOLDER = "-docker.pkg.dev/PROJECT/"

_OPTIONS = ("manifest", "kubeconfig", "namespace", "image", "replicas", "claim", "node_selector")

# What a container runs: its command, as the process that gets SIGTERM. The first host of the first
# slice prints to the log that the service reads, the others to files beside it.
_SHELL = """\
case "$HOSTNAME" in *-0-0) log="$0" ;; *) log="$0.$HOSTNAME" ;; esac
echo "This process prints to $log."
exec "$@" >>"$log" 2>&1
"""


def make(settings: Settings) -> "JobSets":
    """Returns the executor of a service.

    Raises:
      ConfigError: For options, a manifest or credentials that cannot be used, and if pods do not
        see the workdir or a model.
    """
    jobsets = JobSets.from_options(settings.executor_options)
    jobsets.check_seen([settings.workdir, *map(Path, settings.models.values())])
    return jobsets


class JobSets:
    """A Kubernetes cluster with the JobSet controller.

    Args:
      cluster: API that is asked.
      namespace: Namespace of all JobSets.
      manifest: JobSet that each launch is a copy of, but for name, labels, config and log.
    """

    def __init__(self, cluster: Cluster, namespace: str, manifest: dict[str, Any]):
        self._cluster, self._manifest = cluster, manifest
        self._path = f"/apis/{_VERSION}/namespaces/{namespace}/jobsets"
        self._jobsets = Listing(self._list)

    @classmethod
    def from_options(cls, options: Sequence[str]) -> "JobSets":
        """Returns a cluster by its options.

        Args:
          options: `manifest=FILE`, by default launch/jobset.yaml; `kubeconfig=FILE`;
            `namespace=NAME`, by default the credentials' own; and what is another than in the
            manifest: `image=IMAGE`, `replicas=SLICES`, `claim=NAME` of the volume,
            `node_selector=KEY=VALUE`, which can stand several times.

        Raises:
          ConfigError: For options, a manifest or credentials that cannot be used.
        """
        given, selector = _parse(options)
        file = Path(given.get("manifest", "launch/jobset.yaml")).expanduser()
        manifest = _read(file)
        _change(manifest, given, selector)
        cluster = connect(given.get("kubeconfig", ""))
        own = manifest["metadata"].pop("namespace", cluster.namespace)
        return cls(cluster, given.get("namespace") or own, manifest)

    def check_seen(self, paths: Iterable[Path]) -> None:
        """Raises ConfigError if pods do not see a folder; a repository id is none."""
        mounts = [mount["mountPath"] for mount in _container(self._manifest)["volumeMounts"]]
        problems = [
            f"Pods do not see {path}: they mount {', '.join(mounts)}. What jobs read and write "
            "lies on a volume that pods and service mount under the same path."
            for path in paths
            if path.is_absolute() and not any(path.is_relative_to(mount) for mount in mounts)
        ]
        if problems:
            raise ConfigError(problems)

    def submit(self, launch: Launch) -> str:
        """Creates the JobSet of a launch, unless it is there already; returns its name."""
        manifest = self.describe(launch)
        name, labels = manifest["metadata"]["name"], manifest["metadata"]["labels"]
        try:
            # Strict: a field that this cluster's version does not know is refused, not dropped.
            strict = {"fieldValidation": "Strict"}
            self._cluster.call("POST", self._path, body=manifest, params=strict)
        except KubernetesError as error:
            if error.status != 409:
                raise
            there = self._cluster.call("GET", f"{self._path}/{name}")["metadata"]
            if not labels.items() <= there.get("labels", {}).items():
                raise ExecutorError(f"Another JobSet is called {name}; delete it.") from error
        self._jobsets.forget()
        return name

    def find(self, launch: Launch) -> str | None:
        """Returns the name of the JobSet of a launch, if there is one; found by its labels."""
        labels = _labels(launch).items()
        for name, jobset in self._jobsets.new().items():
            if labels <= jobset["metadata"]["labels"].items():
                return name
        return None

    def state(self, handle: str) -> State:
        """Returns the state of a launch; one that is not there any more has ended."""
        jobset = self._jobsets.recent().get(handle)
        return State.ENDED if jobset is None else _state(jobset)

    def stop(self, handle: str) -> None:
        """Deletes a JobSet once its pods are gone: these get SIGTERM, and time to save.

        How much is the manifest's `terminationGracePeriodSeconds`.
        """
        jobset = self._jobsets.recent().get(handle)
        if jobset is None or "deletionTimestamp" in jobset["metadata"]:
            return
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
        try:
            self._cluster.call("DELETE", f"{self._path}/{handle}", body=body)
        except KubernetesError as error:
            if error.status != 404:
                raise
        self._jobsets.forget()

    def _list(self) -> dict[str, dict[str, Any]]:
        """Returns all JobSets of services by their names."""
        found = self._cluster.call("GET", self._path, params={"labelSelector": _JOB})
        return {one["metadata"]["name"]: one for one in found["items"]}

    def describe(self, launch: Launch) -> dict[str, Any]:
        """Returns the JobSet of a launch."""
        manifest = copy.deepcopy(self._manifest)
        # Names are of lower case; which job it is of is what its label says.
        manifest["metadata"]["name"] = launch.name.lower()
        labels = manifest["metadata"].setdefault("labels", {})
        labels.update(_labels(launch))
        # The service starts a run again, by what its result.json says.
        manifest["spec"]["failurePolicy"] = {"maxRestarts": 0}
        manifest["spec"].setdefault("ttlSecondsAfterFinished", _KEPT)
        container = _container(manifest)
        flag = f"--config={launch.config}"
        command = [flag if p.startswith("--config=") else p for p in container["command"]]
        container["command"] = ["sh", "-c", _SHELL, str(launch.log), *command]
        return manifest


def _labels(launch: Launch) -> dict[str, str]:
    return {_JOB: launch.job, _ATTEMPT: str(launch.attempt)}


def _state(jobset: dict[str, Any]) -> State:
    """Returns the state by conditions, and by how many of its jobs have all their pods."""
    status = jobset.get("status") or {}
    true = {one["type"] for one in status.get("conditions", []) if one["status"] == "True"}
    if true & {"Completed", "Failed"}:
        return State.ENDED
    if "deletionTimestamp" in jobset["metadata"]:
        return State.RUNNING  # pods are saving
    if "Suspended" in true:
        return State.WAITING  # in a queue such as Kueue's
    wanted = sum(group.get("replicas", 1) for group in jobset["spec"]["replicatedJobs"])
    groups = status.get("replicatedJobsStatus", [])
    # `active` counts jobs whose pods wait for a node as well.
    there = sum(group.get("ready", 0) + group.get("succeeded", 0) for group in groups)
    return State.RUNNING if there >= wanted else State.WAITING


def _parse(options: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the options by name, and the node selector."""
    given: dict[str, str] = {}
    selector: dict[str, str] = {}
    problems = []
    for option in options:
        name, equals, value = option.partition("=")
        if name not in _OPTIONS or not value:
            known = ", ".join(f"{one}=" for one in _OPTIONS)
            hint = nearest(name, _OPTIONS)
            problems.append(f"{option!r} is no option of the JobSet executor: {known}.{hint}")
        elif name == "node_selector":
            key, equals, value = value.partition("=")
            selector[key] = value
            if not equals:
                problems.append(f"{option!r}: write node_selector=KEY=VALUE.")
        elif name == "replicas" and not re.fullmatch(r"[1-9]\d*", value):
            problems.append(f"{option!r} is no whole number of slices above 0.")
        else:
            given[name] = value
    if problems:
        raise ConfigError(problems)
    return given, selector


def _read(file: Path) -> dict[str, Any]:
    """Returns the manifest in a file, once it has what a launch needs."""
    try:
        manifest = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"The manifest cannot be read: {error}. Start the service in the folder that holds "
            "launch/, or name a copy: manifest=FILE."
        ) from error
    if problems := list(_problems(manifest)):
        raise ConfigError([f"{file}: {problem}" for problem in problems])
    return manifest


def _problems(manifest: Any) -> Iterator[str]:
    """Yields what a manifest lacks to run a job of the service."""
    try:
        if (manifest["apiVersion"], manifest["kind"]) != (_VERSION, "JobSet"):
            yield f"is no JobSet of {_VERSION}."
            return
        manifest["metadata"] = manifest.get("metadata") or {}
        groups = manifest["spec"]["replicatedJobs"]
        pod = _pod(manifest)
        if len(groups) != 1 or len(pod["containers"]) != 1:
            yield "has more than one replicated job or container; the service fills in one."
            return
        command = pod["containers"][0].get("command", [])
    except (LookupError, TypeError, AttributeError) as error:
        yield f"lacks {error}, up to spec.replicatedJobs[0].template.spec.template.spec.containers."
        return
    if not any(part.startswith("--config=") for part in command):
        yield "the command of its container has no --config=, in whose place that of a job goes."
    if not pod["containers"][0].get("volumeMounts"):
        yield "its container mounts no volume, on which the workdir of the service lies."
    if "--resume" not in command:
        yield "the command of its container has no --resume, so a job would begin anew each time."


def _change(manifest: dict[str, Any], given: dict[str, str], selector: dict[str, str]) -> None:
    """Writes options into a manifest."""
    pod, container = _pod(manifest), _container(manifest)
    pod["nodeSelector"] = pod.get("nodeSelector", {}) | selector
    container["image"] = image = given.get("image", container.get("image", ""))
    if not image or _PLACEHOLDER in image:
        raise ConfigError(
            f"The manifest's image is {image!r}. Make yours with launch/Dockerfile, and name it "
            "with image=IMAGE or in the manifest."
        )
    if slices := given.get("replicas"):
        manifest["spec"]["replicatedJobs"][0]["replicas"] = int(slices)
        # The axis that spans slices.
        flag = "--config.mesh.data="
        command = container["command"]
        command[:] = [flag + slices if part.startswith(flag) else part for part in command]
    if claim := given.get("claim"):
        claims = [one for one in pod.get("volumes", []) if "persistentVolumeClaim" in one]
        if len(claims) != 1:
            raise ConfigError(
                f"claim={claim}: the manifest has {len(claims)} volumes with a "
                "persistentVolumeClaim; name the claim there."
            )
        claims[0]["persistentVolumeClaim"]["claimName"] = claim


def _pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def _container(manifest: dict[str, Any]) -> dict[str, Any]:
    return _pod(manifest)["containers"][0]
