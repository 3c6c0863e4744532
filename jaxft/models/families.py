"""The table of model families: config.json names one; adding one is its file and a line here."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxft.errors import ModelError, nearest
from jaxft.hf.rules import Naming, of_stacks
from jaxft.models.adapters import NOTHING, Adaptation, attach
from jaxft.models.config import DecoderConfig, Numerics
from jaxft.models.decoder import Decoder
from jaxft.models.module import AbstractModel, abstract_model
from jaxft.models.refused import reason_for
from jaxft.models.towers import TOWERS, inside, text_config
from jaxft.models.weights import weights_of_blocks

# model_type in config.json: module.
FAMILIES = {
    "apertus": "jaxft.models.apertus",
    "cohere": "jaxft.models.cohere",
    "cohere2": "jaxft.models.cohere2",
    "deepseek_v2": "jaxft.models.deepseek_v2",
    "deepseek_v3": "jaxft.models.deepseek_v3",
    "exaone4": "jaxft.models.exaone4",
    "gemma2": "jaxft.models.gemma2",
    "gemma3_text": "jaxft.models.gemma3",
    "gemma4_text": "jaxft.models.gemma4",
    "glm": "jaxft.models.glm",
    "glm4": "jaxft.models.glm4",
    "glm4_moe": "jaxft.models.glm4_moe",
    "glm4_moe_lite": "jaxft.models.glm4_moe_lite",
    "gpt2": "jaxft.models.gpt2",
    "gpt_oss": "jaxft.models.gpt_oss",
    "granite": "jaxft.models.granite",
    "hunyuan_v1_dense": "jaxft.models.hunyuan",
    "llama": "jaxft.models.llama",
    "ministral": "jaxft.models.ministral",
    "ministral3": "jaxft.models.ministral3",
    "mistral": "jaxft.models.mistral",
    "mixtral": "jaxft.models.mixtral",
    "nanochat": "jaxft.models.nanochat",
    "olmo2": "jaxft.models.olmo2",
    "olmo3": "jaxft.models.olmo3",
    "phi3": "jaxft.models.phi3",
    "qwen2": "jaxft.models.qwen2",
    "qwen3": "jaxft.models.qwen3",
    "qwen3_5_moe_text": "jaxft.models.qwen3_5_moe",
    "qwen3_5_text": "jaxft.models.qwen3_5",
    "qwen3_moe": "jaxft.models.qwen3_moe",
    "qwen3_next": "jaxft.models.qwen3_next",
    "seed_oss": "jaxft.models.seed_oss",
    "smollm3": "jaxft.models.smollm3",
}

# Types that are others in all but name. Kimi-K2's authors say to put that of DeepSeek-V3 into its
# config.json where a program does not know it, as transformers does with the text of Kimi-K2.5.
_SAME = {"kimi_k2": "deepseek_v3"}
# Text models that are there only inside of multimodal ones; those of `FAMILIES` may be, too.
_TEXTS = {
    "gemma4_unified_text": "jaxft.models.gemma4_unified",
    "qwen3_vl_text": "jaxft.models.qwen3_vl",
}
# Parameters whose rows are looked up.
_TABLES = ("embed.w", "positions.w", "per_layer.table.w")
# Parts of a config.json that describe other senses than text.
_OTHER_SENSES = ("vision_config", "audio_config", "image_config", "speech_config")


@dataclass(frozen=True)
class Architecture:
    """A model that is fully described but holds no weights.

    Attributes:
      config: Shape of the decoder.
      blocks: Builders of a layer, by the names of `LayerKind.block`.
      naming: Names and layouts in Hugging Face files.
      adaptation: Adapters and further parts that are learnt; nothing by default.
      quantise: Kind of `models/quantised.py` in which the layers' weights are held; empty for none.
    """

    config: DecoderConfig
    blocks: Mapping[str, Callable[..., nnx.Module]]
    naming: Naming
    adaptation: Adaptation = NOTHING
    quantise: str = ""

    @property
    def head_path(self) -> str:
        """Path of the table that logits are made with."""
        return "embed.w" if self.config.tied else "head.w"

    def is_multiplied(self, path: str) -> bool:
        """Whether tokens are multiplied with a parameter; in the other tables they are looked up.

        A tied table counts as the head.
        """
        looked_up = {*_TABLES, "embed.rows", "per_layer.table.rows"}
        looked_up -= {"embed.w"} if self.config.tied else set()
        return path not in looked_up and not path.endswith(".scales")

    def build(self, numerics: Numerics) -> Callable[[nnx.Rngs], Decoder]:
        """Returns the function that makes the module from random keys."""

        def make(rngs: nnx.Rngs) -> Decoder:
            model = Decoder(self.config, numerics, blocks=self.blocks, rngs=rngs)
            if self.adaptation:
                attach(model, self.adaptation, numerics.compute_dtype)
            for weight in weights_of_blocks(model):
                weight.matmul = numerics.matmul
                if self.quantise:
                    weight.quantise(self.quantise)
            return model

        return make

    @property
    def plain(self) -> "Architecture":
        """The model without what is learnt beside it."""
        return dataclasses.replace(self, adaptation=NOTHING)

    def abstract(self, numerics: Numerics) -> AbstractModel:
        """Returns structure, shapes, dtypes and axes, without memory."""
        found = abstract_model(self.build(numerics))
        return dataclasses.replace(found, stacks=self.config.parts)


def reaches_layers(trainable: Iterable[str]) -> bool:
    """Returns whether gradients go back into the layers: to their weights, or to what is before.

    Args:
      trainable: Paths of parameters that have gradients.
    """
    return any(not path.startswith(("head.", "norm.")) for path in trainable)


def after_layers(trainable: Iterable[str]) -> bool:
    """Returns whether the last norm has gradients, which go back through the head."""
    return any(path.startswith("norm.") for path in trainable)


def precedes_layers(path: str) -> bool:
    """Returns whether a parameter is of what layers start from: tables of tokens and positions."""
    return path.startswith(("embed.", "positions.", "per_layer."))


def architecture_from_hf(config: dict[str, Any]) -> Architecture:
    """Reads config.json; of a multimodal model, its text tower is meant.

    Raises:
      ModelError: If the family is not supported, or a field is not understood.
    """
    whole = config.get("model_type", "")
    text = text_config(config) if whole in TOWERS else config
    modules = FAMILIES if text is config else FAMILIES | _TEXTS
    kind = text.get("model_type", "")
    kind = _SAME.get(kind, kind)
    if kind not in modules:
        raise ModelError(_unsupported(config, str(whole)))
    family = importlib.import_module(modules[kind])
    decoder = family.config_from_hf(text)
    rules = {rule.ours: rule for rule in family.HF_RULES}
    copies = {}
    if decoder.tied:
        # The file may carry the shared table a second time, but then it must be the same.
        copies[rules.pop("head.w").theirs] = rules["embed.w"].theirs
    of_block = getattr(family, "HF_BLOCK_RULES", {})
    own = {
        path: of_block.get(decoder.blocks[numbers[0]], ())
        for path, numbers in decoder.parts.items()
    }
    naming = Naming(
        tuple(of_stacks(rules.values(), decoder.parts, own)),
        ignored=family.HF_IGNORED,
        copies=copies,
        spellings=getattr(family, "HF_SPELLINGS", ()),
        renamed=tuple(of_stacks(getattr(family, "HF_RENAMED", ()), decoder.parts, {})),
        adapted=tuple(of_stacks(getattr(family, "HF_ADAPTED", ()), decoder.parts, {})),
        tables=_TABLES,
        others=(*getattr(family, "HF_OTHERS", ()), *_guessing(decoder), *_unmade(decoder)),
    )
    return Architecture(
        config=decoder,
        blocks=family.BLOCKS if hasattr(family, "BLOCKS") else {"": family.Block},
        naming=naming if text is config else inside(whole, naming),
    )


def _guessing(config: DecoderConfig) -> list[str]:
    """Returns starts of the names of tensors of layers that guess further tokens."""
    behind = range(config.layers, config.layers + config.guessing)
    return [f"model.layers.{number}." for number in behind]


def _unmade(config: DecoderConfig) -> list[str]:
    """Returns starts of the names of keys and values that files hold, and layers do not make."""
    parts = ("k_proj.", "v_proj.", "k_norm.")
    return [f"model.layers.{n}.self_attn.{part}" for n in config.sources for part in parts]


def _unsupported(config: dict[str, Any], kind: str) -> str:
    """Returns what a model of no supported family is, as far as its config.json tells."""
    supported = f"supported are {', '.join(sorted(FAMILIES))}."
    others = [name for name in _OTHER_SENSES if isinstance(config.get(name), dict)]
    text = config.get("text_config")
    inner = str(text.get("model_type", "")) if isinstance(text, dict) else ""
    if reason := reason_for(kind) or reason_for(inner):
        return (
            f"config.json: model_type {kind!r} is refused: models of this type {reason}, which is "
            f"not supported here; {supported}"
        )
    if others:
        return (
            f"config.json: model_type {kind!r} is a multimodal model: a language model"
            f"{f' ({inner})' if inner else ''} inside one that also takes what {', '.join(others)} "
            f"{'describes' if len(others) == 1 else 'describe'}. jaxft trains the text of "
            f"{', '.join(sorted(TOWERS))}, as far as that is of a family that is supported: "
            f"{supported}"
        )
    if config.get("is_encoder_decoder"):
        return (
            f"config.json: model_type {kind!r} is an encoder and a decoder; jaxft trains models "
            f"that are a decoder alone; {supported}"
        )
    return (
        f"config.json: model_type {kind!r} is not supported; {supported}{nearest(kind, FAMILIES)}"
    )
