"""Loops that may end early, whose compiled text says how often they run at most."""

import re
from collections.abc import Callable
from typing import Any

import jax

_AT_MOST = re.compile(r"at_most_(\d+)/while\"")


def loop_up_to(most: int, count: jax.Array, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Calls `body(index, carry) -> carry` for indices below `count`, which `most` bounds.

    It has no gradient of its own.
    """
    with jax.named_scope(f"at_most_{most}"):
        return jax.lax.fori_loop(0, count, body, carry)


def most_trips(text: str) -> int | None:
    """Returns the bound of a loop of `loop_up_to` from the text of its compiled instruction."""
    found = _AT_MOST.search(text)
    return int(found[1]) if found else None
