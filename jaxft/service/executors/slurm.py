"""Jobs on a SLURM cluster: submitted with sbatch, followed with squeue, ended with scancel.

The service runs where `sbatch` works, such as on a login node. Its workdir, the models and Python
lie on a file system that all nodes see under the same paths. Accounting is not needed: SLURM says
only whether a job is there still, and the run's own `result.json` how it ended.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxft.errors import ConfigError
from jaxft.service.executors import ExecutorError, Launch, State
from jaxft.service.executors.listing import Listing
from jaxft.service.settings import Settings

# What squeue calls the state of a job. One that is completing runs its last processes still; one
# that was preempted and queued again is pending.
_WORDS = {
    State.WAITING: """PENDING CONFIGURING SUSPENDED REQUEUED REQUEUE_HOLD REQUEUE_FED RESV_DEL_HOLD
        SPECIAL_EXIT""",
    State.RUNNING: "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED",
    State.ENDED: """BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED
        REVOKED TIMEOUT""",
}
_STATES = {word: state for state, words in _WORDS.items() for word in words.split()}
_DURATION = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")

# Options of sbatch that would take a job from under its name, its log or its place in the queue.
_OURS = """array batch chdir clusters dependency error export-file input job-name open-mode output
    parsable test-only wait wrap""".split()

_SCRIPT = "launch/slurm.sbatch"
_GRACE = 10  # minutes

# Seconds after which a program of SLURM counts as unanswered; they wait for slurmctld themselves.
_PATIENCE = 30


def make(settings: Settings) -> "Slurm":
    """Returns the executor of a service."""
    return Slurm.from_options(settings.executor_options)


class Slurm:
    """A SLURM cluster. Jobs have the name of their launch, by which they are found again.

    Args:
      options: Options of sbatch, each as `--name=value`; they come before those of the script.
      script: Batch script that runs the command after `--` on all nodes of its job.
      grace: Minutes that a run has to save and end when it is asked to; then SLURM ends it.
    """

    def __init__(self, options: Sequence[str], script: Path, *, grace: int = _GRACE):
        self._options, self._script, self._grace = options, script, grace
        self._queue = Listing(_read_queue)
        self._asked: set[str] = set()  # numbers of jobs whose runs got SIGTERM

    @classmethod
    def from_options(cls, options: Sequence[str]) -> "Slurm":
        """Returns a cluster by its options: `script=FILE`, `grace=MINUTES`, or those of sbatch.

        Raises:
          ConfigError: For options that cannot be passed on, for a script that is not there, and
            where SLURM's programs are missing.
        """
        passed = [option for option in options if option.startswith("-")]
        own = {o.partition("=")[0]: o.partition("=")[2] for o in options if o not in passed}
        script = Path(own.pop("script", _SCRIPT)).expanduser().absolute()
        grace = own.pop("grace", str(_GRACE))
        problems = [_problem(option) for option in passed]
        problems += [
            f"{name!r} is no option of the SLURM executor: script=FILE, grace=MINUTES, or options "
            "of sbatch as --name=value."
            for name in own
        ]
        if not re.fullmatch(r"[1-9]\d*", grace):
            problems.append(f"grace={grace} is no whole number of minutes above 0.")
        if not script.is_file():
            problems.append(
                f"There is no batch script {script}. Start the service in the folder that holds "
                "launch/, or name a copy: script=FILE."
            )
        problems += [
            f"There is no {name} on the PATH. The service runs where jobs are submitted, such as "
            "on a login node."
            for name in ("sbatch", "squeue", "scancel", "scontrol")
            if not shutil.which(name)
        ]
        if problems := [problem for problem in problems if problem]:
            raise ConfigError(problems)
        return cls(passed, script, grace=int(grace))

    def submit(self, launch: Launch) -> str:
        """Submits a launch; returns its name.

        Should two submissions arrive, as when a worker is killed in between, the second job waits
        for the first to end, and finds that there is nothing left to do.
        """
        # In the pattern that --output is, only %% stands for itself.
        log = str(launch.log.absolute()).replace("%", "%%")
        ours = [f"--job-name={launch.name}", "--dependency=singleton", f"--output={log}"]
        command = ["--open-mode=append", "--parsable", str(self._script), "--", *launch.command]
        _run("sbatch", *self._options, *ours, *command, folder=launch.config.parent)
        self._queue.forget()
        return launch.name

    def find(self, launch: Launch) -> str | None:
        """Returns the name of a launch that SLURM knows, also minutes after its end."""
        return launch.name if launch.name in self._queue.new() else None

    def state(self, handle: str) -> State:
        """Returns the state of a launch; one that SLURM has forgotten has ended."""
        states = {job.state for job in self._queue.recent().get(handle, [])}
        return next((s for s in (State.RUNNING, State.WAITING) if s in states), State.ENDED)

    def stop(self, handle: str) -> None:
        """Lowers the time limit of a job and sends its run SIGTERM; takes one that waits away.

        When the limit is reached SLURM sends SIGTERM once more, and SIGKILL after its `KillWait`.
        """
        for job in self._queue.recent().get(handle, []):
            try:
                self._end(job)
            except ExecutorError:
                # One that has ended meanwhile refuses.
                now = {one.number: one for one in self._queue.new().get(handle, [])}
                if job.number in now and now[job.number].can_be_asked:
                    raise

    def _end(self, job: "_Job") -> None:
        if job.state is State.WAITING:
            _run("scancel", job.number)
            self._queue.forget()
        if job.state is not State.RUNNING or not job.can_be_asked or job.number in self._asked:
            return
        try:
            if job.left > self._grace + 1:
                limit = f"TimeLimit={math.ceil(job.used) + self._grace}"
                _run("scontrol", "update", f"JobId={job.number}", limit)
        finally:
            # Steps alone get it: the script goes on to wait for them. Once, as a run that has saved
            # and writes its report does not wait for a second.
            _run("scancel", "--ctld", "--signal=TERM", job.number)
            self._asked.add(job.number)


@dataclass(frozen=True)
class _Job:
    """A job in SLURM's queue, with the minutes that it has run and that its limit leaves it."""

    number: str
    word: str
    used: float
    left: float

    @property
    def state(self) -> State:
        """The state of the launch."""
        if self.word not in _STATES:
            raise ExecutorError(f"squeue calls job {self.number} {self.word}: an unknown state.")
        return _STATES[self.word]

    @property
    def can_be_asked(self) -> bool:
        """Whether it has not ended and is not being ended, which nothing more can be asked of."""
        return self.state is not State.ENDED and self.word != "COMPLETING"


