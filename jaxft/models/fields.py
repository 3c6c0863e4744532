"""Reads a config.json field by field, so that none is ignored that might change the maths."""

import math
from collections.abc import Callable
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.config import DecoderConfig, ExpertsConfig, LayerKind
from jaxft.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Proportional,
    Rope,
    Scaling,
    make_yarn,
)

# Fields that do not change what the model computes from given weights and tokens. Dropout is among
# them: fine-tuning runs without it. How weights are stored is judged where their folder is read.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures
    attention_dropout attn_pdrop bos_token_id cache_implementation dtype embd_pdrop eos_token_id
    gradient_checkpointing id2label is_llama_config keys_to_ignore_at_inference label2id
    max_sequence_length model_type num_labels output_attentions output_hidden_states output_past
    output_router_logits pad_token_id predict_special_tokens pretraining_tp problem_type
    quantization_config resid_pdrop return_dict router_aux_loss_coef sep_token_id
    tokenizer_class torch_dtype transformers.js_config transformers_version unk_token_id
    unsloth_fixed unsloth_version use_cache use_return_dict
    """.split()
)


# How many layers behind the last guess further tokens, in either of two names.
GUESSING = ("num_nextn_predict_layers", "num_mtp_layers")


class Fields:
    """The fields of one config.json, and what is wrong with them.

    A missing or wrong field is noted, and reading goes on with a stand-in, so that `finish` can
    raise all problems at once, those fields included that nobody asked for.
    """

    def __init__(self, config: dict[str, Any], **absent: Any):
        """Takes the content of config.json, and what fields mean that it does not have."""
        self._config = absent | config
        self._read: set[str] = set()
        self._problems: dict[str, None] = {}  # in order, each once

    def __contains__(self, name: str) -> bool:
        return self._config.get(name) is not None

    def problem(self, text: str) -> None:
        """Notes what is wrong; the same text counts once."""
        self._problems[text] = None

    def need(self, name: str) -> Any:
        """Returns a field that must be there."""
        self._read.add(name)
        if name not in self:
            self.problem(f"config.json has no {name!r}.")
            return 1
        return self._config[name]

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a field that must be a positive whole number."""
        value = self.need(name) if default is None else self.get(name, default)
        if type(value) is not int or value < 1:
            self.problem(f"config.json: {name} is {value!r}; expected a positive whole number.")
            return 1
        return value

    def count(self, name: str, default: int) -> int:
        """Returns a field that must be a whole number, or 0."""
        value = self.get(name, default)
        if type(value) is not int or value < 0:
            self.problem(f"config.json: {name} is {value!r}; expected a whole number, or 0.")
            return default
        return value

    def guessing(self) -> int:
        """Returns how many layers behind the last guess further tokens."""
        return max(self.count(name, 0) for name in GUESSING)

    def flag(self, name: str) -> bool:
        """Returns whether something is on, off if absent; notes a value that does not say."""
        value = self.get(name, False)
        if not isinstance(value, bool):
            self.problem(f"config.json: {name} is {value!r}; expected true or false.")
        return value is True

    def factor(self, name: str, default: float) -> float:
        """Returns a field that must be a positive number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problem(f"config.json: {name} is {value!r}; expected a positive number.")
            return 1.0
        return float(value)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or a default where it is absent or null."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def experts(self, *, normalised: bool, of_token: str = "num_experts_per_tok") -> ExpertsConfig:
        """Reads the number of experts, for which three names are in use, and of those chosen.

        Args:
          normalised: As in the result.
          of_token: Name of the field with the number of those that a token goes through.
        """
        names = ("num_local_experts", "n_routed_experts", "num_experts")
        name = next((name for name in names if name in self), names[-1])
        count, chosen = self.size(name), self.size(of_token)
        if chosen > count:
            self.problem(f"config.json: {of_token} {chosen} exceeds {name} {count}.")
        return ExpertsConfig(count, chosen, normalised)

    def require(self, **expected: Any) -> None:
        """Notes each field that has another value than the only one understood."""
        for name, value in expected.items():
            if self.get(name, value) != value:
                self.problem(
                    f"config.json: {name} is {self._config[name]!r}; only {value!r} is supported."
                )

    def unused(self, *names: str) -> None:
        """Marks fields that this family carries without effect."""
        self._read.update(names)

    def finish(self) -> None:
        """Raises ModelError with every problem, unread fields among them."""
        kind = self._config.get("model_type")
        for name, value in self._config.items():
            if value is not None and name not in self._read and name not in _HARMLESS:
                self.problem(
                    f"config.json: {name!r} ({value!r}) is not understood for model_type {kind!r} "
                    "and might change the maths."
                )
        if self._problems:
            raise ModelError(list(self._problems))

    def head_dim(self) -> int:
        """Returns the size of a head, and notes numbers of heads that do not fit."""
        embed, heads = self.size("hidden_size"), self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        size = self.size("head_dim", max(embed // heads, 1))
        if heads % kv_heads:
            self.problem(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}."
            )
        if "head_dim" not in self and embed % heads:
            self.problem(
                f"config.json has no head_dim, and hidden_size {embed} is not a multiple of "
                f"num_attention_heads {heads}."
            )
        elif size % 2:
            self.problem(f"config.json: head size {size} is odd and cannot be rotated.")
        return size

    def windows(self, local: Callable[[int], bool], *, in_use: bool = True) -> list[int]:
        """Returns each layer's window, 0 for none.

        Args:
          local: Whether the layer of an index has it, where there are no `layer_types`.
          in_use: Whether `sliding_window` counts at all.
        """
        size = self.size("sliding_window") if in_use and "sliding_window" in self else 0
        self.unused("sliding_window")
        types = self.layer_types("sliding_attention", "full_attention", first=local)
        if "sliding_attention" in self.get("layer_types", ()) and not size:
            self.problem("config.json: layers with 'sliding_attention' need a sliding_window.")
        return [size if kind == "sliding_attention" else 0 for kind in types]

    def layer_types(self, *kinds: str, first: Callable[[int], bool]) -> list[str]:
        """Reads which of two kinds each layer is of.

        Args:
          *kinds: Names of the two.
          first: Whether the layer of an index is of the first, where there are no `layer_types`.
        """
        layers, types = self.size("num_hidden_layers"), self.get("layer_types")
        if types is None:
            return [kinds[0] if first(layer) else kinds[1] for layer in range(layers)]
        unknown = sorted(set(types) - set(kinds))
        if unknown or len(types) != layers:
            self.problem(
                f"config.json: layer_types names {len(types)} layers"
                f"{f', some of kind {unknown[0]!r}' if unknown else ''}; expected {layers}, each "
                f"{' or '.join(map(repr, kinds))}."
            )
        return types

    def uniform_windows(self, *, in_use: bool = True) -> list[int]:
        """Reads `windows` for families whose layers are all alike whatever `layer_types` says."""
        windows = self.windows(lambda layer: True, in_use=in_use)
        if len(set(windows)) > 1 or ("sliding_window" in self and in_use and 0 in windows):
            self.problem(
                "config.json: layer_types names layers without the sliding_window, which this "
                "family's model in transformers does not heed. Remove layer_types."
            )
        return windows

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        parameters: dict[str, Any] | None = None,
        partial: bool = False,
        share: float = 1.0,
        sections: bool = False,
    ) -> Rope:
        """Reads rotary settings in the newer form (`rope_parameters`) or the older.

        Args:
          head_dim: Size of a head.
          theta: Where config.json names none.
          parameters: Instead of config.json's own, where kinds of layer differ.
          partial: Whether `partial_rotary_factor` may leave dimensions unturned.
          share: What it is where it is absent.
          sections: Whether pairs may be shared out among time, height and width of pictures, which
            are one position in text.
        """
        own = parameters
        if own is None:
            own = self.get("rope_parameters", self.get("rope_scaling", {}))
            theta = self.get("rope_theta", theta)
        fields: dict[str, Any] = {**own}
        theta = fields.pop("rope_theta", theta)
        if not isinstance(theta, int | float) or theta <= 1:
            self.problem(f"config.json: rope_theta is {theta!r}; expected a number above 1.")
            theta = 10000.0
        theta = float(theta)
        kind = fields.pop("rope_type", fields.get("type", "default"))
        fields.pop("type", None)
        dims = head_dim
        if partial:
            share = fields.pop("partial_rotary_factor", self.get("partial_rotary_factor", share))
            dims = int(head_dim * share)
            if dims % 2:
                self.problem(
                    f"config.json: partial_rotary_factor {share} turns {dims} of {head_dim} "
                    "dimensions; expected an even number."
                )
        if sections:
            parts = fields.pop("mrope_section", None)
            fields.pop("mrope_interleaved", None)
            if parts is not None and sum(parts) > dims // 2:
                self.problem(
                    f"config.json: mrope_section {parts} shares out {sum(parts)} pairs of "
                    f"dimensions; {dims // 2} are turned."
                )
        return Rope(theta, dims, self._scaling(kind, fields, theta, dims))

    def ropes(
        self, head_dim: int, *, local: float, everywhere: float, wide: int = 0
    ) -> tuple[Rope, Rope]:
        """Reads the settings of layers with and of those without a window, which may differ.

        Where `rope_parameters` does not hold both, scaling is of layers without one alone.

        Args:
          head_dim: Size of a head.
          local: Base of layers with a window, where their settings name none.
          everywhere: Likewise of the others.
          wide: Size of a head in the others, where it is not the same.
        """
        by_kind = self.get("rope_parameters", {})
        if by_kind and by_kind.keys() != {"sliding_attention", "full_attention"}:
            self.problem(
                f"config.json: rope_parameters has {sorted(by_kind)}; expected 'full_attention' "
                "and 'sliding_attention', each with its own settings."
            )
            by_kind = {}
        settings = [
            (head_dim, by_kind.get("sliding_attention", {}), local),
            (
                wide or head_dim,
                by_kind.get("full_attention", self.get("rope_scaling", {})),
                everywhere,
            ),
        ]
        if not all(own.get("truncate", True) for _, own, _ in settings):
            self.problem(
                "config.json: 'truncate' is false in rotary settings of kinds of layer, where this "
                "family's model in transformers does not heed it. Remove it."
            )
        ropes = [self.rope(size, theta=theta, parameters=own) for size, own, theta in settings]
        return ropes[0], ropes[1]

    def _scaling(
        self, kind: str, fields: dict[str, Any], theta: float, dims: int
    ) -> Scaling | None:
        kind = {"su": "longrope"}.get(kind, kind)  # the name in the first Phi-3 files
        needed, optional = _ROPE_FIELDS.get(kind, (set(), set()))
        if kind not in _ROPE_FIELDS or not needed <= set(fields) <= needed | optional:
            supported = "; ".join(
                f"{name} with {', '.join(sorted(fields)) or 'none'}"
                for name, (fields, _) in _ROPE_FIELDS.items()
            )
            self.problem(
                f"config.json: rope scaling {kind!r} with {sorted(fields)} is not supported; "
                f"supported are {supported}."
            )
            return None
        numbers = {n: v for n, v in fields.items() if n not in _NO_NUMBERS and v is not None}
        wrong = {n: v for n, v in numbers.items() if not isinstance(v, int | float) or v <= 0}
        wrong |= {name: None for name in needed if fields[name] is None}
        if wrong:
            self.problem(f"config.json: rope scaling has {wrong}; expected positive numbers.")
            return None
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(fields["factor"])
        if kind == "proportional":
            return Proportional(int(fields["partial_rotary_factor"] * dims // 2))
        original = fields.get(_ORIGINAL) or self.size("max_position_embeddings", 2048)
        if kind == "llama3":
            return Llama3Scaling(
                factor=fields["factor"],
                low_factor=fields["low_freq_factor"],
                high_factor=fields["high_freq_factor"],
                original_length=original,
            )
        if kind == "yarn":
            return make_yarn(
                theta=theta,
                dims=dims,
                factor=fields["factor"],
                beta_fast=fields.get("beta_fast") or 32.0,
                beta_slow=fields.get("beta_slow") or 1.0,
                original_length=original,
                truncate=fields.get("truncate", True),
                magnitude=_magnitude(fields),
            )
        return self._long_scaling(fields, dims)

    def _long_scaling(self, fields: dict[str, Any], dims: int) -> LongScaling:
        short, long = (tuple(fields[name]) for name in ("short_factor", "long_factor"))
        for name, divisors in (("short_factor", short), ("long_factor", long)):
            if len(divisors) != dims // 2:
                self.problem(
                    f"config.json: {name} has {len(divisors)} entries; expected {dims // 2}, one "
                    "for each pair of dimensions that is turned."
                )
        whole = self.need("max_position_embeddings")
        original = self.get(_ORIGINAL, fields.get(_ORIGINAL) or whole)
        factor = fields.get("factor") or whole / original
        magnitude = fields.get("attention_factor")
        if magnitude is None:
            # The paper's scale of attention for texts `factor` times longer.
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongScaling(short, long, original, magnitude)

    def decoder(
        self, kinds: list[LayerKind], *, epsilon: str = "rms_norm_eps", **family: Any
    ) -> DecoderConfig:
        """Reads the fields that nearly all families share, under their usual names.

        Args:
          kinds: Of each layer.
          epsilon: Name of the field that norms add.
          **family: What the family sets itself.

        Raises:
          ModelError: For every problem of the whole file.
        """
        heads = self.size("num_attention_heads")
        distinct = list(dict.fromkeys(kinds))
        shared = {
            "vocab": self.size("vocab_size"),
            "embed": self.size("hidden_size"),
            "layers": self.size("num_hidden_layers"),
            "heads": heads,
            "kv_heads": self.size("num_key_value_heads", heads),
            "head_dim": self.head_dim(),
            "mlp": self.size("intermediate_size"),
            "norm_epsilon": self.need(epsilon),
            "tied": self.get("tie_word_embeddings", False),
            "max_length": self.size("max_position_embeddings", 2048),
            "init_scale": self.get("initializer_range", 0.02),
            "kinds": tuple(distinct),
            "pattern": tuple(distinct.index(kind) for kind in kinds),
        }
        self.finish()
        return DecoderConfig(**shared | family)


def _magnitude(yarn: dict[str, Any]) -> float | None:
    """Returns what YaRN's settings say of the size of cosine and sine; None for the paper's."""
    scales = [yarn.get(name) for name in ("mscale", "mscale_all_dim")]
    if yarn.get("attention_factor") is not None or not all(scales) or yarn["factor"] <= 1:
        return yarn.get("attention_factor")
    above, below = (0.1 * scale * math.log(yarn["factor"]) + 1.0 for scale in scales if scale)
    return above / below


_ORIGINAL = "original_max_position_embeddings"
_NO_NUMBERS = {"truncate", "short_factor", "long_factor"}
# For each rope_type: the fields that it needs, and those that it may have.
_ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "proportional": ({"partial_rotary_factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {_ORIGINAL}),
    # transformers reads `attention_factor` and not `attn_factor`, which some files have.
    "yarn": (
        {"factor"},
        {
            _ORIGINAL,
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "attn_factor",
            "mscale",
            "mscale_all_dim",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {_ORIGINAL, "attention_factor", "factor"},
    ),
}
