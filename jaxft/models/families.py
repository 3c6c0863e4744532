"""Which family a config.json belongs to; adding one is its file and a line here."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxft.errors import ModelError, nearest
from jaxft.hf.rules import Rule
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.decoder import Decoder
from jaxft.models.module import AbstractModel, abstract_model

FAMILIES = {"llama": "jaxft.models.llama"}


@dataclass(frozen=True)
class Architecture:
    """A model that is fully described but holds no weights."""

    config: DecoderConfig
    block: Callable[..., nnx.Module]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]

    def build(self, numerics: Numerics) -> Callable[[nnx.Rngs], Decoder]:
        """Returns the function that makes the module from random keys."""
        return lambda rngs: Decoder(self.config, numerics, block=self.block, rngs=rngs)

    def abstract(self, numerics: Numerics) -> AbstractModel:
        """Returns structure, shapes, dtypes and axes, without memory."""
        return abstract_model(self.build(numerics))


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """Reads config.json.

    Raises:
      ModelError: If the family is not supported, or a field is not understood.
    """
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise ModelError(
            f"config.json: model_type {kind!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}.{nearest(str(kind), FAMILIES)}"
        )
    family = importlib.import_module(FAMILIES[kind])
    decoder = family.config_from_hf(config)
    tied = ("head.w",) if decoder.tied else ()
    # A tied model's file may carry the shared table a second time.
    ignored = (*family.HF_IGNORED, *((r"^lm_head\.weight$",) if decoder.tied else ()))
    rules = tuple(rule for rule in family.HF_RULES if rule.ours not in tied)
    return Architecture(decoder, family.Block, rules, ignored)
