"""adapter_config.json of PEFT: the fields that are understood, and those that are refused."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import ModelError
from jaxft.hf.peft.modules import CONFIG, is_named

_MERGE = "Merge the adapter with PEFT (merge_and_unload), save the model and use that."

# What the tensors of the file say themselves, what matters before the first step of a training
# alone, and what describes the file.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping corda_config eva_config fan_in_fan_out inference_mode loftq_config "
    "lora_ga_config megatron_core peft_version qalora_group_size runtime_config task_type".split()
)
# Fields that change the mathematics: the values that do not, and what the others mean.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "biases that are trained beside the adapter"),
    "lora_bias": ((None, False), "an adapter with a bias of its own"),
    "layer_replication": ((None, []), "a model with layers that are there several times"),
    "megatron_config": ((None,), "layers of Megatron"),
    "use_qalora": ((None, False), "inputs that are pooled by groups (QA-LoRA)"),
    "alora_invocation_tokens": ((None, []), "an adapter that begins at some tokens (aLoRA)"),
    "arrow_config": ((None,), "several adapters that are routed to (Arrow)"),
    "use_bdlora": ((None, False), "factors of blocks (BD-LoRA)"),
    "kasa_config": ((None,), "a base whose smallest singular values are cut off (KaSA)"),
    "monteclora_config": ((None,), "an adapter that is sampled (MonteCLoRA)"),
    "velora_config": ((None,), "compressed activations (VeLoRA)"),
}
# Where an adapter began says nothing of what it is, unless the base was changed for it.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules that PEFT gives an adapter, by its rules.

    Attributes:
      modules: Ends of their names, or a regular expression of whole names.
      excluded: Exceptions, in the same form.
      layers: Numbers of the layers; empty for all.
      patterns: Regular expressions of what layers are called, before their number.
    """

    modules: str | tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    patterns: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        if _is_meant(name, self.excluded) or not _is_meant(name, self.modules):
            return False
        if not self.layers or isinstance(self.modules, str) or name in self.modules:
            return True
        patterns = self.patterns or (r"[^.]*",)
        found = (re.match(rf".*\.{pattern}\.(\d+)\.", name) for pattern in patterns)
        return next((int(m[1]) in self.layers for m in found if m), False)


