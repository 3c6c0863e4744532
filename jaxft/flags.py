"""Reading a config file and the `--config.<key>=<value>` flags that change it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxft.config import RunConfig, unknown_key, walk
from jaxft.errors import ConfigError, nearest


def read_config(
    file: str, overrides: Sequence[str], *, validate: bool = True, training: bool = False
) -> RunConfig:
    """Returns the config of a file (the defaults without one), with overrides applied.

    Args:
      file: Python file whose `get_config()` returns a `RunConfig`; empty: all defaults.
      overrides: Flags such as `--config.optim.learning_rate=2e-5`.
      validate: Whether the result is checked.
      training: Whether what only training needs must be there.

    Raises:
      ConfigError: For a file that cannot be used, and for all unknown keys and wrong types at once.
    """
    config = _load(file) if file else RunConfig()
    problems = []
    for override in overrides:
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


def _load(file: str) -> RunConfig:
    path = Path(file)
    if not path.is_file():
        known = [str(p) for p in Path("configs").glob("*.py")]
        raise ConfigError(f"There is no config file {file!r}.{nearest(file, known)}")
    spec = importlib.util.spec_from_file_location("jaxft_run_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise ConfigError(
            f"{file}: {type(error).__name__}: {error}. A config file defines get_config(), which "
            "returns a jaxft.RunConfig."
        ) from error
    if not isinstance(config, RunConfig):
        raise ConfigError(
            f"{file}: get_config() returned a {type(config).__name__}; expected a jaxft.RunConfig."
        )
    return config


def _apply(config: RunConfig, override: str) -> RunConfig:
    """Parses one flag by `ml_collections`, which checks the field's type."""
    items = {item.path: item for item in walk(config)}
    key = override.partition("=")[0].removeprefix("--config.")
    if key not in items:
        raise ConfigError(unknown_key(key))
    values = flags.FlagValues()
    argv = ["jaxft", override]
    try:
        holder = config_flags.DEFINE_config_dataclass(
            "config", config, flag_values=values, sys_argv=argv
        )
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        value = override.partition("=")[2]
        raise ConfigError(f"{key} is {value!r}; expected {items[key].expected}.") from error
    return holder.value
