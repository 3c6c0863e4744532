"""The API of a Kubernetes cluster: where it is, who asks it, and what it answers.

Credentials are those of a pod's service account, or of a kubeconfig's current context. The official
client would do the same for the four calls that are made here, in 119 MB.
"""

import base64
import json
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml

from jaxft.errors import ConfigError
from jaxft.service.executors import ExecutorError

# What every pod finds of its service account. The token is replaced each hour.
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# Keys of a kubeconfig that are understood, of those that change how the server is asked.
_CLUSTER_KEYS = {"server", "certificate-authority", "certificate-authority-data", "extensions"}
_USER_KEYS = {"token", "tokenFile", "exec"} | {
    f"client-{part}{data}" for part in ("certificate", "key") for data in ("", "-data")
}
_ADVICE = {
    401: "The credentials are not, or no longer, valid.",
    403: "Give the account of the service the role in docs/service-clusters.md.",
}


class KubernetesError(ExecutorError):
    """An answer of the API other than success.

    Args:
      status: HTTP status.
      message: What the API says.
    """

    def __init__(self, status: int, message: str):
        self.status = status
        super().__init__(
            f"Kubernetes answers {status}: {message} {_ADVICE.get(status, '')}".strip()
        )


@dataclass(frozen=True)
class Cluster:
    """The API server of a cluster.

    Attributes:
      server: URL.
      namespace: Namespace of objects for which no other is named.
      token: Returns the bearer token, or an empty text for a client certificate.
      context: Certificates that are trusted and shown.
    """

    server: str
    namespace: str
    token: Callable[[], str] = field(repr=False)
    context: ssl.SSLContext = field(repr=False)

    def call(
        self, method: str, path: str, *, body: Any = None, params: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Returns the object that the API answers with.

        Raises:
          KubernetesError: For any answer but success.
          ExecutorError: Without an answer, or without credentials.
        """
        headers = {"Authorization": f"Bearer {token}"} if (token := self.token()) else {}
        try:
            answer = httpx.request(
                method,
                self.server.rstrip("/") + path,
                json=body,
                params=params,
                headers=headers,
                verify=self.context,
                timeout=30,
            )
            if answer.is_success:
                return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ExecutorError(f"Kubernetes at {self.server} does not answer: {error}") from error
        try:
            message = answer.json()["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:500] or answer.reason_phrase
        raise KubernetesError(answer.status_code, message)


def connect(kubeconfig: str = "") -> Cluster:
    """Returns the cluster of a kubeconfig, or of KUBECONFIG, of this pod, or of ~/.kube/config.

    Raises:
      ConfigError: If there are no credentials, or some that are not understood.
    """
    if file := kubeconfig or os.environ.get("KUBECONFIG", ""):
        return _from_kubeconfig(Path(file).expanduser())
    if host := os.environ.get("KUBERNETES_SERVICE_HOST", ""):
        return _in_cluster(f"[{host}]" if ":" in host else host)
    return _from_kubeconfig(Path("~/.kube/config").expanduser())


def _in_cluster(host: str) -> Cluster:
    try:
        return Cluster(
            server=f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}",
            namespace=(_ACCOUNT / "namespace").read_text().strip(),
            token=_reader(_ACCOUNT / "token"),
            context=_trusting((_ACCOUNT / "ca.crt").read_text()),
        )
    except OSError as error:
        raise ConfigError(
            f"{error}: this pod has no service account to ask Kubernetes with. Set "
            "serviceAccountName, and not automountServiceAccountToken: false."
        ) from error


def _from_kubeconfig(file: Path) -> Cluster:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        context = _named(config, "context", config["current-context"])
        cluster = _named(config, "cluster", context["cluster"])
        user = _named(config, "user", context["user"])
        strange = [*(cluster.keys() - _CLUSTER_KEYS), *(user.keys() - _USER_KEYS)]
        if strange:
            raise ConfigError(f"{file}: {', '.join(sorted(strange))} is not understood.")
        return Cluster(
            server=cluster["server"],
            namespace=context.get("namespace", "default"),
            token=_token(user, cluster, file.parent),
            context=_certificates(cluster, user, file.parent),
        )
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{file}: {error}. Name a kubeconfig with kubeconfig=FILE or KUBECONFIG=FILE."
        ) from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is no kubeconfig: {type(error).__name__}: {error}.") from error


def _named(config: Any, kind: str, name: str) -> dict[str, Any]:
    """Returns the cluster, context or user of a name; KeyError if there is none."""
    for entry in config[f"{kind}s"]:
        if entry["name"] == name:
            return entry[kind] or {}
    raise KeyError(f"no {kind} is called {name!r}")


def _token(user: dict[str, Any], cluster: dict[str, Any], folder: Path) -> Callable[[], str]:
    if "exec" in user:
        return _Plugin(user["exec"], cluster)
    if "tokenFile" in user:
        return _reader(folder / user["tokenFile"])
    token = user.get("token", "")
    return lambda: token


def _reader(file: Path) -> Callable[[], str]:
    """Returns what reads a token from its file, as it is by then."""

    def read() -> str:
        try:
            return file.read_text().strip()
        except OSError as error:
            raise ExecutorError(f"The token cannot be read: {error}.") from error

    return read


def _certificates(cluster: dict[str, Any], user: dict[str, Any], folder: Path) -> ssl.SSLContext:
    """Returns which certificates are trusted, and the client's own where it has one."""
    authority = _content(cluster, "certificate-authority", folder)
    context = _trusting(authority.decode("ascii"))
    if certificate := _content(user, "client-certificate", folder):
        # Python reads keys from files alone.
        with tempfile.NamedTemporaryFile() as file:
            file.write(certificate + b"\n" + _content(user, "client-key", folder))
            file.flush()
            context.load_cert_chain(file.name)
    return context


def _trusting(authority: str) -> ssl.SSLContext:
    """Returns what trusts an authority in PEM, or without one those of the system."""
    context = ssl.create_default_context(cadata=authority or None)
    # Clusters' own authorities may lack extensions that Python 3.13 asks for by default.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _content(entry: dict[str, Any], key: str, folder: Path) -> bytes:
    """Returns what stands in a kubeconfig in base64, or in a file that it names; or nothing."""
    if f"{key}-data" in entry:
        return base64.b64decode(entry[f"{key}-data"], validate=True)
    return (folder / entry[key]).read_bytes() if key in entry else b""


class _Plugin:
    """A program that prints tokens, such as gke-gcloud-auth-plugin, asked when one expires."""

    def __init__(self, entry: dict[str, Any], cluster: dict[str, Any]):
        self._command = [entry["command"], *(entry.get("args") or [])]
        self._environment = {one["name"]: one["value"] for one in entry.get("env") or []}
        request: dict[str, Any] = {"interactive": False}
        if entry.get("provideClusterInfo"):
            request["cluster"] = {
                "server": cluster["server"],
                "certificate-authority-data": cluster.get("certificate-authority-data"),
            }
        self._environment["KUBERNETES_EXEC_INFO"] = json.dumps(
            {"apiVersion": entry["apiVersion"], "kind": "ExecCredential", "spec": request}
        )
        self._token, self._until = "", 0.0

    def __call__(self) -> str:
        if time.time() >= self._until:
            self._ask()
        return self._token

    def _ask(self) -> None:
        program = self._command[0]
        try:
            printed = subprocess.run(
                self._command,
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
            status = json.loads(printed)["status"]
            self._token = status["token"]
            expires = status.get("expirationTimestamp")
            # A minute early; one that does not say so is asked each time.
            self._until = datetime.fromisoformat(expires).timestamp() - 60 if expires else 0.0
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise ExecutorError(f"{program} gives no credentials: {said}") from error
        except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
            raise ExecutorError(
                f"{program} gives no token: {type(error).__name__}: {error}"
            ) from error
