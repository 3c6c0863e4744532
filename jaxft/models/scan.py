"""Layers in a scan over groups: what they hand on, and what they keep for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.models import activations
from jaxft.models.config import Numerics
from jaxft.models.layers import Routing

# Keys and values that layers behind read, by the block of the layer that made them.
Shared = dict[str, tuple[Array, Array]]


def in_turn(layers: Sequence[Callable], before: Shared) -> Callable:
    """Returns the body of a scan over groups of layers.

    Args:
      layers: Of a group.
      before: Keys and values of layers of other groups. Those that are made in these ones are
        handed on from group to group.
    """

    def group(
        carry: tuple[Array, Shared], scanned: Sequence[Any]
    ) -> tuple[tuple[Array, Shared], list[Routing]]:
        x, made = carry
        shared, routings = before | made, []
        for layer, of_layer in zip(layers, scanned, strict=True):
            x, shared, routing = layer(x, shared, of_layer)
            routings += [] if routing is None else [routing]
        return (x, {block: shared[block] for block in made}), routings

    return group


def of_layers(own: Float[Array, "B T L P"] | None, part: range) -> Float[Array, "l B T P"] | None:
    """Returns what the layers of a part read of tokens, a layer at a time."""
    if own is None:
        return None
    return jnp.moveaxis(own[:, :, part.start : part.stop : part.step], 2, 0)


def joined(routings: Sequence[Routing]) -> Routing | None:
    """Returns what the routers of all layers did as arrays with one axis of layers."""
    if len(routings) < 2:
        return routings[0] if routings else None
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *routings)


def rematerialised(layer: Callable, numerics: Numerics) -> Callable:
    """Wraps a scanned layer so that only what the settings name is kept for its backward pass."""
    policies = jax.checkpoint_policies
    kept = activations.kept(numerics.remat)
    offloaded = activations.offloaded(numerics.remat, numerics.offload)
    if numerics.remat == "none":
        return layer
    if numerics.remat == "dots":
        saved = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(activations.MLP, activations.PRODUCT),
        )
    elif offloaded:
        saved = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(kept - offloaded),
            names_which_can_be_offloaded=sorted(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        saved = policies.save_only_these_names(*sorted(kept))
    # Inside a scan nothing can merge the two passes, so the costly guard against it is not needed.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)
