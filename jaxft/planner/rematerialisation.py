"""The choice that `model.remat=auto` leaves open: what layers keep for their backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from jaxft.config import RunConfig
from jaxft.formatting import format_bytes
from jaxft.hardware.devices import room
from jaxft.planner.analytic import Estimator
from jaxft.planner.candidates import REMATS, with_flags
from jaxft.planner.placed import Placed
from jaxft.planner.topology import Topology


@dataclass(frozen=True, slots=True)
class Policy:
    """A setting of `model.remat`, and what a training step takes with it by estimate.

    Attributes:
      remat: The setting.
      bytes: Bytes of a device's memory.
      seconds: Time of a step; 0 where the chip's rates are not published.
    """

    remat: str
    bytes: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy that was chosen, and those to go on with if it does not fit when it is compiled.

    Attributes:
      order: Policies to try, each of less memory than the one before it.
      there: Bytes that a device has for them; 0 if it is not known.
      passed: The nearest policy that was not taken for lack of memory; None if there is none.
      begun: `model.remat` of the run that is resumed; empty for a new one.
    """

    order: tuple[Policy, ...]
    there: int
    passed: Policy | None = None
    begun: str = ""

    @property
    def remat(self) -> str:
        """The setting that was chosen."""
        return self.order[0].remat

    def __str__(self) -> str:
        first = self.order[0]
        size, there = format_bytes(first.bytes), format_bytes(self.there)
        of = f" of {there}" if self.there else ""
        if first.remat == self.begun:
            said = f"with which the run was begun, {size}{of} by estimate"
        elif not self.there:
            said = f"which takes least, {size} by estimate, as what a device has is not known"
        elif first.bytes > self.there:
            said = f"which takes least, {size} by estimate, though a device has {there}"
        else:
            said = f"{size}{of} by estimate"
        if self.passed is not None:
            of_run = ", with which the run was begun," * (self.passed.remat == self.begun)
            said += f"; {self.passed.remat}{of_run} would take {format_bytes(self.passed.bytes)}"
        return f"--config.model.remat=auto: {first.remat}, {said}."


def estimate_policies(
    config: RunConfig, estimator: Estimator, placed: Placed, *, remats: Sequence[str] = REMATS
) -> list[Policy]:
    """Returns what a run takes with each policy, the fastest first.

    On a chip whose rates are not published the one that keeps most comes first: it repeats least.

    Args:
      config: The run's.
      estimator: Of its model, on its devices.
      placed: The model where the run's strategy puts it.
      remats: Settings of `model.remat`, from most memory to least.
    """
    found = []
    for remat in remats:
        run = with_flags(config, {"model.remat": remat})
        if estimator.topology.chip.is_timed:
            estimate = estimator.estimate(run, placed)
            found.append(Policy(remat, estimate.bytes, estimate.seconds))
        else:
            found.append(Policy(remat, sum(estimator.memory(run, placed).values())))
    return sorted(found, key=lambda policy: policy.seconds)


def choose(
    policies: Sequence[Policy], free: int, *, begun: Policy | None = None, limit: int = 0
) -> Choice:
    """Chooses the fastest policy that fits by estimate, or the one of least memory if none does.

    Args:
      policies: From `estimate_policies`.
      free: Bytes of a device that nothing uses; 0 if it is not known.
      begun: The policy of the run that is resumed, which is kept if it fits into `limit`.
      limit: Bytes of a device in all; 0 if it is not known.
    """
    if begun is not None and (not limit or begun.bytes <= limit):
        return Choice(_down_from(begun, policies), limit, begun=begun.remat)
    fitting = [policy for policy in policies if policy.bytes <= free]
    first = fitting[0] if fitting else min(policies, key=lambda policy: policy.bytes)
    ahead = policies[: policies.index(first)]
    passed = ahead[-1] if ahead and fitting else None
    if begun is not None and begun.remat != first.remat:
        passed = begun
    return Choice(_down_from(first, policies), free, passed, begun.remat if begun else "")


def _down_from(first: Policy, policies: Sequence[Policy]) -> tuple[Policy, ...]:
    """Returns a policy, then again and again the fastest of those that take less."""
    order = [first]
    while less := [policy for policy in policies if policy.bytes < order[-1].bytes]:
        order.append(less[0])
    return tuple(order)


def memory_of_device(topology: Topology) -> int:
    """Returns the bytes that a program can have on a device; 0 if it is not known."""
    return room(jax.local_devices()).limit if topology.local else topology.chip.core.limit
