"""jaxft: fine-tune language models with JAX and Flax on TPUs and GPUs."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from jaxft.config import RunConfig as RunConfig
    from jaxft.errors import JaxftError as JaxftError
    from jaxft.programs.comparison import compare as compare
    from jaxft.programs.evaluation import evaluate as evaluate
    from jaxft.programs.exporter import export as export
    from jaxft.programs.model import Model as Model
    from jaxft.programs.model import load as load
    from jaxft.programs.trainer import train as train
    from jaxft.workdir.result import TrainResult as TrainResult

# Imported on first use: `import jaxft` stays instant, and jax is not set up before it is needed.
_HOMES = {
    "JaxftError": "jaxft.errors",
    "Model": "jaxft.programs.model",
    "RunConfig": "jaxft.config",
    "TrainResult": "jaxft.workdir.result",
    "compare": "jaxft.programs.comparison",
    "evaluate": "jaxft.programs.evaluation",
    "export": "jaxft.programs.exporter",
    "load": "jaxft.programs.model",
    "train": "jaxft.programs.trainer",
}
__all__ = [
    "JaxftError",
    "Model",
    "RunConfig",
    "TrainResult",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("jaxft")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
