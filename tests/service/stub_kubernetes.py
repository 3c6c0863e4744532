"""A stub of the Kubernetes API for JobSets, v1alpha2, that answers as its documentation says.

It keeps objects, checks tokens, names and fields, and deletes in the foreground; there are no pods,
so that a test says how far they are.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.hosts import free_port

TEXTS = {str: str}
METADATA = {"name": str, "namespace": str, "labels": TEXTS, "annotations": TEXTS}
# The fields of the custom resource that a manifest of ours may have, and their types.
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": METADATA,
    "spec": {
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": str,
            "rules": [
                {
                    "name": str,
                    "action": str,
                    "onJobFailureReasons": [str],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "metadata": METADATA,
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": str,
                        "backoffLimit": int,
                        "activeDeadlineSeconds": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": str,
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": str,
                                        "values": [int],
                                    },
                                }
                            ]
                        },
                        "template": {
                            "metadata": METADATA,
                            "spec": {
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": TEXTS,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "command": [str],
                                        "args": [str],
                                        "env": [{"name": str, "value": str}],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"requests": {str: int}, "limits": {str: int}},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "persistentVolumeClaim": {"claimName": str},
                                    }
                                ],
                            },
                        },
                    },
                },
            }
        ],
    },
}


def strange(value: Any, schema: Any, path: str = "") -> Iterator[str]:
    """Yields the fields of an object that a schema does not know, or knows as another type."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, inner in value.items():
            field = f"{path}.{key}".lstrip(".")
            if key in schema or str in schema:
                yield from strange(inner, schema.get(key, schema.get(str)), field)
            else:
                yield f'unknown field "{field}"'
    elif isinstance(schema, list) and isinstance(value, list):
        for number, inner in enumerate(value):
            yield from strange(inner, schema[0], f"{path}[{number}]")
    elif type(value) is not schema:
        yield f'"{path}" must not be {value!r}'


class StubKubernetes:
    """The API server, on a port of loopback while the context lasts.

    Args:
      roles: What a token may do: `edit`, or `view`.
      certificate: Files of a certificate and its key; without one it speaks plain HTTP.
    """

    def __init__(self, roles: dict[str, str], certificate: tuple[Path, Path] | None = None):
        self.roles, self.objects = roles, {}
        self.verbs: set[str] = set()
        self.port = free_port()
        self._versions = itertools.count(1)
        path = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{namespace}/jobsets"
        routes = [
            Route(path, self._answer, methods=["GET", "POST"]),
            Route(path + "/{name}", self._answer, methods=["GET", "DELETE"]),
        ]
        files = dict(
            zip(("ssl_certfile", "ssl_keyfile"), map(str, certificate or ()), strict=False)
        )
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_level="error", lifespan="off", **files
        )
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "StubKubernetes":
        self._thread.start()
        limit = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < limit
            time.sleep(0.005)
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def report(self, name: str, **status: Any) -> None:
        """Sets the status of a JobSet, as its controller does."""
        (jobset,) = [one for (_, key), one in self.objects.items() if key == name]
        jobset["status"] = {"restarts": 0, **status}
        self._touch(jobset)

    def end_pods(self, name: str) -> None:
        """Lets the last pod of a JobSet end, after which the garbage collector removes it."""
        (key,) = [key for key in self.objects if key[1] == name]
        assert "foregroundDeletion" in self.objects[key]["metadata"]["finalizers"]
        del self.objects[key]

    def _touch(self, jobset: dict[str, Any]) -> None:
        jobset["metadata"]["resourceVersion"] = str(next(self._versions))

    async def _answer(self, request: Request) -> JSONResponse:
        role = self.roles.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if role is None:
            return failure(401, "Unauthorized", "Unauthorized")
        namespace, name = (request.path_params.get(key, "") for key in ("namespace", "name"))
        verb = {"POST": "create", "DELETE": "delete"}.get(request.method, "get" if name else "list")
        self.verbs.add(verb)
        if verb in ("create", "delete") and role != "edit":
            what = f'cannot {verb} resource "jobsets" in API group "jobset.x-k8s.io"'
            user = f'User "system:serviceaccount:{namespace}:{role}"'
            text = f'is forbidden: {user} {what} in the namespace "{namespace}"'
            return failure(403, "Forbidden", f"jobsets.jobset.x-k8s.io {text}")
        if verb == "create":
            return self._create(await request.json(), namespace, request.query_params)
        if verb == "list":
            label = request.query_params["labelSelector"]
            items = [
                one
                for (place, _), one in self.objects.items()
                if place == namespace and label in one["metadata"].get("labels", {})
            ]
            return JSONResponse({"kind": "JobSetList", "metadata": {}, "items": items})
        if (jobset := self.objects.get((namespace, name))) is None:
            return failure(404, "NotFound", f'jobsets.jobset.x-k8s.io "{name}" not found')
        if verb == "delete":
            options = await request.json()
            assert options["propagationPolicy"] == "Foreground" and options["apiVersion"] == "v1"
            jobset["metadata"] |= {
                "deletionTimestamp": "2026-01-01T00:00:00Z",
                "finalizers": ["foregroundDeletion"],
            }
            self._touch(jobset)
        return JSONResponse(jobset)

    def _create(self, jobset: dict[str, Any], namespace: str, query: Any) -> JSONResponse:
        name = jobset["metadata"]["name"]
        if problems := list(strange(jobset, JOBSET)):
            assert query["fieldValidation"] == "Strict"
            text = f"strict decoding error: {', '.join(problems)}"
            return failure(
                400, "BadRequest", f"JobSet in version v1alpha2 cannot be handled: {text}"
            )
        lower = name.replace("-", "a")
        if not (lower.isascii() and lower.isalnum() and lower.islower() and len(name) < 45):
            return failure(422, "Invalid", f'JobSet "{name}" is invalid: metadata.name')
        if (namespace, name) in self.objects:
            return failure(409, "AlreadyExists", f'jobsets "{name}" already exists')
        jobset["metadata"] |= {"namespace": namespace, "uid": f"uid-{name}"}
        self._touch(jobset)
        self.objects[namespace, name] = jobset
        return JSONResponse(jobset, 201)


def failure(code: int, reason: str, message: str) -> JSONResponse:
    """Returns the object that the API answers with in place of the one asked for."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return JSONResponse(status | {"message": message, "reason": reason, "code": code}, code)
