"""Compiled programs added up."""

from jaxft.models.delta import SCOPE
from jaxft.planner.reading import Reading, step_time
from jaxft.planner.timeline import Loop, Span, Timeline
from jaxft.planner.topology import parse

RULE = f"jit(step)/transpose(jvp({SCOPE}))/while"


def test_what_the_delta_rule_takes_is_one_kind_of_work_whatever_the_core_does_for_it():
    chunk = Timeline(
        0.5,
        (
            Span("core", "matmul", 0.0, 0.2, "fusion.1", f"{RULE}/body/dot_general"),
            # The compiler's own operations have no origin.
            Span("core", "memory", 0.2, 0.1, "copy.2"),
            Span("core", "wait ici", 0.3, 0.2, "all-to-all.1"),
            Span("ici", "all-to-all", 0.0, 0.5, "all-to-all.1", RULE),
        ),
    )
    layer = Timeline(
        2.5,
        (
            Span("core", "matmul", 0.0, 0.4, "fusion.3", "jit(step)/jvp()/dot_general"),
            Span("core", "memory", 0.4, 0.1, "fusion.4", f"jit(step)/jvp({SCOPE})/mul"),
        ),
        (Loop(0.5, 4, chunk, RULE),),
    )
    step = Timeline(5.0, (), (Loop(0.0, 2, layer, "jit(step)/jvp()/while"),))
    reading = Reading(None, None, step, by_cycles=0.0, flops={}, bytes=0.0)  # pyright: ignore
    spent = step_time(reading, parse("v5e:2x2")).spent
    assert {kind: round(seconds, 9) for kind, seconds in spent.items()} == {
        "matmul": 0.8,
        "recurrence": 2 * 0.1 + 2 * 4 * 0.3,
        "wait ici": 2 * 4 * 0.2,
    }
    assert sum(spent.values()) == 5.0
