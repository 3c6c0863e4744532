"""The shape of a decoder, and the way it is computed."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxft.models.rope import QueryGrowth, Rope

LAYERS = "layers"
"""Path of the layers' parameters."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Differences between layers.

    Attributes:
      window: Positions that a query sees back, its own included; 0 for all.
      rope: Rotation of queries and keys by their positions; None where there is none.
      block: Name of the family's block, where layers have parameters of several shapes.
      recurrent: Whether the layer sees what is before a token through a state of fixed size, and
        not by attention.
      growth: Growth of queries with their position; all kinds of a model have one, or none has.
      kv_heads: K, where it is not the model's; else 0.
      head_dim: H, where it is not the model's; else 0.
      mlp: F, where it is not the model's; else 0.
      reads: Name of the block whose keys and values are read, those of the last layer of it before,
        where the layer makes none; else empty.
    """

    window: int = 0
    rope: Rope | None = None
    block: str = ""
    recurrent: bool = False
    growth: QueryGrowth | None = None
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    reads: str = ""


# Sizes that layers of a kind may have of their own.
_SIZES_OF_KIND = ("kv_heads", "head_dim", "mlp")


@dataclass(frozen=True, slots=True)
class Scoring:
    """The way from queries and keys to attention's weights.

    Attributes:
      scale: Multiplies the products.
      cap: Bounds them smoothly: `cap * tanh(score / cap)`; 0 for no bound.
      window: Positions that a query sees back, its own included; 0 for all.
    """

    scale: float
    cap: float = 0.0
    window: int = 0


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of the feed-forward part.

    Attributes:
      count: E, experts of a layer.
      chosen: Experts that a token goes through.
      normalised: Whether the weights of the chosen experts are scaled to a sum of 1.
      shared: Hidden width of an expert that every token goes through; 0 for none.
      scoring: Function that makes scores of the router's logits: `softmax` or `sigmoid`.
      corrected: Whether experts are chosen by scores to each of which a number is added that no
        gradient changes, and weighted without it.
      groups: Number of groups, of experts side by side, of which a token chooses some first.
      chosen_groups: Groups whose experts a token may choose.
      ranking: Best scores of a group by whose sum groups are chosen.
      scale: Multiplies the weights of the chosen experts.
    """

    count: int
    chosen: int
    normalised: bool
    shared: int = 0
    scoring: str = "softmax"
    corrected: bool = False
    groups: int = 1
    chosen_groups: int = 1
    ranking: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Sizes of layers with a gated delta rule.

    Attributes:
      key_heads: Heads of queries and keys.
      value_heads: Heads of values, as many of them for each key head.
      key_dim: Size of a head of queries and keys.
      value_dim: Size of a head of values.
      taps: Tokens that the convolution before the rule sees, the present one included.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Sizes of attention whose keys and values are made of one latent vector for all heads.

    Attributes:
      query_rank: Size of the latent that queries are made of; 0 where they are made of the stream.
      rank: R, size of the latent of keys and values.
      plain_dim: Dimensions of a head of queries and keys that are not turned.
      turned_dim: Dimensions behind them that are turned; of keys the same in all heads.
      value_dim: Size of a head of values.
      interleaved: Whether neighbours are the pairs of dimensions that are turned.
    """

    query_rank: int
    rank: int
    plain_dim: int
    turned_dim: int
    value_dim: int
    interleaved: bool


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder-only transformer.

    Attributes:
      vocab: V, rows of the embedding.
      embed: D, width of the residual stream.
      layers: L.
      heads: N, of queries.
      kv_heads: K, of keys and values.
      head_dim: H.
      mlp: F, hidden width of the feed-forward part, or of one expert.
      norm_epsilon: Added to the mean square (or variance) in norms.
      tied: Whether the head is the embedding.
      max_length: Positions that the model was made for.
      init_scale: Standard deviation of random weights.
      kinds: The different kinds of layer.
      pattern: Index of each layer's kind.
      norm: `rms`, `rms_offset` (the weight is added to 1), `rms_bare` (no weight), `layer` (with a
        mean and a bias) or `layer_unbiased` (without the bias).
      attention_bias: Whether queries, keys and values have biases, where files differ.
      qk_norm: Kind of norm of queries and keys, as of `SelfAttention`, where files differ.
      attention_scale: Multiplies attention scores; 0 for 1 / sqrt(H).
      attention_cap: Soft bound of attention scores; 0 for none.
      logit_cap: Soft bound of logits; 0 for none.
      logit_scale: Multiplies logits before they are bounded.
      embed_scale: Multiplies token vectors.
      embed_norm: Whether token vectors go through a norm.
      residual_scale: Multiplies what each part of a layer adds to the residual stream.
      parallel: Whether attention and feed-forward part of a layer read the same.
      learned_positions: Whether a table of `max_length` vectors is added to token vectors.
      sinks: Whether each head has a learnt score that takes weight from every key.
      experts: None for a dense feed-forward part.
      mlp_limit: Bound of what enters the activation; 0 for none.
      delta: Sizes of recurrent layers; None without them.
      latent: Sizes of attention to latents; None for keys and values of their own.
      dense_mlp: Hidden width of the feed-forward part of layers without experts, where others have
        them; 0 without such layers.
      guessing: Layers behind the last that files may hold, which guess further tokens; these are
        not trained, and go with the model.
      per_layer: P, inputs of each token that every layer has of its own; 0 for none.
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_epsilon: float
    tied: bool
    max_length: int
    init_scale: float
    kinds: tuple[LayerKind, ...]
    pattern: tuple[int, ...]
    norm: str = "rms"
    attention_bias: bool = False
    qk_norm: str = ""
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    embed_norm: bool = False
    residual_scale: float = 1.0
    parallel: bool = False
    learned_positions: bool = False
    sinks: bool = False
    experts: ExpertsConfig | None = None
    mlp_limit: float = 0.0
    delta: DeltaConfig | None = None
    latent: LatentConfig | None = None
    dense_mlp: int = 0
    guessing: int = 0
    per_layer: int = 0

    @property
    def blocks(self) -> tuple[str, ...]:
        """Name of each layer's block."""
        return tuple(self.kinds[index].block for index in self.pattern)

    @property
    def runs(self) -> tuple[tuple[range, ...], ...]:
        """The layers in runs in which a group of blocks recurs; see `runs_of`."""
        return runs_of(self.blocks)

    @property
    def parts(self) -> dict[str, range]:
        """Numbers of the layers whose parameters are stacked, by the path of the stack.

        Layers that are all alike are one part, `layers`; otherwise the first layer of each group
        is of the part `layers.0`, the second of `layers.1`, and so on through all runs.
        """
        parts = [part for run in self.runs for part in run]
        if len(parts) == 1:
            return {LAYERS: parts[0]}
        return {f"{LAYERS}.{number}": part for number, part in enumerate(parts)}

    @property
    def windows(self) -> tuple[int, ...]:
        """Window of each layer that has attention; 0 for none."""
        kinds = (self.kinds[index] for index in self.pattern)
        return tuple(kind.window for kind in kinds if not kind.recurrent)

    @property
    def value_dim(self) -> int:
        """Size of a head of values."""
        return self.head_dim if self.latent is None else self.latent.value_dim

    @property
    def sources(self) -> dict[int, int]:
        """Number of the layer whose keys and values is read, by that of each layer that reads some.

        It is the last one before of the block that the reading layer's kind names.
        """
        found, last = {}, {}
        for number, index in enumerate(self.pattern):
            kind = self.kinds[index]
            if kind.reads:
                found[number] = last[kind.reads]
            last[kind.block] = number
        return found

    @property
    def cached(self) -> int:
        """Numbers that all layers with attention keep of a token for generation."""
        if self.latent is not None:
            return len(self.windows) * (self.latent.rank + self.latent.turned_dim)
        kinds = [self.kinds[index] for index in self.pattern]
        keeping = [self.of_kind(k) for k in kinds if not (k.recurrent or k.reads)]
        return sum(2 * layer.kv_heads * layer.head_dim for layer in keeping)

    @property
    def states(self) -> int:
        """Numbers that all recurrent layers keep of a document."""
        d = self.delta
        recurrent = self.layers - len(self.windows)
        return recurrent * d.value_heads * d.key_dim * d.value_dim if d is not None else 0

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state in the place of keys and values."""
        return any(kind.recurrent for kind in self.kinds)

    def of_kind(self, kind: LayerKind) -> "DecoderConfig":
        """Returns the config as layers of a kind have it: with its heads and hidden width."""
        own = {name: getattr(kind, name) or getattr(self, name) for name in _SIZES_OF_KIND}
        return dataclasses.replace(self, **own)

    def of_block(self, block: str) -> "DecoderConfig":
        """Returns the config as layers of a block have it, whose kinds have the same sizes."""
        return self.of_kind(self.kind_of_block(block))

    def kind_of_block(self, block: str) -> LayerKind:
        """Returns the first kind of a block, whose kinds differ in windows and rotation alone."""
        return next(kind for kind in self.kinds if kind.block == block)

    @property
    def attending(self) -> tuple["DecoderConfig", ...]:
        """The config as each layer that has attention has it."""
        kinds = (self.kinds[index] for index in self.pattern)
        return tuple(self.of_kind(kind) for kind in kinds if not kind.recurrent)

    @property
    def head_dims(self) -> list[int]:
        """Sizes of a head of keys or values in the layers that have attention, each once."""
        return sorted({x for layer in self.attending for x in (layer.head_dim, layer.value_dim)})

    @property
    def mean_head_dim(self) -> float:
        """Size of a head of keys and of values, the mean of both and of layers with attention."""
        sizes = [size for layer in self.attending for size in (layer.head_dim, layer.value_dim)]
        return sum(sizes) / len(sizes)

    def kind_of(self, part: range) -> int | None:
        """Returns the index of the kind of all layers of a part; None if they differ."""
        kinds = {self.pattern[number] for number in part}
        return kinds.pop() if len(kinds) == 1 else None

    def scores(self, kind: LayerKind) -> Scoring:
        """Returns how a layer of this kind scores keys."""
        scale = self.attention_scale or self.head_dim**-0.5
        return Scoring(scale=scale, cap=self.attention_cap, window=kind.window)


@functools.cache
def runs_of(blocks: Sequence[str]) -> tuple[tuple[range, ...], ...]:
    """Cuts layers into runs in each of which a group of blocks recurs.

    Every part of a run, a range of layer numbers, is one place in the group, so that its layers
    have parameters of the same shapes. A group recurs as often as it can, and of the ways to cut
    that one is taken whose groups have the fewest layers in all: a program spells out these, and
    repeats each group in a loop.

    Args:
      blocks: Name of each layer's block.
    """
    best: list[tuple[int, tuple[tuple[range, ...], ...]]] = [(0, ())]
    for start in reversed(range(len(blocks))):
        left = len(blocks) - start
        ways = []
        for size in range(1, left + 1):
            group = blocks[start : start + size]
            turns = 1
            while blocks[start + turns * size : start + (turns + 1) * size] == group:
                turns += 1
            stop = start + turns * size
            cost, rest = best[len(blocks) - stop]
            run = tuple(range(first, stop, size) for first in range(start, start + size))
            ways.append((size + cost, (run, *rest)))
        best.append(min(ways, key=lambda way: (way[0], len(way[1]))))
    return best[-1][1]


@dataclass(frozen=True, slots=True)
class Numerics:
    """The way a model is computed; none of it changes what the model is.

    Attributes:
      param_dtype: Type in which parameters and optimizer state are kept.
      compute_dtype: Type of activations and of weights in matrix products. Norms, softmax, rotary
        angles, the router and the loss are float32 in every case.
      remat: See `config.ModelConfig.remat`.
      offload: See `config.ModelConfig.offload`.
      attention: Name of a back end in `models/attention.py`.
      expert_capacity: See `config.ModelConfig.expert_capacity`; 0 drops no token.
      matmul: See `config.ModelConfig.matmul`; empty for products in `compute_dtype`.
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    offload: str = ""
    attention: str = "xla"
    expert_capacity: float = 0.0
    matmul: str = ""


def make_numerics(dtypes: str, **settings: Any) -> Numerics:
    """Reads a dtype policy: `mixed`, `float32` or `bfloat16`; other settings as `Numerics`."""
    param = jnp.bfloat16 if dtypes == "bfloat16" else jnp.float32
    compute = jnp.float32 if dtypes == "float32" else jnp.bfloat16
    return Numerics(param, compute, **settings)