def _read_queue() -> dict[str, list[_Job]]:
    """Returns our jobs by their names, with those that ended minutes ago (MinJobAge)."""
    printed = _run("squeue", "--me", "--states=all", "--noheader", "--format=%A|%T|%M|%L|%j")
    # With SLURM_CLUSTERS the name of the cluster stands above them all the same.
    lines = [line.split("|", 4) for line in printed.splitlines() if line.count("|") >= 4]
    jobs: dict[str, list[_Job]] = {}
    for number, word, used, left, name in lines:
        jobs.setdefault(name, []).append(_Job(number, word, _minutes(used), _minutes(left)))
    return jobs


def _minutes(text: str) -> float:
    """Returns the minutes of `[[DAYS-]HOURS:]MINUTES:SECONDS`; INVALID, past a limit, is 0."""
    if text in ("UNLIMITED", "NOT_SET"):
        return math.inf
    parts = found.groups() if (found := _DURATION.fullmatch(text)) else ("0",) * 4
    days, hours, minutes, seconds = (int(part or 0) for part in parts)
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def _run(program: str, *arguments: str, folder: Path | None = None) -> str:
    """Returns what a program of SLURM prints; raises ExecutorError where it fails."""
    # A person's defaults for squeue would hide jobs from us.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            [program, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise ExecutorError(f"{program} got no answer from SLURM in {_PATIENCE} s.") from None
    except OSError as error:
        raise ExecutorError(f"{program} cannot be started: {error}.") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise ExecutorError(f"{program} failed: {said}")
    return done.stdout


def _problem(option: str) -> str:
    """Says why an option cannot be passed on to sbatch; empty if it can."""
    name = option.removeprefix("--").partition("=")[0]
    if not re.fullmatch(r"--[a-z][-a-z]*(=.*)?", option):
        return f"{option!r}: write options of sbatch as --name=value, such as --partition=gpu."
    if name in _OURS:
        return f"--{name} is the service's own: it names, logs and queues the jobs."
    return ""
