"""TPU slices that are not there, which libtpu compiles for."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest

_HAS_LIBTPU = bool(os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"))


def compiles_for_tpu(test: Callable) -> Callable:
    """Marks a test that needs libtpu, which one process at a time can use."""
    marks = (
        pytest.mark.tpu_aot,
        pytest.mark.skipif(
            not _HAS_LIBTPU, reason="needs libtpu, or TPU_LIBRARY_PATH that names it"
        ),
        pytest.mark.filterwarnings("ignore"),  # libtpu warns that this machine has no TPU
    )
    for mark in marks:
        test = mark(test)
    return test


def tpu_devices(name: str, **options: Any) -> Sequence[Any]:
    """Returns the devices of a slice such as `v5e:2x2`, or of several with `num_slices`."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
