"""Compilation: the options that a run names, and where programs are kept."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxft.errors import ConfigError


@contextlib.contextmanager
def refused_options() -> Iterator[None]:
    """Turns what the compiler says of `train.compiler_options` into a ConfigError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error) or "While setting option" in str(error):
            raise ConfigError(f"train.compiler_options: {error}") from error
        raise


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs on disk between runs; `off` keeps none."""
    if folder == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return
    path = Path(folder or "~/.cache/jaxft/xla").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
