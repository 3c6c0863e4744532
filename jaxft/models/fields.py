"""Reads a config.json field by field, so that none is ignored that might change the maths."""

import math
from collections.abc import Callable
from typing import Any

from jaxft.errors import ModelError
from jaxft.models.config import DecoderConfig, ExpertsConfig, LayerKind
from jaxft.models.rope import LinearScaling, Llama3Scaling, LongScaling, Rope, Scaling, make_yarn

# Fields that do not change what the model computes from given weights and tokens. Dropout is among
# them: fine-tuning runs without it.
_HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout bos_token_id cache_implementation dtype
    embd_pdrop eos_token_id is_llama_config model_type output_attentions output_hidden_states
    pad_token_id pretraining_tp resid_pdrop return_dict tokenizer_class torch_dtype
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache
    """.split()
)


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

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or a default where it is absent or null."""
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def experts(self, *, normalised: bool) -> ExpertsConfig:
        """Reads the number of experts, for which two names are in use, and of those chosen."""
        self.unused("output_router_logits", "router_aux_loss_coef")
        name = "num_local_experts" if "num_local_experts" in self else "num_experts"
        return ExpertsConfig(self.need(name), self.need("num_experts_per_tok"), normalised)

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
            if name not in self._read and name not in _HARMLESS:
                self.problem(
                    f"config.json: {name!r} ({value!r}) is not understood for model_type {kind!r} "
                    "and might change the maths."
                )
        if self._problems:
            raise ModelError(list(self._problems))

    def head_dim(self) -> int:
        """Returns the size of a head, and notes numbers of heads that do not fit."""
        embed, heads = self.need("hidden_size"), self.need("num_attention_heads")
        kv_heads = self.get("num_key_value_heads", heads)
        size = self.get("head_dim", embed // heads)
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
        size = self.get("sliding_window", 0) if in_use else 0
        self.unused("sliding_window")
        layers = self.need("num_hidden_layers")
        types = self.get("layer_types")
        if types is None:
            return [size if local(layer) else 0 for layer in range(layers)]
        unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
        if unknown or len(types) != layers:
            self.problem(
                f"config.json: layer_types names {len(types)} layers"
                f"{f', some of kind {unknown[0]!r}' if unknown else ''}; expected {layers}, each "
                "'sliding_attention' or 'full_attention'."
            )
        if "sliding_attention" in types and not size:
            self.problem("config.json: layers with 'sliding_attention' need a sliding_window.")
        return [size if kind == "sliding_attention" else 0 for kind in types]

    def rope(
        self,
        head_dim: int,
        *,
        theta: float = 0.0,
        parameters: dict[str, Any] | None = None,
        partial: bool = False,
    ) -> Rope:
        """Reads rotary settings in the newer form (`rope_parameters`) or the older.

        Args:
          head_dim: Size of a head.
          theta: Where `parameters` names none.
          parameters: Instead of config.json's own, where kinds of layer differ.
          partial: Whether `partial_rotary_factor` may leave dimensions unturned.
        """
        own = parameters
        if own is None:
            own = self.get("rope_parameters", self.get("rope_scaling", {}))
            theta = self.get("rope_theta", 10000.0)
        fields: dict[str, Any] = {**own}
        theta = fields.pop("rope_theta", theta)
        kind = fields.pop("rope_type", fields.get("type", "default"))
        fields.pop("type", None)
        dims = head_dim
        if partial:
            share = fields.pop("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
            dims = int(head_dim * share)
        return Rope(theta, dims, self._scaling(kind, fields, theta, dims))

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
        if kind == "default":
            return None
        if kind == "linear":
            return LinearScaling(fields["factor"])
        original = fields.get("original_max_position_embeddings", 0)
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
                magnitude=fields.get("attention_factor"),
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
        original = self.get(
            "original_max_position_embeddings",
            fields.get("original_max_position_embeddings", whole),
        )
        factor = fields.get("factor") or whole / original
        magnitude = fields.get("attention_factor")
        if magnitude is None:
            # The paper's scale of attention for texts `factor` times longer.
            magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongScaling(short, long, original, magnitude)

    def decoder(self, kinds: list[LayerKind], **family: Any) -> DecoderConfig:
        """Reads the fields that nearly all families share, under their usual names.

        Args:
          kinds: Of each layer.
          **family: What the family sets itself.

        Raises:
          ModelError: For every problem of the whole file.
        """
        heads = self.need("num_attention_heads")
        distinct = list(dict.fromkeys(kinds))
        shared = {
            "vocab": self.need("vocab_size"),
            "embed": self.need("hidden_size"),
            "layers": self.need("num_hidden_layers"),
            "heads": heads,
            "kv_heads": self.get("num_key_value_heads", heads),
            "head_dim": self.head_dim(),
            "mlp": self.need("intermediate_size"),
            "norm_epsilon": self.need("rms_norm_eps"),
            "tied": self.get("tie_word_embeddings", False),
            "max_length": self.get("max_position_embeddings", 2048),
            "init_scale": self.get("initializer_range", 0.02),
            "kinds": tuple(distinct),
            "pattern": tuple(distinct.index(kind) for kind in kinds),
        }
        self.finish()
        return DecoderConfig(**shared | family)


# For each rope_type: the fields that it needs, and those that it may have.
_ORIGINAL = "original_max_position_embeddings"
_ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, set()),
    "yarn": (
        {"factor", _ORIGINAL},
        {"beta_fast", "beta_slow", "truncate", "attention_factor"},
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {_ORIGINAL, "attention_factor", "factor"},
    ),
}
