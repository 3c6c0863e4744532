"""The description of a run: nested dataclasses, each key with its default, meaning and check."""

from jaxft.config.adapter import AdapterConfig
from jaxft.config.keys import Item, key, to_dict, walk
from jaxft.config.optim import OptimConfig
from jaxft.config.run import RunConfig, from_dict, unknown_key
from jaxft.config.sections import (
    FORMATS,
    OBJECTIVES,
    OVERLENGTH,
    TEXT_SPLITS,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from jaxft.config.text import describe, to_yaml, yaml_value
from jaxft.config.values import compiler_options, data_sets, held_out_share

__all__ = [
    "FORMATS",
    "OBJECTIVES",
    "OVERLENGTH",
    "TEXT_SPLITS",
    "AdapterConfig",
    "DataConfig",
    "EvalConfig",
    "Item",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "compiler_options",
    "data_sets",
    "describe",
    "from_dict",
    "held_out_share",
    "key",
    "to_dict",
    "to_yaml",
    "unknown_key",
    "walk",
    "yaml_value",
]
