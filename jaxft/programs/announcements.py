"""A training run's words about itself."""

from pathlib import Path

import jax

from jaxft import console, distributed
from jaxft.config import RunConfig
from jaxft.formatting import counted
from jaxft.hardware import huge_pages
from jaxft.reporting import goodput
from jaxft.training.program import Evaluator
from jaxft.workdir.checkpoint import Progress
from jaxft.workdir.workdir import Workdir, nearest_run


def say_start(config: RunConfig, evaluator: Evaluator, steps: int) -> None:
    """Says what trains on what."""
    mesh = evaluator.placement.mesh
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    hosts = f" of {distributed.count()} hosts" if distributed.count() > 1 else ""
    trained = evaluator.trained(config.optim.freeze)
    share = f", of which {trained:,} train" if trained < evaluator.parameters else ""
    console.log(
        f"{evaluator.parameters:,} parameters in {config.model.dtypes}{share}, strategy "
        f"{config.strategy} on {mesh.size} of {jax.device_count()} "
        f"{mesh.devices.flat[0].device_kind} devices{hosts} ({shape}), "
        f"attention {evaluator.attention.backend} ({evaluator.attention.reason}), "
        f"{counted(steps, 'step')}."
    )
    if mesh.devices.flat[0].platform == "cpu" and huge_pages.are_in_use():
        console.log(
            "Memory comes in huge pages, which makes steps faster here; "
            f"{huge_pages.VARIABLE}={huge_pages.SETTING}=0 keeps small ones."
        )


def say_anew(folder: Path) -> None:
    """Says that there is nothing to resume, and what may have been meant."""
    near = nearest_run(folder)
    hint = f" Did you mean --config.train.workdir={folder.parent / near}?" if near else ""
    console.log(f"There is no run in {folder} to resume: it starts anew.{hint}", style="yellow")


def say_finished(config: RunConfig, workdir: Workdir, step: int, reason: str) -> None:
    """Says that nothing of a run is left to do, and how it is made longer."""
    train = config.train
    if reason == "patience":
        evaluations = counted(config.eval.patience, "evaluation")
        ended = f"as {_stale(config)} in {evaluations}"
        longer = f"--config.eval.patience={2 * config.eval.patience}"
    elif train.steps:
        ended, longer = "", f"--config.train.steps={2 * max(step, train.steps)}"
    else:
        ended, longer = "", f"--config.train.epochs={2 * train.epochs:g}"
    console.log(
        f"Already finished: {workdir.path} ended at step {step}{ended and f', {ended}'}. Nothing "
        f"was changed. Make the run longer with {longer}, or name another folder with "
        "--config.train.workdir=…."
    )
    for change in workdir.changes:
        console.log(f"Not applied, as no step is left: {change}", style="yellow")


def _stale(config: RunConfig) -> str:
    """Says what did not happen to the figure that patience goes by."""
    change = config.eval.minimum_change
    by = f" by eval.minimum_change ({change:g})" if change else ""
    if config.eval.best == "answers":
        return f"the share of right answers did not rise{by}"
    return f"the validation loss did not fall{by}"


def say_end(
    config: RunConfig,
    counts: Progress,
    step: int,
    reason: str,
    workdir: Workdir,
    seconds: dict[str, float],
) -> None:
    """Says where the wall time went, how a run ended, and how it goes on."""
    console.log(goodput.line(seconds))
    if reason == "end":
        console.log(f"Done: {counted(step, 'step')}. Report: {workdir.report}")
    elif reason == "patience":
        console.log(
            f"Stopped at step {step}: {_stale(config)} in "
            f"{counted(counts.stale_evaluations, 'evaluation')}. "
            f"Report: {workdir.report}"
        )
    else:
        console.log(
            f"Stopped by {reason} after step {step}, which is saved. Continue with the same "
            "command and --resume."
        )
