"""The shape of a decoder, and the way it is computed."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxft.models.rope import Rope


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Differences between layers of one stack, whose parameters have the same shapes all the same.

    Attributes:
      window: Positions that a query sees back, its own included; 0 for all.
      rope: Rotation of queries and keys by their positions; None where there is none.
    """

    window: int = 0
    rope: Rope | None = None


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
    """

    count: int
    chosen: int
    normalised: bool


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
      norm: `rms`, `rms_offset` (the weight is added to 1) or `layer` (with a mean and a bias).
      attention_scale: Multiplies attention scores; 0 for 1 / sqrt(H).
      attention_cap: Soft bound of attention scores; 0 for none.
      logit_cap: Soft bound of logits; 0 for none.
      embed_scale: Multiplies token vectors.
      learned_positions: Whether a table of `max_length` vectors is added to token vectors.
      sinks: Whether each head has a learnt score that takes weight from every key.
      experts: None for a dense feed-forward part.
      mlp_limit: Bound of what enters the activation; 0 for none.
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
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    learned_positions: bool = False
    sinks: bool = False
    experts: ExpertsConfig | None = None
    mlp_limit: float = 0.0

    def scores(self, kind: LayerKind) -> Scoring:
        """Returns how a layer of this kind scores keys."""
        scale = self.attention_scale or self.head_dim**-0.5
        return Scoring(scale=scale, cap=self.attention_cap, window=kind.window)


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
