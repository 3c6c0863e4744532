"""jaxft: fine-tune language models with JAX and Flax on TPUs and GPUs."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from jaxft.config import RunConfig as RunConfig
    from jaxft.errors import JaxftError as JaxftError
    from jaxft.evaluation import compare as compare
    from jaxft.evaluation import evaluate as evaluate
    from jaxft.exporter import export as export
    from jaxft.model import Model as Model
    from jaxft.model import load as load
    from jaxft.trainer import TrainResult as TrainResult
    from jaxft.trainer import train as train

# Imported on first use: `import jaxft` stays instant, and jax is not set up before it is needed.
_HOMES = {
    "JaxftError": "jaxft.errors",
    "Model": "jaxft.model",
    "RunConfig": "jaxft.config",
    "TrainResult": "jaxft.trainer",
    "compare": "jaxft.evaluation",
    "evaluate": "jaxft.evaluation",
    "export": "jaxft.exporter",
    "load": "jaxft.model",
    "train": "jaxft.trainer",
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
