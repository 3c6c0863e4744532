"""`model.remat=auto` in a training run: chosen before data is read, held to what is compiled."""

from typing import Any

import jax

from jaxft import console, distributed
from jaxft.config import RunConfig
from jaxft.hardware.devices import shortage
from jaxft.models.activations import AUTO
from jaxft.models.families import Architecture
from jaxft.programs import capacity
from jaxft.programs.estimates import Estimates
from jaxft.training.program import Program, build
from jaxft.workdir.workdir import Workdir


def settle(
    config: RunConfig, architecture: Architecture, workdir: Workdir, *, start: int
) -> list[str]:
    """Puts a policy in the place of `model.remat=auto`, the same on every host, and says which.

    A run that is resumed keeps the policy that its config.json names.

    Args:
      config: The run's; it is changed.
      architecture: Of the model.
      workdir: The run's folder.
      start: Step that the run goes on from; 0 if it starts.

    Returns:
      Policies to go on with, one after the other, if it does not fit when it is compiled; none
      where the config names one.

    Raises:
      ConfigError: If the run cannot be placed on the devices.
    """
    if config.model.remat != AUTO:
        return []
    found = capacity.here(config)
    limits, free = zip(*distributed.from_all("memory", [found.limit, found.free]), strict=True)
    found = found._replace(limit=min(limits), free=min(free))

    def order() -> list[str]:
        begun = workdir.recorded("model.remat") if start else ""
        choice = Estimates(architecture).choose_remat(config, found, begun=begun)
        console.log(str(choice))
        return [policy.remat for policy in choice.order]

    config.model.remat, *left = distributed.from_first("model.remat", order)
    return left


def compile_step(
    config: RunConfig, program: Program, left: list[str], *, steps: int
) -> tuple[Program, Any]:
    """Compiles the training step, if it does not fit with the next policy, on every host alike.

    Args:
      config: The run's; its `model.remat` is changed to what fits.
      program: With the policy of the config.
      left: From `settle`.
      steps: Optimizer steps of the whole run.

    Returns:
      The program, and its compiled step.

    Raises:
      OutOfMemoryError: If it fits with none of them.
    """
    for remat in left:
        step, reason = _try(config, program)
        if distributed.everywhere("the step fits", not reason):
            return program, step
        console.log(
            f"--config.model.remat=auto: {config.model.remat} does not fit, "
            f"{reason or 'on another host'}; {remat} is compiled in its place."
        )
        config.model.remat = remat
        program = build(config, program.evaluator, steps=steps)
    with console.phase("Compiling the training step"):
        step = program.compile()
    capacity.check_compiled(capacity.TRAINING, config, program.evaluator.architecture, step)
    return program, step


def _try(config: RunConfig, program: Program) -> tuple[Any, str]:
    """Returns a compiled step, and why it does not fit; the compiler for TPU says so by itself."""
    try:
        with console.phase("Compiling the training step"):
            step = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if said := shortage(error):
            return None, said.rstrip(".")
        raise
    return step, capacity.misfit(config, step)