def _is_meant(name: str, meant: str | tuple[str, ...]) -> bool:
    if isinstance(meant, str):
        return re.fullmatch(meant, name) is not None
    return is_named(name, meant)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The content of adapter_config.json that the tensors beside it do not say.

    Attributes:
      rank: The size of the inner axis where no pattern names another.
      alpha: Scale times rank, where no pattern names another.
      ranks: `{pattern: rank}`.
      alphas: `{pattern: alpha}`.
      rslora: Whether scales are alpha / sqrt(rank) instead of alpha / rank.
      dora: Whether each module has magnitudes.
      dropout: Probability that an input of the adapter is dropped in training.
      base: Name or path of the base model; empty if the file does not say.
      revision: Revision of the base's repository; empty if the file does not say.
      targets: Modules that have an adapter.
      parameters: Ends of names of parameters that are adapted themselves, not as a module's weight.
      saved: Ends of names of modules that are trained as a whole.
      tokens: `{end of a table's name: ids}` of rows that are trained; the empty name is the
        embedding's.
      ties: Whether a head that is the embedding's table takes part in what is trained of that.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    dropout: float
    base: str
    revision: str
    targets: Targets
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    ties: bool

    def rank_of(self, name: str) -> int:
        """Returns the rank of a module, or of a parameter that is adapted itself."""
        return _by_pattern(self.ranks, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """Returns the alpha of a module, or of a parameter that is adapted itself."""
        return _by_pattern(self.alphas, name, self.alpha)


def _by_pattern[T](patterns: Mapping[str, T], name: str, otherwise: T) -> T:
    """Returns the value of the first pattern that matches the whole name or its last components."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise


def understand(config: Mapping[str, Any]) -> PeftConfig:
    """Reads the content of adapter_config.json; fields of newer versions may be absent.

    Raises:
      ModelError: With all fields that are not understood, by name, and what to do.
    """
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{CONFIG}: peft_type is {config.get('peft_type')!r}; jaxft reads 'LORA'. {_MERGE}"
        )
    fields = _Fields(config)
    tokens = fields.get("trainable_token_indices", _is_tokens, "ids of tokens", {}) or {}
    understood = PeftConfig(
        rank=fields.get("r", _is_rank, "a whole number above 0", 8),
        alpha=fields.get("lora_alpha", _is_number, "a number", 8),
        ranks=fields.get("rank_pattern", _maps_patterns_to(_is_rank), "ranks by pattern", {}),
        alphas=fields.get("alpha_pattern", _maps_patterns_to(_is_number), "alphas by pattern", {}),
        rslora=fields.get("use_rslora", _is_bool, "true or false", False),
        dora=fields.get("use_dora", _is_bool, "true or false", False),
        dropout=fields.get("lora_dropout", _is_number, "a number", 0.0),
        base=fields.get("base_model_name_or_path", _is_text, "a text", ""),
        revision=fields.get("revision", _is_text, "a text", ""),
        targets=fields.targets(),
        parameters=tuple(fields.get("target_parameters", _is_names, "a list of names", ())),
        saved=tuple(fields.get("modules_to_save", _is_names, "a list of names", ())),
        tokens={name: tuple(ids) for name, ids in tokens.items()}
        if isinstance(tokens, dict)
        else {"": tuple(tokens)},
        ties=fields.get("ensure_weight_tying", _is_bool, "true or false", False),
    )
    fields.finish()
    return understood


class _Fields:
    """Fields that are read one after another, and what was wrong with them."""

    def __init__(self, config: Mapping[str, Any]):
        self._config = config
        self._read = {"peft_type"}
        self._problems: list[str] = []

    def get(self, name: str, fits: Callable[[Any], bool], expected: str, default: Any) -> Any:
        """Returns a field, the default if it is absent or null."""
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            return default
        if not fits(value):
            self._problems.append(f"{CONFIG}: {name} is {value!r}; expected {expected}.")
            return default
        return value

    def targets(self) -> Targets:
        """Reads what says which modules have an adapter."""

        def names(field: str) -> Any:
            value = self.get(field, _are_names, "a regular expression or a list of names", ())
            return value if isinstance(value, str) else tuple(value)

        layers = self.get("layers_to_transform", _are_layers, "numbers of layers", ())
        patterns = names("layers_pattern")
        return Targets(
            names("target_modules"),
            names("exclude_modules"),
            (layers,) if isinstance(layers, int) else tuple(layers),
            (patterns,) if isinstance(patterns, str) else patterns,
        )

    def finish(self) -> None:
        """Judges the fields that nobody asked for, and raises all problems."""
        start = self._config.get("init_lora_weights", True)
        if start not in _STARTS:
            self._problems.append(
                f"{CONFIG}: init_lora_weights is {start!r}: the adapter belongs to a base that was "
                "changed before training. Save it again with PEFT's save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...), which writes it for the base "
                f"itself. {_MERGE}"
            )
        known = self._read | _WITHOUT_EFFECT | {"init_lora_weights"}
        for name in sorted(self._config.keys() - known):
            value = self._config[name]
            neutral, meaning = _REFUSED.get(name, ((None, False, [], {}, ""), ""))
            if value not in neutral:
                version = self._config.get("peft_version", "of an unknown version")
                meaning = meaning or f"a field of PEFT {version} that jaxft does not know"
                self._problems.append(f"{CONFIG}: {name} is {value!r}: {meaning}. {_MERGE}")
        if self._problems:
            raise ModelError(self._problems)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_names(value: Any) -> bool:
    return _is_pattern(value) if isinstance(value, str) else _is_names(value)


def _are_layers(value: Any) -> bool:
    return _is_ids([value] if isinstance(value, int) else value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and i >= 0 for i in value)


def _is_tokens(value: Any) -> bool:
    return _is_ids(value) or (isinstance(value, dict) and all(map(_is_ids, value.values())))


def _maps_patterns_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(fits, value.values()))
    )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
