"""What a decoder is made of, and how it is computed."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv:2306.15595): frequencies over `factor`."""

    factor: float

    def __call__(self, frequencies: Array) -> Array:
        """Returns the changed frequencies."""
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's change of rotary frequencies, as its model card and reference code define it.

    Frequencies with wavelengths over `original_length / low_factor` are divided by `factor`, those
    under `original_length / high_factor` are kept, and between them it is interpolated.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int

    def __call__(self, frequencies: Array) -> Array:
        """Returns the changed frequencies."""
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = (turns - self.low_factor) / (self.high_factor - self.low_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return frequencies * keep + frequencies / self.factor * (1 - keep)


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shape of a decoder-only transformer."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: LinearScaling | Llama3Scaling | None
    tied: bool
    max_length: int
    init_scale: float


@dataclass(frozen=True, slots=True)
class Numerics:
    """How a model is computed; none of it changes what the model is.

    Attributes:
      param_dtype: Type in which parameters and optimizer state are kept.
      compute_dtype: Type of activations and of weights in matrix products. Norms, softmax, rotary
        angles and the loss are float32 in every case.
      remat: `none`, `dots` or `full`; see `config.ModelConfig.remat`.
      attention: Name of a back end in `models/attention.py`.
    """

    param_dtype: Any = jnp.float32
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"


def make_numerics(dtypes: str, *, remat: str = "none", attention: str = "xla") -> Numerics:
    """Reads a dtype policy: `mixed`, `float32` or `bfloat16`."""
    param = jnp.bfloat16 if dtypes == "bfloat16" else jnp.float32
    compute = jnp.float32 if dtypes == "float32" else jnp.bfloat16
    return Numerics(param_dtype=param, compute_dtype=compute, remat=remat, attention=attention)
