"""Finds the configs of the demo's runs, which live in `configs/` of a checkout."""

import runpy
from pathlib import Path

from jaxft.config import RunConfig
from jaxft.errors import ConfigError


def load_run(name: str) -> RunConfig:
    """Returns the config of `configs/<name>.py`.

    Raises:
      ConfigError: Outside a checkout; an installed package does not carry `configs/`.
    """
    path = Path("configs") / f"{name}.py"
    if not path.is_file():
        raise ConfigError(
            f"{path} is not in {Path.cwd()}. The demo is run in the root of a checkout of jaxft."
        )
    return runpy.run_path(str(path))["get_config"]()
