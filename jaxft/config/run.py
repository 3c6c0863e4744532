"""The description of a whole run, and what is wrong with it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxft.config.adapter import AdapterConfig
from jaxft.config.keys import key, to_dict, walk
from jaxft.config.optim import OptimConfig
from jaxft.config.sections import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from jaxft.config.values import (
    PERCENTAGE,
    compiler_options,
    data_sets,
    held_out_share,
)
from jaxft.errors import ConfigError, collected, nearest_of
from jaxft.models import activations

# Formats whose columns can have other names.
_COLUMN_FORMATS = ("columns", "text", "preference", "labelled")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """All of a run. `configs/*.py` return one from `get_config()`.

    Mutable until `validate()`; later a run puts what it chose in the place of `model.remat=auto`.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    strategy: str = key(
        "fsdp",
        "Sharding strategy: a name from docs/sharding.md, or a module of yours that defines one.",
    )
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def validate(self, *, training: bool = False, evaluation: bool = False) -> None:
        """Checks every key and every combination that needs no file, device or network.

        Args:
          training: Whether what only a training run needs must be there.
          evaluation: Whether nothing learns, so that all weights may be in codes.

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
            problems += self.optim.problems()
            problems += _combination_problems(self)
            problems += [] if evaluation else _learning_problems(self)
            problems += _training_problems(self) if training else []
        if problems:
            raise ConfigError(problems)


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
        raise ConfigError([unknown_key(name, config) for name in unknown])
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return config


def unknown_key(name: str, config: RunConfig | None = None, *, prefix: str = "") -> str:
    """Says that there is no such key, with the nearest one, or all of its group.

    Args:
      name: What was written.
      config: The run, whose objective decides which keys there are; None for the defaults.
      prefix: Goes before each name in the message, such as `--config.`.
    """
    config = config or RunConfig()
    known = [item.path for item in walk(config)]
    told = f"Unknown key {prefix + name!r}"
    group, dot, leaf = name.rpartition(".")
    start = group + dot if any(path.startswith(group + dot) for path in known) else ""
    if group.startswith("objective."):
        return _unknown_key_of_objective(name, config, prefix=prefix)
    same_leaf = [
        path for path in known if path.rpartition(".")[2] == leaf and path.startswith(group + dot)
    ]
    if same_leaf:
        return f"{told}. Did you mean {' or '.join(repr(prefix + path) for path in same_leaf)}?"
    groups = [path.rpartition(".")[0] for path in known if path.rpartition(".")[2] == leaf]
    if not start and group and (meant := nearest_of(group, groups)):
        return f"{told}. Did you mean {f'{prefix}{meant}.{leaf}'!r}?"
    guess = nearest_of(
        name.removeprefix(start),
        [path.removeprefix(start) for path in known if path.startswith(start)],
    )
    if guess:
        return f"{told}. Did you mean {prefix + start + guess!r}?"
    parent = group if start else name
    members = [path.removeprefix(f"{parent}.") for path in known if path.startswith(f"{parent}.")]
    return f"{told}; {parent} has {', '.join(members)}." if members else f"{told}."


def _unknown_key_of_objective(name: str, config: RunConfig, *, prefix: str) -> str:
    """Says which keys the objective has, or that the key is of an objective that is not learnt."""
    *parts, leaf = name.removeprefix("objective.").split(".")
    objective, learnt = ".".join(parts), config.objective.name
    group = learnt.rpartition(".")[2]
    if objective not in (learnt, group):
        written = f", write it {prefix}objective.{parts[-1]}.{leaf}" if len(parts) > 1 else ""
        return (
            f"{prefix}{name} would be a key of the objective {objective!r}, but objective.name is "
            f"{learnt!r}. Set {prefix}objective.name={objective} with it{written}, and see its "
            f"keys with `jaxft train --print_config --config.objective.name={objective}`."
        )
    keys = [item.path for item in walk(config.objective.keys)]
    guess = nearest_of(leaf, keys)
    meant = f" Did you mean {f'{prefix}objective.{group}.{guess}'!r}?" if guess else ""
    has = f"has {', '.join(keys)}" if keys else "has no keys"
    return f"Unknown key {prefix + name!r}; {learnt} {has}.{meant}"


def _combination_problems(config: RunConfig) -> Iterator[str]:
    model, data, optim, train = config.model, config.data, config.optim, config.train
    if not model.path:
        yield "model.path is empty; name a folder or a repository id with --config.model.path=…."
    problems: list[str] = []
    with collected(problems):
        activations.check(model.remat, model.offload)
    with collected(problems):
        compiler_options(train.compiler_options)
    yield from problems
    added = model.added_tokens
    if not all(added) or len(set(added)) < len(added):
        yield f"model.add_tokens {model.add_tokens!r} has an empty or a repeated token."
    if model.matmul and model.quantise:
        yield (
            f"model.matmul is {model.matmul!r} and model.quantise {model.quantise!r}: codes that "
            "have a scale for each block of inputs cannot be multiplied as they are, and weights "
            "would be rounded twice. Leave one of the two out."
        )
    if model.matmul and config.objective.uses_reference == "cached":
        yield (
            f"objective.reference is 'cached', which is computed without model.matmul "
            f"{model.matmul!r}: what training learns from would be the difference that rounding "
            "makes too. Set --config.objective.reference=fixed, or leave model.matmul out."
        )
    if model.expert_capacity and config.objective.uses_reference == "cached":
        yield (
            f"objective.reference is 'cached', but model.expert_capacity {model.expert_capacity:g} "
            "drops tokens in training by what else a batch holds, which nothing computed before "
            "can know. Set --config.objective.reference=fixed, or --config.model.expert_capacity=0."
        )
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
    for name, pattern in (
        ("optim.freeze", optim.freeze),
        ("adapter.targets", config.adapter.targets),
        ("adapter.train", config.adapter.train),
    ):
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{name} {pattern!r} is not a regular expression: {error}."
    yield from _adapter_problems(config)
    sizes = [item for item in walk(config.mesh, "mesh.") if item.value == -1]
    if len(sizes) > 1:
        yield f"Only one mesh axis can be -1, not {', '.join(item.path for item in sizes)}."
    for item in walk(config.mesh, "mesh."):
        if item.value < -1:
            yield f"{item.path} is {item.value}; expected a device count, 0 or -1."


def _adapter_problems(config: RunConfig) -> Iterator[str]:
    adapter = config.adapter
    problems: list[str] = []
    with collected(problems):
        adapter.ranks_by_pattern()
    with collected(problems):
        adapter.alphas_by_pattern()
    yield from problems
    if adapter.targets.startswith(('["', "['")):
        yield (
            f"adapter.targets {adapter.targets!r} is a list; expected a regular expression, in "
            "which it is one character of many. Separate names by '|': 'q_proj|v_proj'."
        )
    if config.model.random_init and config.model.quantise:
        yield (
            "model.quantise reads the weights of a model in codes, and model.random_init has none "
            "that could be read again. Leave one of the two out."
        )
    if adapter.added_rows and not config.model.add_tokens:
        yield (
            "adapter.added_rows trains the rows of added tokens, but model.add_tokens is empty; "
            "name them, or leave the key out."
        )
    changed = [
        item.path
        for item in walk(adapter)
        if item.value != item.default and item.path not in ("train", "added_rows", "ranks")
    ]
    if adapter.path:
        changed = [name for name in changed if name not in ("path", "dropout")]
        changed += [name for name in ("train", "added_rows", "ranks") if getattr(adapter, name)]
        if changed:
            yield (
                f"adapter.{changed[0]} is set, but adapter.path names an adapter that has its own. "
                "Leave one of the two out."
            )
        if config.model.random_init:
            yield "adapter.path is an adapter of a trained model; leave model.random_init out."
        for name in ("tokenizer", "add_tokens"):
            if getattr(config.model, name):
                yield (
                    f"model.{name} is set, but adapter.path names an adapter that has its own "
                    "tokenizer, or that of its model. Leave one of the two out."
                )
        return
    if changed and not (adapter.rank or adapter.ranks):
        yield (
            f"adapter.{changed[0]} is set, but adapter.rank is 0: there is no adapter. Set "
            "--config.adapter.rank=16, or leave the key out."
        )


def _learning_problems(config: RunConfig) -> Iterator[str]:
    if config.model.quantise and not config.adapter.is_used:
        yield (
            f"model.quantise is {config.model.quantise!r}, but nothing learns beside the quantised "
            "weights, which cannot train. Set --config.adapter.rank=16, or leave the key out."
        )


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
        if PERCENTAGE.fullmatch(text)
    ]
    return problems


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
