"""Where the time of a step goes, as a page shows it."""

from dataclasses import dataclass

from jaxft.formatting import format_seconds
from jaxft.planner.page.parts import Share, shares
from jaxft.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class TimeBar:
    """The time of a step.

    Attributes:
      spent: What the core does, most first; adds up to the step.
      needed: What each resource needs on its own, its width relative to the longest.
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
