"""Meshes of eight devices for the built-in strategies, and which models a strategy is for."""

import pkgutil

from jaxft.sharding import strategies

# Every axis that a strategy has is of two devices at least, as far as eight suffice.
MESHES: dict[str, dict[str, int]] = {
    "ddp": {"data": 8},
    "zero1": {"data": 8},
    "zero2": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 4},
    "hsdp": {"data": 2, "fsdp": 4},
    "tp": {"data": 2, "tensor": 4},
    "fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tp_sp": {"data": 2, "fsdp": 2, "tensor": 2},
    "cp": {"data": 2, "context": 4},
    "fsdp_cp": {"data": 2, "fsdp": 2, "context": 2},
    "ep": {"data": 2, "expert": 4},
    "fsdp_ep": {"data": 2, "fsdp": 2, "expert": 2},
    "pp": {"stage": 2, "data": 4},
    "pp_fsdp_tp": {"stage": 2, "data": 1, "fsdp": 2, "tensor": 2},
}
# What they split is in mixtures of experts alone.
FOR_EXPERTS = ("ep", "fsdp_ep")
BUILT_IN = tuple(module.name for module in pkgutil.iter_modules(strategies.__path__))
