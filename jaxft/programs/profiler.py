"""A few steps of a run under jax's profiler, and the operations that took longest in them."""

import contextlib
import socket
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions, StepTraceAnnotation

from jaxft import console, distributed
from jaxft.compiled.trace import Operation, operations
from jaxft.errors import ConfigError
from jaxft.files import write_json
from jaxft.formatting import counted
from jaxft.programs.session import Session
from jaxft.workdir.periods import Periods
from jaxft.workdir.workdir import Workdir

# Steps of a process before the traced ones: the first waits for data, and for what runs only once.
_BEFORE = 2
_SHOWN = 10


class Profiler:
    """Traces some steps of a run into its workdir; without any it does nothing.

    A loop calls `begin` before each step, runs it within `step` and calls `end` after it. The
    traced steps count for everything but the throughput. Of the processes of one machine the first
    traces its devices; the first of all writes the table. Use it as a context manager: a run that
    ends early ends its trace.

    Args:
      steps: Number of steps to trace; 0 for none.
      start: Steps done before this process.
      total: Steps of the run.
      resumed: Whether the process goes on with a run. Where too few steps are left then, it says so
        and traces none, so that a command that is started again does not fail for it.

    Raises:
      ConfigError: If `steps` is negative, or the run is too short for them.
    """

    def __init__(self, steps: int, *, start: int, total: int, resumed: bool):
        if steps < 0:
            raise ConfigError(f"profile is {steps}; it is the number of steps to trace, from 1 on.")
        self._first, self._last = start + _BEFORE + 1, start + _BEFORE + steps
        self._steps, self._running = steps, False
        if not steps or self._last <= total:
            return
        problem = (
            f"--profile={steps} traces steps {self._first} to {self._last}, and the run ends after "
            f"{counted(total, 'step')}."
        )
        if not resumed:
            raise ConfigError(
                f"{problem} Trace fewer, or make the run longer with --config.train.steps or "
                "--config.train.epochs."
            )
        console.log(f"{problem} None is traced.", style="yellow")
        self._steps = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._stop()
            console.log("The run ended within the traced steps: there is no table of operations.")

    def begin(self, done: int, session: Session, periods: Periods) -> None:
        """Starts the trace if `done` is its first step."""
        if not self._steps or done != self._first:
            return
        with session.paused(periods, "other"):
            periods.timed = False
            if distributed.is_first_on_machine():
                self._start(session.workdir)

    def step(self, done: int) -> contextlib.AbstractContextManager:
        """Marks a step in the trace."""
        return StepTraceAnnotation("train", step_num=done)

    def end(self, done: int, session: Session, periods: Periods, program: Any) -> None:
        """Ends the trace if `done` is its last step, and shows what took longest.

        Args:
          done: The step.
          session: The run.
          periods: What times it.
          program: The compiled step.
        """
        if not self._steps or done != self._last:
            return
        with session.paused(periods, "other"):
            traced = self._running and self._stop()
            periods.timed = True
            if traced and distributed.is_first():
                with console.phase("Reading the trace"):
                    trace = ProfileData.from_file(str(self._file(session.workdir)))
                    found = operations(trace, program.as_text())
                self._show(found, periods.untimed_seconds, session.workdir)

    def _start(self, workdir: Workdir) -> None:
        options = ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions slow the host down
        options.session_id = self._name
        try:
            jax.profiler.start_trace(workdir.profile, profiler_options=options)
        except (OSError, RuntimeError) as error:
            self._say_failed(error)
        else:
            self._running = True

    def _stop(self) -> bool:
        """Ends and writes the trace; returns whether that went well."""
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._say_failed(error)
            return False
        return True

    def _say_failed(self, error: Exception) -> None:
        text = " ".join(str(error).split())
        console.log(f"No trace, as the profiler failed ({text}); training goes on.", style="yellow")

    @property
    def _name(self) -> str:
        return f"steps_{self._first}_to_{self._last}"

    def _file(self, workdir: Workdir) -> Path:
        """Returns the trace of this machine, which others write theirs beside."""
        folder = workdir.profile / "plugins" / "profile" / self._name
        return folder / f"{socket.gethostname()}.xplane.pb"

    def _show(self, found: list[Operation], seconds: float, workdir: Workdir) -> None:
        """Logs the longest operations and writes them to the workdir."""
        rows = [
            {
                "name": operation.name,
                "what": operation.what,
                "calls": operation.calls,
                "milliseconds": 1e3 * operation.seconds,
                "share": operation.seconds / seconds,
            }
            for operation in found[:_SHOWN]
        ]
        file = workdir.profile / "operations.json"
        record = {
            "steps": [self._first, self._last],
            "step_milliseconds": 1e3 * seconds / self._steps,
            "operations": rows,
        }
        write_json(file, record)
        folder = workdir.profile
        console.log(
            "\n".join(
                [
                    f"Steps {self._first} to {self._last} were traced, "
                    f"{1e3 * seconds / self._steps:,.1f} ms each. What took longest on a device:",
                    *_lines(rows),
                    f"As JSON: {file}. Open the trace with 'xprof --logdir={folder}' or "
                    f"'tensorboard --logdir={folder}', after 'pip install xprof'.",
                ]
            )
        )


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the rows of the table below its header."""
    if not rows:
        return ["  the trace names none of the step's operations"]
    width = max(9, *(len(row["name"]) for row in rows))
    lines = [f"  {'operation':{width}}  {'calls':>7}  {'total ms':>10}  {'share':>7}  what it is"]
    for row in rows:
        share = f"{100 * row['share']:.1f} %"
        lines.append(
            f"  {row['name']:{width}}  {row['calls']:>7,.0f}  {row['milliseconds']:>10,.2f}  "
            f"{share:>7}  {row['what']}"
        )
    return lines
