"""Executors: this machine, or the scheduler of a cluster, which run jobs."""

import importlib
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from jaxft.service.settings import Settings

EXECUTORS = {
    "local": "jaxft.service.executors.local",
    "slurm": "jaxft.service.executors.slurm",
    "jobset": "jaxft.service.executors.jobset",
}


class ExecutorError(Exception):
    """A scheduler that does not answer or does not take a job. The message is for its owner."""


class State(StrEnum):
    """The place of a launch in its life. How it ended, result.json in the workdir says."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A start of a job's run.

    Attributes:
      job: Id of the job.
      attempt: Number of the start; with the id it is the name of the launch.
      config: JSON config of the run.
      log: File that takes what the run prints.
      devices: Devices that it may see, such as `0,1`; empty: all.
      platform: Kind of these: `cpu`, `gpu` or `tpu`; empty if it is not known.
    """

    job: str
    attempt: int
    config: Path
    log: Path
    devices: str = ""
    platform: str = ""

    @property
    def name(self) -> str:
        """The name that schedulers know it by."""
        return f"{self.job}-{self.attempt}"

    @property
    def command(self) -> list[str]:
        """The command line of the run, which goes on from its checkpoint if it has one."""
        return [sys.executable, "-m", "jaxft", "train", f"--config={self.config}", "--resume"]


class Executor(Protocol):
    """Starts runs and knows what becomes of them. Every method may raise ExecutorError."""

    def submit(self, launch: Launch) -> str:
        """Starts a run; returns the handle that it is asked after by."""
        ...

    def find(self, launch: Launch) -> str | None:
        """Returns the handle of a launch that was submitted and not noted; None if it was not."""
        ...

    def state(self, handle: str) -> State:
        """Says where a launch is."""
        ...

    def stop(self, handle: str) -> None:
        """Asks a run to save and end, and ends it if it does not; one that has ended is no error.

        It may be called again and again until the run has ended.
        """
        ...


def make_executor(settings: Settings) -> Executor:
    """Returns the executor of a service; raises ConfigError for options that it has not."""
    return importlib.import_module(EXECUTORS[settings.executor]).make(settings)
