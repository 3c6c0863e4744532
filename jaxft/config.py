"""The description of a run: nested dataclasses, each key with its default, meaning and check.

A default lives here and nowhere else. Keys whose zero or empty value means "off" or "derived" say
so, because flags cannot carry `None`.
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxft.errors import ConfigError, collected, nearest, nearest_of
from jaxft.extensions import load_named
from jaxft.models import activations

_YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")

FORMATS = (
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "columns",
    "text",
    "preference",
    "labelled",
)
_COLUMN_FORMATS = ("columns", "text", "preference", "labelled")
"""Formats whose columns can have other names."""
TEXT_SPLITS = ("paragraph", "line", "file")
OVERLENGTH = ("error", "drop", "truncate", "split", "cut_prompt_start", "cut_prompt_middle")


def key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declares one configuration key: its default, its meaning and what values it may take."""
    return field(
        default=default,
        metadata={"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum},
    )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The model that is fine-tuned, and how it is computed."""

    path: str = key("", "Hugging Face folder, or repository id such as 'org/name'.")
    revision: str = key("", "Branch, tag or commit of a repository id; empty: its default branch.")
    tokenizer: str = key("", "Folder or repository id of another tokenizer; empty: model.path.")
    add_tokens: str = key(
        "",
        "Special tokens that the tokenizer gets, comma-separated, such as '<|call|>,<|result|>'; "
        "the embedding grows if it has no rows to spare. Rows that spell them need "
        "--config.data.control_tokens=keep.",
    )
    random_init: bool = key(
        False, "Start from random weights: model.path then needs only config.json and a tokenizer."
    )
    dtypes: str = key(
        "mixed",
        "'mixed': float32 master parameters and bfloat16 compute; or all in the named type.",
        choices=("mixed", "float32", "bfloat16"),
    )
    attention: str = key(
        "auto",
        "Attention back end; 'auto' prints what it chose for the device.",
        choices=("auto", "xla", "cudnn", "splash", "ring"),
    )
    remat: str = key(
        "full",
        "Kept from a layer's forward pass for its backward: 'none' keeps all, 'dots' the outputs "
        "of matrix products with weights, 'full' the layer's input alone. Or that and named "
        "activations, such as 'qkv+attention'; also attention_out, mlp and mlp_out.",
    )
    offload: str = key(
        "",
        "Of what is kept, the activations that wait in the host's memory: 'inputs+qkv'; empty: "
        "none.",
    )
    expert_capacity: float = key(
        0.0,
        "In a mixture of experts: tokens of a row that an expert takes, as a multiple of its even "
        "share; what exceeds is dropped, and counted. 0: none is. Evaluation never drops any.",
        minimum=0,
    )

    @property
    def added_tokens(self) -> list[str]:
        """The tokens of `add_tokens`."""
        return [part.strip() for part in self.add_tokens.split(",")] if self.add_tokens else []


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and how it becomes rows of tokens."""

    train: str = key(
        "",
        "Training data: files, globs or hub ids, comma-separated. A hub id may carry a "
        "configuration and a split: 'org/name:config[split]'. Options follow after colons: "
        "'a.jsonl:0.3' (weight), 'b.csv:format=columns:prompt=question:completion=answer', "
        "'c.txt:text_split=line:limit=1000'; also system=, text= and weight=. Weights are shares "
        "of the documents of one pass, which ends when the scarcest source is used up.",
    )
    validation: str = key(
        "",
        "Held-out data in the same form, or a part of the training data that is then not trained "
        "on: '5%'; empty: no evaluation.",
    )
    format: str = key(
        "auto",
        "Row format of sources that name none; 'auto' detects it and says so in the log. "
        "'preference' holds pairs of answers, 'labelled' answers marked as good or bad.",
        choices=FORMATS,
    )
    columns: str = key(
        "",
        "Columns that hold each part, for sources that name none. For format 'columns': "
        "'prompt=question,completion=answer'; for 'text': 'text=body'; for 'preference': "
        "'prompt=q,chosen=good,rejected=bad'; for 'labelled': 'prompt=q,completion=a,label=liked'.",
    )
    text_split: str = key(
        "paragraph",
        "What one document of a plain text file is, of sources that do not say.",
        choices=TEXT_SPLITS,
    )
    bad_rows: str = key(
        "error",
        "What happens to rows that cannot be read or trained on: 'error' refuses the data set, "
        "'skip' leaves them out, counts them and lists them in skipped.jsonl of the workdir.",
        choices=("error", "skip"),
    )
    bad_share: float = key(
        0.01,
        "With bad_rows 'skip': the largest share of the rows of a data set that is left out before "
        "it is refused; more than a few in a hundred are no accidents but another format.",
        minimum=0,
        maximum=1,
    )
    template: str = key("", "File with a Jinja chat template; empty: the tokenizer's own.")
    thinking: str = key(
        "template",
        "Reasoning in <think> blocks of assistant turns: 'template' leaves it to the chat "
        "template, 'keep' trains each turn as it is generated, as the last one, so that no block "
        "is dropped, 'drop' removes the blocks before rendering.",
        choices=("template", "keep", "drop"),
    )
    control_tokens: str = key(
        "text",
        "What becomes of a control token of the tokenizer, such as '<|im_end|>', that a row "
        "spells: 'text' encodes it as plain text, 'refuse' makes the row a bad one, 'keep' makes "
        "it the real token: for rows that are trusted, such as those with tokens of add_tokens.",
        choices=("text", "refuse", "keep"),
    )
    train_on: str = key(
        "assistant",
        "Tokens that carry loss: 'assistant' turns with their stop token, only the last one "
        "('completion'), or 'all'.",
        choices=("assistant", "completion", "all"),
    )
    max_length: int = key(1024, "Tokens in a row of the batch.", minimum=2, maximum=1 << 24)
    overlength: str = key(
        "error",
        "What happens to documents over max_length; the share lost is always reported. 'truncate' "
        "keeps the beginning, 'split' makes several of one. 'cut_prompt_start' and "
        "'cut_prompt_middle' keep the last answer whole and shorten what precedes it: the first "
        "keeps BOS and what is nearest to the answer, the second the beginning as well; an answer "
        "that does not fit by itself is dropped, and plain text, all answer, is split.",
        choices=OVERLENGTH,
    )
    packing: str = key(
        "documents",
        "'documents': several documents share a row and do not see each other; 'stream': one "
        "stream cut every max_length tokens, documents see what precedes them and end with EOS; "
        "'none': one a row.",
        choices=("documents", "stream", "none"),
    )
    shuffle: bool = key(True, "A new deterministic order of rows in each epoch.")
    streaming: bool = key(False, "Stream hub data sets instead of downloading them first.")
    cache: str = key("", "Folder of tokenised rows; empty: ~/.cache/jaxft/data.")


# Modules of the built-in objectives. They are imported when an objective is asked for, because
# their mathematics needs jax.
OBJECTIVES = {
    name: f"jaxft.training.objectives.{name}"
    for name in ("sft", "dpo", "ipo", "simpo", "orpo", "cpo", "kto")
}


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What is learnt.

    The keys of an objective stand beside its mathematics. They are the group of its name:
    `objective.dpo.beta`.
    """

    name: str = key(
        "sft",
        f"What is learnt: {', '.join(OBJECTIVES)}, or a module of yours that defines OBJECTIVE.",
    )
    reference: str = key(
        "auto",
        "Where a preference objective has the log-probabilities of the starting weights from: "
        "'fixed' keeps these weights and computes them in every step, 'cached' computes them once; "
        "'auto': fixed if the objective needs them.",
        choices=("auto", "fixed", "cached", "none"),
    )
    chunk: int = key(
        256,
        "Positions of each row whose float32 logits exist at once; 0: all of them.",
        minimum=0,
    )
    balance: float = key(
        0.0,
        "Weight of the load-balancing loss of a mixture of experts; 0 leaves it out. Models name "
        "the one they were trained with in config.json (router_aux_loss_coef).",
        minimum=0,
    )

    @property
    def objective(self) -> Any:
        """The `Objective` of that name."""
        return load_named(self.name, OBJECTIVES, kind="objective", attribute="OBJECTIVE")

    @property
    def keys(self) -> Any:
        """The keys of that objective."""
        return getattr(self, self.name)

    @property
    def groups(self) -> dict[str, Any]:
        """Keys of objectives by name: of the one that is learnt, and all that were looked at."""
        touched = {name: value for name, value in vars(self).items() if _is_group(value)}
        # sft has no keys: whoever lists all of them need not wait for jax.
        return touched if self.name == "sft" else {self.name: self.keys} | touched

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the objective, its keys and its reference."""
        try:
            needed, keys = self.objective.reference, self.keys
        except ConfigError as error:
            yield from error.problems
            return
        yield from keys.problems() if hasattr(keys, "problems") else ()
        if needed and self.reference == "none":
            yield (
                f"objective.reference is 'none', but {self.name} compares with the weights that "
                "training starts from. Set --config.objective.reference=fixed or cached."
            )
        if not needed and self.reference in ("fixed", "cached"):
            yield (
                f"objective.reference is {self.reference!r}, but {self.name} compares with no "
                "other model. Leave it at auto."
            )
        for name, group in self.groups.items():
            changed = [item.path for item in walk(group) if item.value != item.default]
            if name != self.name and changed:
                yield (
                    f"objective.{name}.{changed[0]} is set, but objective.name is {self.name!r}. "
                    f"Set --config.objective.name={name}, or leave the key out."
                )

    @property
    def uses_reference(self) -> str:
        """Where log-probabilities of the starting weights come from; empty if none are needed."""
        needed = self.objective.reference
        return ("fixed" if self.reference == "auto" else self.reference) if needed else ""

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there yet: the keys of an objective, made when they are asked for.
        if name.startswith("_") or name not in (*OBJECTIVES, vars(self).get("name")):
            raise AttributeError(f"ObjectiveConfig has no key {name!r}")
        found = load_named(name, OBJECTIVES, kind="objective", attribute="OBJECTIVE")
        setattr(self, name, found.keys())
        return vars(self)[name]


def _is_group(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Learning rate, AdamW, clipping and freezing."""

    learning_rate: float = key(1e-5, "Peak learning rate.", minimum=0)
    schedule: str = key(
        "cosine",
        "Course after warm-up; 'wsd' is warm-up, stable, decay.",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    warmup_steps: int = key(0, "Steps of linear warm-up from zero.", minimum=0)
    decay_fraction: float = key(
        0.2, "For 'wsd': share of all steps spent in the decay.", minimum=0, maximum=1
    )
    final_ratio: float = key(
        0.0, "Last learning rate as a share of the peak.", minimum=0, maximum=1
    )
    weight_decay: float = key(0.01, "AdamW decay; never on norms and biases.", minimum=0)
    beta1: float = key(0.9, "Decay of the first moment.", minimum=0, maximum=0.999999)
    beta2: float = key(0.95, "Decay of the second moment.", minimum=0, maximum=0.999999)
    epsilon: float = key(1e-8, "Added to the root of the second moment.", minimum=1e-30)
    clip_norm: float = key(1.0, "Largest global gradient norm; 0: no clipping.", minimum=0)
    freeze: str = key(
        "", "Regular expression searched in parameter paths; what matches is not trained."
    )


@dataclass(kw_only=True, slots=True)
class MeshConfig:
    """Devices along each axis of the mesh; `stage` is of pipeline parallelism."""

    stage: int = key(0, "Devices on the axis; 0: left to the strategy; -1: all that remain.")
    data: int = key(0, "As above, for data parallelism, which goes over slices.")
    fsdp: int = key(0, "As above, for fully sharded data parallelism.")
    context: int = key(0, "As above, for the positions of a row.")
    expert: int = key(0, "As above, for the experts of a layer.")
    tensor: int = key(0, "As above, for tensor parallelism.")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Length of the run, and when it logs, saves and evaluates."""

    workdir: str = key("", "Folder that the run writes to.")
    steps: int = key(0, "Optimizer steps; 0: as many as train.epochs take.", minimum=0)
    epochs: float = key(1.0, "Passes over the training rows, when train.steps is 0.", minimum=0)
    batch_size: int = key(
        8, "Rows in one optimizer step, over all devices and micro-batches.", minimum=1
    )
    accumulation: int = key(
        1, "Micro-batches that batch_size is split into; does not change the result.", minimum=1
    )
    seed: int = key(0, "Seed of shuffling, random weights and sampling.")
    log_every: int = key(10, "Steps between lines of metrics.", minimum=1)
    save_every: int = key(500, "Steps between checkpoints; 0: only at the end.", minimum=0)
    eval_every: int = key(0, "Steps between evaluations; 0: at the end of each epoch.", minimum=0)
    keep_last: int = key(2, "Newest checkpoints that are kept, beside the best.", minimum=1)
    compilation_cache: str = key(
        "", "Folder of compiled programs; empty: ~/.cache/jaxft/xla; 'off': none."
    )
    compiler_options: str = key(
        "",
        "XLA's options for the training step, comma-separated: "
        "'xla_tpu_scoped_vmem_limit_kib=98304,xla_enable_async_all_gather=true'.",
    )
    wandb: str = key("", "Project that metrics also go to, if wandb is installed; empty: none.")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Evaluation, during training and as a command."""

    datasets: str = key(
        "",
        "More held-out data for `jaxft eval`: 'name=source', several separated by ';'. "
        "data.validation is evaluated under the name 'validation'.",
    )
    retention: str = key(
        "", "A source outside the task: what the model loses on it is printed beside its gain."
    )
    batch_size: int = key(0, "Rows in one evaluation step; 0: train.batch_size.", minimum=0)
    max_rows: int = key(
        0, "Evaluate a sample of so many rows, drawn by train.seed; 0: all rows.", minimum=0
    )
    best: str = key(
        "loss",
        "What the best checkpoint and patience go by: the validation 'loss', or the share of right "
        "'answers' to the validation data, which eval.answers generates.",
        choices=("loss", "answers"),
    )
    patience: int = key(
        0, "Evaluations without improvement before training stops; 0: never.", minimum=0
    )
    minimum_change: float = key(
        0.0,
        "Fall of the validation loss, or rise of the share of right answers, that counts as "
        "improvement.",
        minimum=0,
    )
    answers: str = key(
        "none",
        "Answers that each evaluation generates: 'exact' compares with the reference text, 'label' "
        "takes the answer as one of the labels found in the data.",
        choices=("none", "exact", "label"),
    )
    answer_rows: int = key(
        200,
        "Answers are generated for a sample of so many rows, drawn by train.seed; 0: all rows.",
        minimum=0,
    )
    max_new_tokens: int = key(64, "Longest generated answer, in tokens.", minimum=1)
    samples: int = key(
        3,
        "Prompts answered in the report, before training and by the checkpoint that an export "
        "takes.",
        minimum=0,
    )


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """All of a run. Mutable until `validate()`; `configs/*.py` return one from `get_config()`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    strategy: str = key(
        "fsdp",
        "Sharding strategy: a name from docs/sharding.md, or a module of yours that defines one.",
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self, *, training: bool = False) -> None:
        """Checks every key and every combination that needs no file, device or network.

        Args:
          training: Whether what only a training run needs must be there.

        Raises:
          ConfigError: With all problems found.
        """
        try:
            items = list(walk(self))
        except ConfigError as error:  # of an unknown objective, whose keys cannot be listed
            raise ConfigError([f"objective.name: {text}" for text in error.problems]) from error
        problems = [problem for item in items for problem in item.problems()]
        if all(item.is_typed for item in items):
            problems += self.objective.problems()
            problems += _combination_problems(self)
            problems += _training_problems(self) if training else []
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf of a config: where it is, what it holds and what is known about it."""

    path: str
    value: Any
    default: Any
    type: type
    meaning: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None

    @property
    def is_typed(self) -> bool:
        """Whether the value has the key's type; a whole number serves as a number."""
        return type(self.value) is self.type or (type(self.value) is int and self.type is float)

    @property
    def expected(self) -> str:
        """The type in words."""
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return names[self.type]

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with the value."""
        if not self.is_typed:
            yield f"{self.path} is {self.value!r}; expected {self.expected}."
            return
        if self.type is float and not math.isfinite(self.value):
            yield f"{self.path} is {self.value}; expected a finite number."
            return
        if self.choices and self.value not in self.choices:
            yield (
                f"{self.path} is {self.value!r}; expected one of {', '.join(self.choices)}."
                f"{nearest(str(self.value), self.choices)}"
            )
        if self.minimum is not None and not self.value >= self.minimum:
            yield f"{self.path} is {self.value}; expected at least {self.minimum}."
        if self.maximum is not None and not self.value <= self.maximum:
            yield f"{self.path} is {self.value}; expected at most {self.maximum}."


def walk(config: Any, prefix: str = "") -> Iterator[Item]:
    """Yields the leaves of a config dataclass in order of declaration."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        path = f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{path}.")
        else:
            yield Item(path, value, item.default, item.type, **item.metadata)  # pyright: ignore
    if isinstance(config, ObjectiveConfig):
        for name, group in config.groups.items():
            yield from walk(group, f"{prefix}{name}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns `{dotted path: value}`, the form in which a workdir and a checkpoint keep it."""
    return {item.path: item.value for item in walk(config)}


def from_dict(values: dict[str, Any]) -> RunConfig:
    """Inverse of `to_dict`; keys that are absent keep their default.

    Raises:
      ConfigError: For unknown keys, with the nearest known one.
    """
    config = RunConfig()
    if isinstance(name := values.get("objective.name"), str):
        config.objective.name = name  # decides which keys there are
    known = to_dict(config)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError([unknown_key(name) for name in unknown])
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return config


def unknown_key(name: str, *, prefix: str = "") -> str:
    """Says that there is no such key, with the nearest one, or all of its group.

    Args:
      name: What was written.
      prefix: Goes before each name in the message, such as `--config.`.
    """
    known = [item.path for item in walk(RunConfig())]
    told = f"Unknown key {prefix + name!r}"
    parts = name.split(".")
    if parts[0] == "objective" and len(parts) == 3:
        return (
            f"{prefix}{name} would be a key of the objective {parts[1]!r}. Set "
            f"{prefix}objective.name={parts[1]} with it, and see its keys with "
            f"`jaxft config --config.objective.name={parts[1]}`."
        )
    same_leaf = [path for path in known if path.rpartition(".")[2] == name]
    if same_leaf:
        return f"{told}. Did you mean {' or '.join(repr(prefix + path) for path in same_leaf)}?"
    group, dot, _ = name.rpartition(".")
    start = group + dot if any(path.startswith(group + dot) for path in known) else ""
    guess = nearest_of(
        name.removeprefix(start),
        [path.removeprefix(start) for path in known if path.startswith(start)],
    )
    if guess:
        return f"{told}. Did you mean {prefix + start + guess!r}?"
    parent = group if start else name
    members = [path.removeprefix(f"{parent}.") for path in known if path.startswith(f"{parent}.")]
    return f"{told}; {parent} has {', '.join(members)}." if members else f"{told}."


def describe(config: RunConfig) -> str:
    """Returns every key with its value and meaning as YAML, which `config_file` reads."""
    lines, group = [], ""
    for item in walk(config):
        parent, _, leaf = item.path.rpartition(".")
        if parent != group:
            lines += ["", f"{parent}:"] if parent else [""]
            group = parent
        indent = "  " if parent else ""
        choices = f" One of: {', '.join(item.choices)}." if item.choices else ""
        meaning = textwrap.wrap(item.meaning + choices, 78 - len(indent))
        lines += [f"{indent}# {line}" for line in meaning]
        changed = f"  # default: {yaml_value(item.default)}" if item.value != item.default else ""
        lines.append(f"{indent}{leaf}: {yaml_value(item.value)}{changed}")
    return "\n".join(lines).strip("\n")


def to_yaml(values: dict[str, Any]) -> str:
    """Returns `{dotted path: value}` as YAML, keys of a group together."""
    lines, group = [], ""
    for path, value in values.items():
        parent, _, leaf = path.rpartition(".")
        if parent not in ("", group):
            lines.append(f"{parent}:")
        group = parent
        lines.append(f"{'  ' if parent else ''}{leaf}: {yaml_value(value)}")
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """Returns one value as every version of YAML reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        digits, e, exponent = repr(value).partition("e")
        return f"{digits}{'' if '.' in digits or not e else '.0'}{e}{exponent}"
    if not isinstance(value, str):
        return str(value)
    if re.fullmatch(r"[A-Za-z][\w./+-]*", value) and value.lower() not in _YAML_WORDS:
        return value
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(plain)}"'


def _combination_problems(config: RunConfig) -> Iterator[str]:
    model, data, optim, train = config.model, config.data, config.optim, config.train
    if not model.path:
        yield "model.path is empty; name a folder or a repository id with --config.model.path=…."
    problems: list[str] = []
    with collected(problems):
        activations.kept(model.remat)
        activations.offloaded(model.remat, model.offload)
    with collected(problems):
        compiler_options(train.compiler_options)
    yield from problems
    added = model.added_tokens
    if not all(added) or len(set(added)) < len(added):
        yield f"model.add_tokens {model.add_tokens!r} has an empty or a repeated token."
    if train.batch_size % train.accumulation:
        yield (
            f"train.batch_size {train.batch_size} is not divisible by train.accumulation "
            f"{train.accumulation}; it counts the rows of all micro-batches together."
        )
    if not train.steps and not train.epochs:
        yield (
            "train.steps and train.epochs are both 0; set --config.train.steps=… or "
            "--config.train.epochs=…."
        )
    if train.steps and optim.warmup_steps > train.steps:
        yield f"optim.warmup_steps {optim.warmup_steps} exceeds train.steps {train.steps}."
    if data.format == "columns" and not data.columns:
        yield (
            "data.format is 'columns' but data.columns is empty; set "
            "--config.data.columns=prompt=…,completion=…."
        )
    if data.columns and data.format not in _COLUMN_FORMATS:
        yield (
            f"data.columns is set, but data.format is {data.format!r}; set "
            "--config.data.format=columns, or preference or labelled for answers to be compared."
        )
    yield from _held_out_problems(config)
    if config.eval.patience and not data.validation:
        yield (
            "eval.patience stops on figures of the validation data, but data.validation is empty; "
            "set --config.data.validation=…."
        )
    if config.eval.best == "answers" and config.eval.answers == "none":
        yield (
            "eval.best is 'answers', but none are generated; set --config.eval.answers=label or "
            "--config.eval.answers=exact."
        )
    try:
        re.compile(optim.freeze)
    except re.error as error:
        yield f"optim.freeze {optim.freeze!r} is not a regular expression: {error}."
    sizes = [item for item in walk(config.mesh, "mesh.") if item.value == -1]
    if len(sizes) > 1:
        yield f"Only one mesh axis can be -1, not {', '.join(item.path for item in sizes)}."
    for item in walk(config.mesh, "mesh."):
        if item.value < -1:
            yield f"{item.path} is {item.value}; expected a device count, 0 or -1."


_YES = re.compile(r"\s*(true|yes|on)\s*", re.IGNORECASE)
_NUMBER = re.compile(r"\s*-?\d*\.?\d+\s*")
_PERCENTAGE = re.compile(r"\s*(?P<number>-?\d*\.?\d+)\s*%\s*(?P<rest>[:,].*)?", re.DOTALL)


def held_out_share(text: str) -> float:
    """Returns the share of the training data that `data.validation` such as '5%' holds out, or 0.

    Raises:
      ConfigError: If it is a percentage that leaves nothing on either side, or if it is a
        number, or has options.
    """
    if _YES.fullmatch(text) or _NUMBER.fullmatch(text):
        share = 0.1 if _YES.fullmatch(text) else float(text)
        percent = f"{100 * share if share < 1 else share:g}%" if share > 0 else "10%"
        raise ConfigError(
            f"data.validation is {text!r}; expected files, a hub data set or a percentage. For a "
            f"part of the training data write --config.data.validation={percent}, for a file of "
            f"that name ./{text.strip()}."
        )
    match = _PERCENTAGE.fullmatch(text)
    if match is None:
        return 0.0
    if match["rest"]:
        raise ConfigError(
            f"data.validation is {text!r}; a percentage stands alone, without {match['rest']!r}. "
            "Limits and weights of the training data are written in data.train."
        )
    share = float(match["number"]) / 100
    if not 0 < share < 1:
        raise ConfigError(
            f"data.validation is {text!r}; expected more than 0% and less than 100% of the "
            "training data."
        )
    return share


def _held_out_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    with collected(problems):
        if held_out_share(config.data.validation) and not config.data.train:
            problems.append(
                f"data.validation is {config.data.validation!r}, a part of the training data, but "
                "data.train is empty; name it with --config.data.train=…."
            )
    others = [("eval.retention", config.eval.retention)]
    with collected(problems):
        others += [("eval.datasets", source) for source in data_sets(config.eval.datasets).values()]
    problems += [
        f"{name} has {text!r}; only data.validation can be a part of the training data."
        for name, text in others
        if _PERCENTAGE.fullmatch(text)
    ]
    return problems


_RESERVED_NAMES = {"validation": "data.validation", "retention": "eval.retention"}
"""Names of held-out sets that have a key of their own."""


def data_sets(text: str) -> dict[str, str]:
    """Reads `eval.datasets`: sources by name.

    Raises:
      ConfigError: For what is not of the form 'name=source;…', and names that are taken.
    """
    sources: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        name, _, source = (piece.strip() for piece in part.partition("="))
        if not (name and source):
            raise ConfigError(
                f"eval.datasets has {part!r}; expected 'name=source', several separated by ';'."
            )
        if name in _RESERVED_NAMES:
            raise ConfigError(
                f"eval.datasets has {part!r}, but {name!r} is the name of {_RESERVED_NAMES[name]}: "
                f"set --config.{_RESERVED_NAMES[name]}={source}, or give the set another name."
            )
        if name in sources:
            raise ConfigError(
                f"eval.datasets uses the name {name!r} twice, for {sources[name]!r} and for "
                f"{source!r}; give each set a name of its own."
            )
        sources[name] = source
    return sources


def compiler_options(text: str) -> dict[str, str | bool]:
    """Reads `train.compiler_options`.

    Raises:
      ConfigError: For what is not of the form name=value.
    """
    options: dict[str, str | bool] = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.strip().removeprefix("--").partition("=")
        if not (name and equals and value) or " " in value:
            raise ConfigError(
                f"train.compiler_options has {part!r}; expected 'xla_name=value', comma-separated."
            )
        options[name] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def _training_problems(config: RunConfig) -> Iterator[str]:
    if not config.data.train:
        yield "data.train is empty; name files or a hub data set with --config.data.train=…."
    if config.eval.answers != "none" and not config.data.validation:
        yield (
            f"eval.answers is {config.eval.answers!r}, which a training run compares with the "
            "validation data, but data.validation is empty; set --config.data.validation=…, or "
            "--config.eval.answers=none."
        )
    if not config.optim.learning_rate:
        yield "optim.learning_rate is 0; nothing would train. Set --config.optim.learning_rate=…."
    if not config.train.workdir:
        yield "train.workdir is empty; name the folder of the run with --config.train.workdir=…."
