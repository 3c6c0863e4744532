"""Multimodal models of which the text tower alone is trained: what their files and fields mean.

Their config.json describes the tower in `text_config`. Its tensors lie under
`model.language_model.` in the models that transformers 5 builds; files of older types have
`language_model.model.`, and `save_pretrained` still writes these so.
"""

from dataclasses import dataclass, replace
from typing import Any

from jaxft.errors import ModelError
from jaxft.hf.rules import Naming, Rule
from jaxft.models.fields import Fields

_BODY, _INSIDE = "model.", "model.language_model."
_SPELLINGS = ((_INSIDE, "language_model.model."), ("lm_head.", "language_model.lm_head."))
_LLAVA_OTHERS = ("vision_tower.", "multi_modal_projector.", "image_newline")
_GEMMA4_FIELDS = (
    "audio_config audio_token_id boa_token_id boi_token_id eoa_token_id eoa_token_index "
    "eoi_token_id image_token_id initializer_range video_token_id"
)
_QWEN_OTHERS = ("visual.",)
_QWEN_FIELDS = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
_LLAVA_FIELDS = (
    "image_token_index image_seq_length ignore_index multimodal_projector_bias "
    "projector_hidden_act vision_feature_layer vision_feature_select_strategy vocab_size"
)


@dataclass(frozen=True, slots=True)
class Tower:
    """A type of multimodal models whose text tower computes what a text model alone does.

    Attributes:
      texts: Values of `text_config.model_type` for which that is known to hold; the first is what
        an absent one means.
      unread: Fields of the whole that say nothing of text.
      others: Starts of names of the other towers' tensors, within `model.` or without.
      tied: Whether head and embedding are one table where config.json does not say it.
      unheeded: Fields of the text model that the whole, in transformers, does not apply.
    """

    texts: tuple[str, ...]
    unread: str
    others: tuple[str, ...]
    tied: bool = False
    unheeded: tuple[str, ...] = ()


# model_type of the whole: what is known of it.
TOWERS = {
    "gemma3": Tower(
        ("gemma3_text",),
        "boi_token_index eoi_token_index image_token_index mm_tokens_per_image initializer_range",
        _LLAVA_OTHERS[:2],
        tied=True,
        unheeded=("final_logit_softcapping",),
    ),
    "gemma4": Tower(
        ("gemma4_text",),
        f"{_GEMMA4_FIELDS} vision_soft_tokens_per_image",
        ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio."),
        tied=True,
    ),
    "gemma4_unified": Tower(
        ("gemma4_unified_text",),
        _GEMMA4_FIELDS,
        ("vision_embedder.", "embed_vision.", "embed_audio."),
        tied=True,
    ),
    "llava": Tower(("llama", "mistral"), _LLAVA_FIELDS, _LLAVA_OTHERS),
    "llava_next": Tower(
        ("llama", "mistral"),
        f"{_LLAVA_FIELDS} image_grid_pinpoints use_image_newline_parameter",
        _LLAVA_OTHERS,
    ),
    "mistral3": Tower(
        ("mistral", "ministral3"), f"{_LLAVA_FIELDS} spatial_merge_size", _LLAVA_OTHERS[:2]
    ),
    # `language_model_only` says whether the other tower is there.
    "qwen3_5": Tower(("qwen3_5_text",), f"{_QWEN_FIELDS} language_model_only", _QWEN_OTHERS),
    "qwen3_5_moe": Tower(
        ("qwen3_5_moe_text",),
        f"{_QWEN_FIELDS} language_model_only",
        _QWEN_OTHERS,
    ),
    "qwen3_vl": Tower(("qwen3_vl_text",), _QWEN_FIELDS, _QWEN_OTHERS),
}

_GEMMA4_ABSENT = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
}
# What fields mean that `text_config` leaves out, by its model_type. Files of text models have them.
ABSENT: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
    },
    "gemma4_text": _GEMMA4_ABSENT,
    "gemma4_unified_text": {**_GEMMA4_ABSENT, "max_position_embeddings": 262144},
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
    },
}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of the text tower, complete, from that of a whole of `TOWERS`.

    Raises:
      ModelError: If it is not there, or a field of the whole is not understood.
    """
    kind = config["model_type"]
    tower, fields = TOWERS[kind], Fields(config)
    fields.unused("vision_config", *tower.unread.split())
    text = fields.need("text_config")
    if not isinstance(text, dict):
        raise ModelError(
            f"config.json: model_type {kind!r} is a multimodal model, whose language model "
            "'text_config' describes; there is none."
        )
    inner = text.get("model_type", tower.texts[0])
    if inner not in tower.texts:
        fields.problem(
            f"config.json: text_config.model_type {inner!r} is not supported inside model_type "
            f"{kind!r}; expected one of {', '.join(tower.texts)}."
        )
    for name in tower.unheeded:
        if text.get(name) is not None:
            fields.problem(
                f"config.json: {name} is {text[name]!r} in text_config, which models of type "
                f"{kind!r} in transformers do not heed. Make it null."
            )
    whole, own = fields.get("tie_word_embeddings"), text.get("tie_word_embeddings")
    if None not in (whole, own) and whole != own:
        fields.problem(
            f"config.json: tie_word_embeddings is {whole}, and {own} in text_config, on which "
            "versions of transformers disagree. Make both true if the files hold no "
            "lm_head.weight, else false."
        )
    fields.finish()
    tied = next((value for value in (whole, own) if value is not None), tower.tied)
    return {**ABSENT.get(inner, {}), **text, "model_type": inner, "tie_word_embeddings": tied}


def inside(kind: str, naming: Naming) -> Naming:
    """Returns the names of a text model as they are within a whole.

    Args:
      kind: The model_type of the whole.
      naming: Of the text model.
    """
    tower = TOWERS[kind]

    def moved(name: str) -> str:
        return name.replace(_BODY, _INSIDE, 1) if name.startswith(_BODY) else name

    def of_rules(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        return tuple(replace(rule, theirs=moved(rule.theirs)) for rule in rules)

    return replace(
        naming,
        rules=of_rules(naming.rules),
        renamed=of_rules(naming.renamed),
        adapted=of_rules(naming.adapted),
        copies={moved(name): moved(other) for name, other in naming.copies.items()},
        spellings=_SPELLINGS,
        alone=naming,
        others=(
            *tower.others,
            *(_BODY + name for name in tower.others),
            *map(moved, naming.others),
        ),
    )
