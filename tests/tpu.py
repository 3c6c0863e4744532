"""TPU slices that are not there, which libtpu compiles for."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jaxft.planner.topology import parse

_HAS_LIBTPU = bool(os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"))


def compiles_for_tpu(test: Callable) -> Callable:
    """Marks a test that needs libtpu; it is skipped, with the reason, where that is missing."""
    marks = (
        pytest.mark.tpu_aot,
        pytest.mark.skipif(
            not _HAS_LIBTPU,
            reason="needs libtpu (pip install 'jax[tpu]'), or TPU_LIBRARY_PATH that names it",
        ),
        pytest.mark.filterwarnings("ignore"),  # libtpu warns that this machine has no TPU
    )
    for mark in marks:
        test = mark(test)
    return test


def tpu_devices(name: str, *, num_slices: int = 1) -> Sequence[Any]:
    """Returns the devices of a slice such as `v5e:2x2`, or of several."""
    return parse(f"{num_slices}x{name}").devices()
