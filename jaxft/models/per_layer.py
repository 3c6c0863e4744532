"""Inputs that each layer has of its own beside the residual stream, as in Gemma 4 E2B and E4B."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.layers import Embedding, Linear, make_norm
from jaxft.models.module import Params, merge, split
from jaxft.models.nonlinearity import gelu_tanh
from jaxft.sharding.rules import constrain


class PerLayerInputs(nnx.Module):
    """Makes P numbers of a token for each layer, of its row in a table and of its embedding.

    Those of all layers are made at once, as in transformers: 35 x 256 numbers of a token in
    Gemma 4 E2B, where the residual stream has 1536. They stay until the layers have run backward.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        self.shape = config.layers, config.per_layer
        size = config.layers * config.per_layer
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.table = Embedding(config.vocab, size, **kwargs)
        self.projection = Linear((size,), (config.embed,), axes=("per_layer", "embed"), **kwargs)
        self.norm = make_norm(config, numerics, config.per_layer)

    def __call__(
        self, tokens: Int[Array, "B T"], start: Float[Array, "B T D"]
    ) -> Float[Array, "B T L P"]:
        """Returns what each layer reads of each token.

        Args:
          tokens: Ids.
          start: The residual stream that enters the first layer.
        """
        start, dtype = constrain(start, "batch", "seq", "act_embed"), start.dtype
        projected, found = (
            constrain(x, "batch", "seq", "act_per_layer").reshape(*tokens.shape, *self.shape)
            for x in (self.projection(start), self.table(tokens, dtype))
        )
        projected = self.norm(projected * jnp.asarray(start.shape[-1] ** -0.5, dtype))
        found = found * jnp.asarray(self.shape[-1] ** 0.5, dtype)
        return (projected + found) * jnp.asarray(2**-0.5, dtype)


def made_again(
    inputs: PerLayerInputs, tokens: Int[Array, "B T"], start: Float[Array, "B T D"], *, remat: str
) -> Float[Array, "B T L P"]:
    """Returns what `inputs` makes, whose own parts gradients make again unless `remat` is `none`.

    Kept, these would take three times as much memory as the inputs do.
    """
    graphdef, params = split(inputs)

    def made(params: Params, start: Float[Array, "B T D"]) -> Float[Array, "B T L P"]:
        return merge(graphdef, params)(tokens, start)

    return (made if remat == "none" else jax.checkpoint(made))(params, start)


class PerLayerPart(nnx.Module):
    """Makes what a layer adds of its own inputs, which the residual stream gates.

    Args:
      config: Sizes.
      numerics: Types.
      rngs: Random keys.
    """

    def __init__(self, config: DecoderConfig, numerics: Numerics, rngs: nnx.Rngs):
        d, p = config.embed, config.per_layer
        kwargs = {"dtype": numerics.param_dtype, "scale": config.init_scale, "rngs": rngs}
        self.gate = Linear((p,), (d,), axes=("per_layer", "embed"), **kwargs)
        self.out = Linear((d,), (p,), axes=("embed", "per_layer"), **kwargs)
        self.post_norm = make_norm(config, numerics, d)

    def __call__(
        self, x: Float[Array, "B T D"], own: Float[Array, "B T P"]
    ) -> Float[Array, "B T D"]:
        """Returns what is added to the residual stream."""
        gate = gelu_tanh(self.gate(constrain(x, "batch", "seq", "act_embed")))
        return self.post_norm(self.out(gate * own))
