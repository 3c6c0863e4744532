"""Numbers of fewer bits than a byte, which files of arrays do not have: a byte for each there."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def widened(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arrays, real or abstract, as they are written."""
    return {path: _as(x, _on_disk(x.dtype)) for path, x in arrays.items()}


def asked(wanted: Mapping[str, Any]) -> ocp.args.StandardRestore:
    """Returns what reads the arrays that `narrowed` takes."""
    return ocp.args.StandardRestore(widened(wanted))


def narrowed(arrays: Mapping[str, jax.Array], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns arrays that were read in the types of others."""
    return {path: _as(x, wanted[path].dtype) for path, x in arrays.items()}


def _on_disk(dtype: Any) -> Any:
    if jax.dtypes.itemsize_bits(dtype) >= 8:
        return dtype
    return jnp.uint8 if np.dtype(dtype).name.startswith("u") else jnp.int8


def _as(x: Any, dtype: Any) -> Any:
    if x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)
