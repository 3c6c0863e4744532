"""result.json: how a run ended, for whoever started it and does not watch it."""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from jaxft.errors import JaxftError
from jaxft.files import finite, write_json
from jaxft.workdir.workdir import Workdir


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The end of a run.

    Attributes:
      workdir: Folder of the run.
      checkpoint: Newest checkpoint.
      step: Optimizer steps done.
      reason: `end`, `patience` (no improvement), or the name of the signal that stopped it.
      best_loss: Lowest validation loss; infinite without validation data.
      tokens: Tokens read, of all parts of the run, padding left out.
      trained_tokens: Tokens among them that carried loss.
    """

    workdir: Path
    checkpoint: Path
    step: int
    reason: str
    best_loss: float
    tokens: int = 0
    trained_tokens: int = 0

    @property
    def status(self) -> str:
        """`succeeded` at the end, early or not; `stopped` for what `--resume` continues."""
        return "succeeded" if self.reason in ("end", "patience") else "stopped"

    @property
    def exit_code(self) -> int:
        """Status that a program ends with, so that what comes next sees a run that is to go on.

        0 at the end, early or not; as in a shell 130 after Ctrl-C and 143 after SIGTERM.
        """
        return 0 if self.status == "succeeded" else 128 + Signals[self.reason]


@contextlib.contextmanager
def recorded(
    workdir: Workdir, *, writes: bool, existed: bool
) -> Iterator[Callable[[TrainResult], None]]:
    """Writes result.json when the block ends; without one a run is under way, or was killed.

    The object has `status` (`succeeded`, `stopped`, `failed`), `reason` (that of a `TrainResult`,
    or the class of the error), `step`, `checkpoint` (a path in the workdir), `best_loss`, `tokens`,
    `trained_tokens` (all null after a failure), `problems` (texts of the error) and `time`.

    Args:
      workdir: Of the run.
      writes: Whether this process is the one that writes.
      existed: Whether the folder was there before. A start that is refused leaves none behind that
        it made itself, and no file in it.

    Yields:
      What the block calls with its end.
    """
    found: list[TrainResult] = []
    if writes:
        workdir.result.unlink(missing_ok=True)

    def write(**values: Any) -> None:
        if writes and (existed or workdir.config.is_file()):
            _write(workdir, **values)

    try:
        yield found.append
    except KeyboardInterrupt:
        write(status="stopped", reason="KeyboardInterrupt")
        raise
    except Exception as error:
        problems = error.problems if isinstance(error, JaxftError) else [str(error)]
        kind = type(error).__name__
        write(status="failed", reason=kind, problems=problems)
        raise
    for result in found:
        write(
            status=result.status,
            reason=result.reason,
            step=result.step,
            checkpoint=f"checkpoints/{result.step}",
            best_loss=finite(result.best_loss),
            tokens=result.tokens,
            trained_tokens=result.trained_tokens,
        )


def _write(workdir: Workdir, **values: Any) -> None:
    unknown = dict.fromkeys(("step", "checkpoint", "best_loss", "tokens", "trained_tokens"))
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(workdir.result, {**unknown, "problems": [], **values, "time": time})
