"""Work on rows mapped over devices: each takes its rows, its heads and its part of a row."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxft.sharding.rules import Placement, active_placement, as_names, constrain, place
from jaxft.sharding.sequence import document_order, split_order


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Placement of the dimensions of queries; of keys and values too, as they come.

    Attributes:
      placement: Gives the mesh.
      spec: Mesh axes of B, T and N.
      axes: Mesh axes that T is split over, slowest first; none if devices hold whole rows.
    """

    placement: Placement = field(hash=False)
    spec: P
    axes: tuple[str, ...]

    @property
    def parts(self) -> int:
        """Devices that share a row."""
        return math.prod(self.placement.mesh.shape[axis] for axis in self.axes)

    @property
    def rows(self) -> P:
        """Placement of `[B, T, heads, H]`."""
        return self.spec

    @property
    def segments(self) -> P:
        """Placement of `[B, T]`."""
        return P(*self.spec[:2])

    @property
    def heads(self) -> P:
        """Placement of `[N]`."""
        return P(self.spec[2])

    def gather(self, x: Array) -> Array:
        """Returns `[B, T, …]` of a device's part in T, inside `shard_map`.

        The parts lie in the order of `Placement.slots`. The gradient leaves by a reduce-scatter; a
        constraint on whole arrays would make it an all-reduce of c times the bytes.
        """
        return jax.lax.all_gather(x, self.axes, axis=1, tiled=True) if self.axes else x


def split_rows(
    placement: Placement,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K U"],
) -> tuple[RowSplit, Array, Array]:
    """Returns how a placement splits rows, and keys and values that can be split likewise.

    Each device must hold the key heads that its query heads read: where there are too few key heads
    to split them as the query heads are split, there is one for each query head.
    """
    spec = placement.spec(("batch", "seq", "act_heads"), q.shape[:3], "queries")
    if spec != placement.spec(("batch", "seq", "act_kv_heads"), k.shape[:3], "keys"):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return RowSplit(placement, spec, placement.split("seq")), k, v


def head_shares(placement: Placement, heads: str, count: int) -> int:
    """Returns how many devices share some heads where each is to have whole rows of its own."""
    [entry] = placement.spec((heads,), (count,), "heads")
    split = math.prod(placement.mesh.shape[axis] for axis in as_names(entry))
    return split * placement.parts("seq")


def whole_rows(x: Array, heads: str = "") -> Array:
    """Returns rows that are split over devices whole and in their order.

    Devices that share a row exchange its parts for heads (Jacobs et al., arXiv:2309.14509). Nothing
    happens where rows are not split.

    Args:
      x: `[B, T, heads, …]`, or `[B, T]`, which every device gets.
      heads: Name of the third dimension.
    """
    placement = active_placement()
    if placement is None or not (over := placement.split("seq")):
        return x
    axes = ("batch", "seq", heads)[: 2 + bool(heads)]
    batch, _, *rest = placement.spec(axes, x.shape[: len(axes)], "an activation")
    shared = [(*as_names(entry), *over) for entry in rest]
    x = place(x, NamedSharding(placement.mesh, P(batch, None, *shared)))
    return document_order(x, placement.parts("seq"))


def parts_of_rows(x: Array, *axes: str) -> Array:
    """Undoes `whole_rows`.

    Args:
      x: `[B, T, heads, …]`.
      axes: Names of the dimensions behind T.
    """
    placement = active_placement()
    parts = placement.parts("seq") if placement is not None else 1
    return constrain(split_order(x, parts), "batch", "seq", *axes)
