"""Splits the time of a step for a page."""

from dataclasses import dataclass

from jaxft.formatting import format_seconds
from jaxft.planner.page.parts import Share, shares
from jaxft.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class TimeBar:
    """The time of a step.

    Attributes:
      spent: The work and the waits of the core, most first; they add up to the step.
      needed: The time of each resource on its own; widths are relative to the longest.
    """

    spent: list[Share]
    needed: list[Share]


def time_of(plan: Plan) -> TimeBar | None:
    """Splits the time of a step; returns None if it is not known."""
    time = plan.time
    if time is None or not time.seconds:
        return None
    spent = dict(sorted(time.spent.items(), key=lambda item: -item[1]))
    longest = max(time.seconds, *time.terms.values(), 0.0)
    whole, form = time.seconds, format_seconds
    return TimeBar(
        spent=shares(spent, whole=whole, form=form),
        needed=shares(time.terms, whole=whole, form=form, width=longest),
    )
