"""The figures of a run's log steps, and the files and services they go to."""

import importlib
import importlib.util
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import jax
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxft import distributed
from jaxft.errors import ConfigError
from jaxft.files import append_bytes, append_jsonl, read_jsonl, rewrite_jsonl
from jaxft.hardware.devices import device_memory, host_memory
from jaxft.training.flops import TrainingFlops
from jaxft.workdir.periods import Period
from jaxft.workdir.workdir import Workdir


def train_record(
    period: Period,
    *,
    tokens: int,
    trained_tokens: int,
    seconds: float,
    flops: TrainingFlops | None = None,
    peak_flops: float | None = None,
) -> dict[str, Any]:
    """Returns the object that a log step writes to metrics.jsonl.

    Args:
      period: What happened since the last record.
      tokens: So far, over the whole run, resumed parts included.
      trained_tokens: So far.
      seconds: Wall time of training so far, steps that are not timed left out.
      flops: Operations of the period's timed steps; None if unknown.
      peak_flops: FLOP/s of all devices together; None leaves `mfu` and `mfu_full` out.
    """
    sums, figures = period.sums, period.sums.figures()
    record: dict[str, Any] = {
        "step": period.step,
        "loss": figures.pop("loss"),
        "learning_rate": period.latest["learning_rate"],
        "grad_norm": period.latest["grad_norm"],
        "tokens": int(tokens),
        "trained_tokens": int(trained_tokens),
        "tokens_per_second": _ratio(sums.timed("tokens"), sums.seconds),
        "seconds": float(seconds),
    }
    if peak_flops and flops:
        available = peak_flops * sums.seconds
        record["mfu"] = _ratio(flops.causal, available)
        record["mfu_full"] = _ratio(flops.full, available)
    return record | _memory_record() | figures


def require_wandb(project: str) -> None:
    """Checks before anything slow starts that wandb can be used if it is asked for.

    Raises:
      ConfigError: If `project` is set and wandb is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb is {project!r}, but wandb is not installed. Install it with "
            "'pip install wandb', or leave train.wandb empty."
        )


class MetricsWriter:
    """Writes records to the workdir's JSON lines, to TensorBoard and, where asked for, to wandb.

    A run that resumes at `start_step` takes back what its predecessor wrote after that step, so
    each file has one line per log step. Every process of a run has a writer; that of the first
    one writes.
    """

    def __init__(self, workdir: Workdir, *, start_step: int, wandb_project: str = ""):
        self._workdir, self._writes, self._wandb = workdir, distributed.is_first(), None
        if not self._writes:
            return
        require_wandb(wandb_project)
        for path in (workdir.metrics, workdir.evaluations, workdir.samples):
            if path.exists():
                rewrite_jsonl(path, [r for r in read_jsonl(path) if _step(r) <= start_step])
        self._events = _EventFile(workdir.events, purge_step=start_step + 1)
        self._wandb = _start_wandb(workdir, wandb_project) if wandb_project else None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: dict[str, Any]) -> None:
        """Writes a `train_record`."""
        if not self._writes:
            return
        append_jsonl(self._workdir.metrics, record)
        self._publish("train", record)

    def write_eval(self, record: dict[str, Any]) -> None:
        """Writes the figures of one evaluation of one data set, named by `record["dataset"]`."""
        if not self._writes:
            return
        append_jsonl(self._workdir.evaluations, record)
        self._publish(f"eval/{record.get('dataset', 'validation')}", record)

    def write_sample(self, record: dict[str, Any]) -> None:
        """Writes an answer: `step`, `prompt`, `output` and `reference` (a text or None)."""
        if self._writes:
            append_jsonl(self._workdir.samples, record)

    def write_goodput(self, record: dict[str, Any]) -> None:
        """Writes a `goodput_record`; those of earlier parts of the run stay."""
        if self._writes:
            append_jsonl(self._workdir.goodput, record)

    def close(self) -> None:
        """Ends the part of the run at wandb; the writer cannot be used after it."""
        if self._wandb is not None:
            self._wandb.finish()

    def _publish(self, group: str, record: dict[str, Any]) -> None:
        scalars = {f"{group}/{name}": value for name, value in _scalars(record)}
        self._events.write(scalars, step=record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])


class _EventFile:
    """A TensorBoard event file. Unlike tensorboardX's writer it has no thread that could fail."""

    def __init__(self, folder: Path, *, purge_step: int):
        folder.mkdir(exist_ok=True)
        # The time tells the parts of a resumed run apart; TensorBoard asks for "tfevents".
        self._path = folder / f"events.out.tfevents.{time.time():.6f}"
        self._append(file_version="brain.Event:2")
        if purge_step:
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore
            self._append(step=purge_step, session_log=log)

    def write(self, scalars: dict[str, float], *, step: int) -> None:
        summary = summary_pb2.Summary()  # pyright: ignore
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=value)
        self._append(step=step, summary=summary)

    def _append(self, **fields: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()  # pyright: ignore
        length = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        append_bytes(self._path, length + checks[0] + data + checks[1])


def _ratio(numerator: float, denominator: float) -> float:
    """Returns NaN if nothing was timed."""
    return float(numerator) / float(denominator) if numerator and denominator else float("nan")


def _memory_record() -> dict[str, int]:
    """Returns host memory, and that of the fullest of this host's devices."""
    host = host_memory()
    record = {"host_memory": host.resident, "host_memory_peak": host.peak}
    uses = [use for use in map(device_memory, jax.local_devices()) if use is not None]
    if uses:
        record["device_memory"] = max(use.in_use for use in uses)
        record["device_memory_peak"] = max(use.peak for use in uses)
    return record


def _step(record: dict[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


def _scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns the finite figures; of a figure with an interval, its value."""
    pairs = []
    for name, value in record.items():
        number = value.get("value") if isinstance(value, dict) else value
        if name != "step" and isinstance(number, int | float) and math.isfinite(number):
            pairs.append((name, number))
    return pairs


def _start_wandb(workdir: Workdir, project: str) -> Any:
    wandb = importlib.import_module("wandb")
    config = json.loads(workdir.config.read_text(encoding="utf-8"))
    return wandb.init(
        project=project,
        group=workdir.name(config),  # the parts of a resumed run stand together
        dir=str(workdir.path),
        config=config,
    )
