"""The names of array dimensions, and the shape letters used in signatures and layouts.

Weights and activations have different names, so that a strategy can place them differently.
"""

from typing import NamedTuple

from jaxft.errors import ConfigError, nearest

# letter: B batch, T query length, S key length, D embed, N query heads, K key/value heads,
# H head size, U head size of values where it is another, F mlp, V vocabulary, L layers, E experts,
# P inputs of one layer, R latent, W taps.
WEIGHT_AXES = {
    "layers": "L, the stacked layers; `lax.scan` runs over it",
    "embed": "D, the residual stream's width",
    "heads": "N, query heads",
    "kv_heads": "K, key and value heads",
    "head_dim": "H, size of one head",
    "mlp": "F, hidden width of the feed-forward part",
    "vocab": "V, rows of the embedding and of the head",
    "positions": "rows of a table of learnt positions",
    "latent": "R, inputs of what is made of a latent; split as `embed` is",
    "to_latent": "R, outputs of what makes a latent: named apart, as its inputs are `embed`",
    "per_layer": "P, inputs that a layer has of its own, of one or of all layers; never split",
    "taps": "W, tokens that a short convolution sees; never split",
    "experts": "E, experts of a layer",
    "router": "E, outputs of the router: small, so named apart from `experts`",
    "rank": "r, between the two matrices of an adapter; never split",
    "rows": "rows of a table that are learnt apart; few, never split",
    "norm": "D, scale of a normalisation: small, so named apart from `embed`",
}
ACTIVATION_AXES = {
    "batch": "B, rows",
    "seq": "T, positions",
    "stream_seq": "T of the residual stream between the parts of layers",
    "key_seq": "T of keys and values as attention reads them",
    "act_embed": "D of the residual stream",
    "act_heads": "N of queries and attention output",
    "act_kv_heads": "K of keys and values",
    "act_head_dim": "H of queries, keys and values",
    "act_latent": "R of latents",
    "act_mlp": "F of the hidden feed-forward activation",
    "act_per_layer": "P of inputs that layers have of their own",
    "act_vocab": "V of logits",
    "act_experts": "E of experts and their tokens where they meet",
    "turns": "inputs that a stage of a pipeline keeps; never split",
    "act_router": "E of the router's scores",
    "act_rank": "r of what an adapter's first matrix makes",
}
AXES = {**WEIGHT_AXES, **ACTIVATION_AXES}
# The dimension of an activation that a dimension of a weight is multiplied with, or makes.
ACTIVATION_OF = {
    "embed": "act_embed",
    "heads": "act_heads",
    "kv_heads": "act_kv_heads",
    "head_dim": "act_head_dim",
    "latent": "act_latent",
    "to_latent": "act_latent",
    "mlp": "act_mlp",
    "per_layer": "act_per_layer",
    "vocab": "act_vocab",
    "experts": "act_experts",
    "router": "act_router",
    "rank": "act_rank",
}


class Dimensions(NamedTuple):
    """Numbers of dimensions of a weight by kind, in their order.

    Attributes:
      lead: Number of dimensions that stack weights: layers, and experts.
      outputs: Number of those that a product makes, or that a vector has.
      inputs: Number of those that a product sums over; 0 of a vector, such as a norm's scale, and
        of a convolution of single channels.
    """

    lead: int
    outputs: int
    inputs: int


def dimensions(axes: tuple[str, ...]) -> Dimensions:
    """Returns what the dimensions of a weight are, `[lead…, *outputs, *inputs]`."""
    lead = 0
    while lead < len(axes) - 1 and axes[lead] in ("layers", "experts"):
        lead += 1
    own = tuple(name for name in axes[lead:] if name != "taps")
    outputs = 2 if own[1:2] == ("head_dim",) else 1  # heads and their size are one
    return Dimensions(lead, outputs, len(own) - outputs)


def check_axes(names: tuple[str, ...], where: str) -> None:
    """Raises ConfigError if a name is not a known axis, with the nearest known one."""
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ConfigError([f"{where}: unknown axis {n!r}.{nearest(n, AXES)}" for n in unknown])
