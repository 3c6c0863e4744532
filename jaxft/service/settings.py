"""The settings that a service is started with, as its processes share them."""

import base64
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from jaxft.errors import ConfigError, collected
from jaxft.files import write_json
from jaxft.service.target import check_devices

_FILE = "service.json"
# What sources of data separate their options by; such a name could not be handed to a run.
_SEPARATORS = ",:;[]*?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings of a service.

    Attributes:
      workdir: Folder of all that it keeps.
      models: Base models by the name that clients use: a folder, or a repository id.
      database: URL; empty: SQLite in the workdir.
      executor: Name of what runs jobs: `local`, `slurm` or `jobset`.
      executor_options: Options of the executor, as its part of the documentation has them.
      device_sets: Devices of each job that this machine runs at a time, such as `0,1`; empty: one
        job has them all.
      topology: Slice that jobs run on, as `jaxft plan` names it; empty: the devices of this
        machine.
      most_jobs: Jobs that are handed to a scheduler at a time.
      keep_unfinished: Days for which checkpoints of cancelled and failed jobs are kept; 0: until
        they are deleted.
      organization: Name in the names of tuned models, and in the id of their owner.
      webhooks: URLs that are told how jobs end.
      webhook_secret: File with the secret that signs what they are told; empty: unsigned.
      max_file_bytes: Size of a file in one request.
      max_upload_bytes: Size of a file in parts.
      requests_per_minute: Most requests of one token, or of one address without tokens; 0: any.
      generation: Options of the process that generates text.
      generate_on: Devices that it computes on: `cpu`, or such as `3`; empty: all.
    """

    workdir: Path
    models: dict[str, str]
    database: str = ""
    executor: str = "local"
    executor_options: tuple[str, ...] = ()
    device_sets: tuple[str, ...] = ()
    topology: str = ""
    most_jobs: int = 8
    keep_unfinished: int = 0
    organization: str = "local"
    webhooks: tuple[str, ...] = ()
    webhook_secret: str = ""
    max_file_bytes: int = 512 << 20
    max_upload_bytes: int = 8 << 30
    requests_per_minute: int = 0
    generation: dict[str, str] = dataclasses.field(default_factory=dict)
    generate_on: str = ""

    @property
    def url(self) -> str:
        """The database's."""
        return self.database or f"sqlite:///{self.workdir / 'service.db'}"

    @property
    def files(self) -> Path:
        """Contents of files."""
        return self.workdir / "files"

    @property
    def temporary(self) -> Path:
        """The folder in which bodies of requests wait."""
        return self.workdir / "tmp"

    @property
    def parts(self) -> Path:
        """Contents of parts of uploads."""
        return self.workdir / "uploads"

    @property
    def organization_id(self) -> str:
        """The owner of jobs and tuned models."""
        return f"org-{self.organization}"

    @property
    def caches(self) -> Path:
        """Tokens of files."""
        return self.workdir / "cache"

    def cache(self, training: str, validation: str | None) -> Path:
        """The folder of the tokens of files, whose ids are in its name."""
        return self.caches / f"{training}_{validation or ''}"

    def job(self, number: str) -> Path:
        """The folder of a job."""
        return self.workdir / "jobs" / number

    def run(self, number: str) -> Path:
        """The workdir of a job's run."""
        return self.job(number) / "run"

    def config(self, number: str) -> Path:
        """The config of a job's run."""
        return self.job(number) / "config.json"

    def log(self, number: str) -> Path:
        """The file of what a job's run prints."""
        return self.job(number) / "log.txt"

    def exports(self, number: str) -> Path:
        """The folder of exports of a job's models, by step."""
        return self.job(number) / "exports"

    def without_workdir(self, text: str) -> str:
        """Returns a text for clients, to whom it is no business where things lie."""
        return text.replace(str(self.workdir), "WORKDIR")

    def check(self) -> None:
        """Raises ConfigError for what could not work."""
        problems: list[str] = []
        if any(letter in str(self.workdir) for letter in _SEPARATORS):
            problems.append(
                f"--workdir={self.workdir} holds one of {_SEPARATORS}, by which sources of data "
                "are told apart. Name another folder."
            )
        if not self.models:
            problems.append("Name at least one base model: --models=FOLDER_OR_ID.")
        if self.keep_unfinished < 0:
            problems.append(f"--keep_unfinished={self.keep_unfinished}: expected days, 0 or more.")
        if not re.fullmatch(r"[\w.-]+", self.organization):
            problems.append(
                f"--organization={self.organization}: expected letters, digits, '.', '_' and '-', "
                "as it stands between colons in the names of models."
            )
        if self.executor == "local" and self.executor_options:
            problems.append("--executor_option is for slurm and jobset; local has none.")
        if self.executor != "local" and self.device_sets:
            problems.append("--device_set is for jobs of this machine, --executor=local.")
        of_text = () if self.generate_on in ("", "cpu") else (self.generate_on,)
        for devices in (*self.device_sets, *of_text):
            with collected(problems):
                check_devices(devices)
        used = [device for devices in self.device_sets for device in devices.split(",")]
        if len(set(used)) < len(used):
            problems.append(f"--device_set names a device twice: {' and '.join(self.device_sets)}.")
        if len({devices.count(",") for devices in self.device_sets}) > 1:
            problems.append(
                "--device_set: all sets have as many devices, as a job is checked for any of them."
            )
        if set(self.generate_on.split(",")) & set(used):
            problems.append(f"--generate_on={self.generate_on} names a device of a --device_set.")
        for url in self.webhooks:
            if not url.startswith(("http://", "https://")):
                problems.append(f"--webhook={url}: expected http://… or https://….")
        if self.webhook_secret:
            with collected(problems):
                read_secret(self.webhook_secret)
        if problems:
            raise ConfigError(problems)

    def write(self) -> Path:
        """Writes them to the workdir, for the processes that the server starts."""
        path = self.workdir / _FILE
        write_json(path, dataclasses.asdict(self) | {"workdir": str(self.workdir)})
        path.chmod(0o600)  # a URL may hold a password
        return path

    @classmethod
    def read(cls, path: Path) -> "Settings":
        """Reads what `write` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        tuples = ("executor_options", "device_sets", "webhooks")
        values |= {name: tuple(values[name]) for name in tuples}
        return cls(**values | {"workdir": Path(values["workdir"])})


def read_secret(file: str) -> bytes:
    """Returns the key that a file holds in the form of Standard Webhooks: `whsec_` and base64.

    Raises:
      ConfigError: If it cannot be read.
    """
    try:
        secret = Path(file).expanduser().read_text(encoding="utf-8").strip()
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--webhook_secret={file}: {error}. Expected a file with whsec_ and base64, such as "
            "of: echo whsec_$(openssl rand -base64 24)"
        ) from error


def name_models(paths: list[str]) -> dict[str, str]:
    """Returns base models by the names that clients use.

    A path stands for itself, by the name of its folder; `name=path` gives another name; a folder
    that holds no model but folders of models stands for each of these. A repository id is its own
    name.

    Raises:
      ConfigError: If a folder holds no model, or two have one name.
    """
    found: dict[str, str] = {}
    problems = []
    for given in paths:
        name, equals, path = given.partition("=")
        path = path if equals else given
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
                problems.append(f"--models={given}: there is no folder {folder}.")
            entries = {name if equals else path: path}
        elif (folder / "config.json").is_file():
            entries = {name if equals else folder.name: str(folder.absolute())}
        else:
            inner = sorted(p.parent for p in folder.glob("*/config.json"))
            entries = {p.name: str(p.absolute()) for p in inner}
            if equals or not inner:
                problems.append(
                    f"--models={given}: {folder} has no config.json, "
                    + ("so one name cannot stand for it." if equals else "nor have its folders.")
                )
        for key, value in entries.items():
            if key.startswith("ft:") or ":" in key:
                problems.append(f"--models={given}: a name must not hold ':'; write name=path.")
            if found.setdefault(key, value) != value:
                problems.append(f"Two models are called {key}: {found[key]} and {value}.")
    if problems:
        raise ConfigError(problems)
    return found
