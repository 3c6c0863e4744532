"""Reading a config file and the `--config.<key>=<value>` flags that change it."""

import re
from collections.abc import Collection, Sequence

from absl import flags
from ml_collections import config_flags

from jaxft.config import RunConfig, unknown_key, walk
from jaxft.config_file import read_file
from jaxft.errors import ConfigError, nearest_of

_PREFIX = "--config."
_OBJECTIVE = f"{_PREFIX}objective.name="
_OF_OBJECTIVE = re.compile(r"--config\.objective\.[^=.]+\.")


def take_overrides(words: Sequence[str], options: Collection[str] = ()) -> list[str]:
    """Returns `--config.<key>=<value>` for the flags among the words that set a key.

    `--optim.learning_rate=2e-5` and `--strategy=tp` are short for the same with `--config.`; a
    value may be a word of its own.

    Args:
      words: What the command line has beside its own options.
      options: These, for suggestions.

    Raises:
      ConfigError: For everything else, with what may have been meant.
    """
    found, unknown = [], []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if not _sets_key(name):
            unknown.append(_unknown(word, options))
            continue
        if not equals:
            value = next(left, "")
            if not value or value.startswith("--"):
                is_switch = _key(name) in {i.path for i in walk(RunConfig()) if i.type is bool}
                example = "true" if is_switch else "…"
                raise ConfigError(f"{name} has no value; write {name}={example}.")
        found.append(f"{_PREFIX}{_key(name)}={value}")
    if unknown:
        raise ConfigError(unknown)
    return found


def _key(name: str) -> str:
    return name.removeprefix(_PREFIX).removeprefix("--")


def _sets_key(name: str) -> bool:
    """Whether a flag names a key, or at least a group of keys, that a message can then explain."""
    if name.startswith(_PREFIX):
        return True
    known = {item.path for item in walk(RunConfig())}
    groups = {path.partition(".")[0] for path in known}
    return name.startswith("--") and _key(name).partition(".")[0] in groups


def _unknown(word: str, options: Collection[str]) -> str:
    """Says that there is no such flag; the last part of a key alone gets the whole key."""
    name, equals, value = word.partition("=")
    leaves: dict[str, list[str]] = {}
    for item in walk(RunConfig()):
        flag = f"{_PREFIX}{item.path}{equals}{value}"
        leaves.setdefault(f"--{item.path.rpartition('.')[2]}", []).append(flag)
    if name in leaves:
        return f"Unknown argument {word!r}. Did you mean {' or '.join(leaves[name])}?"
    if "." in name and name.startswith("--"):
        return unknown_key(_key(name), prefix=_PREFIX)
    guess = nearest_of(name, [*options, *leaves])
    meant = " or ".join(leaves.get(guess, [repr(guess)]))
    return f"Unknown argument {word!r}." + (f" Did you mean {meant}?" if guess else "")


def read_config(
    file: str, overrides: Sequence[str], *, validate: bool = True, training: bool = False
) -> RunConfig:
    """Returns the config of a file (the defaults without one), with overrides applied.

    Args:
      file: As `config_file.read_file` takes; empty: all defaults.
      overrides: Flags such as `--config.optim.learning_rate=2e-5`.
      validate: Whether the result is checked.
      training: Whether what only training needs must be there.

    Raises:
      ConfigError: For a file that cannot be used, and for all unknown keys and wrong types at once.
    """
    config = read_file(file) if file else RunConfig()
    problems = []
    # The objective decides which keys there are.
    names = [text for text in overrides if text.startswith(_OBJECTIVE)]
    others = [text for text in overrides if not text.startswith(_OBJECTIVE)]
    for override in names[-1:]:
        config = _apply(config, override)
    try:
        list(walk(config))
    except ConfigError as error:
        problems += [f"objective.name: {text}" for text in error.problems]
        config.objective.name = RunConfig().objective.name
        others = [text for text in others if not _OF_OBJECTIVE.match(text)]
        validate = False
    for override in others:
        try:
            config = _apply(config, override)
        except ConfigError as error:
            problems += error.problems
    try:
        if validate:
            config.validate(training=training)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return config


def _apply(config: RunConfig, override: str) -> RunConfig:
    """Parses one flag by `ml_collections`, which checks the field's type."""
    key, _, value = override.removeprefix(_PREFIX).partition("=")
    items = {item.path: item for item in walk(config)}
    if key not in items:
        raise ConfigError(unknown_key(key, config, prefix=_PREFIX))
    *parents, leaf = key.split(".")
    group = config
    for name in parents:
        group = getattr(group, name)
    values = flags.FlagValues()
    argv = ["jaxft", f"{_PREFIX}{leaf}={value}"]
    try:
        holder = config_flags.DEFINE_config_dataclass(
            "config", group, flag_values=values, sys_argv=argv
        )
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{key} is {value!r}; expected {items[key].expected}.") from error
    setattr(group, leaf, getattr(holder.value, leaf))
    return config
