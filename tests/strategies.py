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
# What these split is in mixtures of experts alone.
FOR_EXPERTS = ("ep", "fsdp_ep")
# Between them these have attention, experts and a recurrence, with and without what goes with them.
UNLIKE = ("llama", "gpt2", "gpt_oss", "qwen3_5_text")
# A dense family and a mixture run under every strategy; others, as each pair takes 5 to 20 s, under
# those that between them have every axis of a mesh.
EVERY_STRATEGY = ("llama", "gpt_oss")
OF_ALL_AXES = ("fsdp_tp_sp", "fsdp_cp", "pp_fsdp_tp", "fsdp_ep")
# Families that consist of parts which others have, in another order or with other numbers: of
# mixtures experts are split, and others take turns in being split by sequence or into stages. A
# family that adds a parameter with an axis of its own, or a way to compute, is not one of them.
COMPOSED = (
    "cohere",
    "cohere2",
    "deepseek_v2",
    "exaone4",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "granite",
    "hunyuan_v1_dense",
    "ministral",
    "ministral3",
    "nanochat",
    "olmo3",
    "qwen3_5_moe_text",
    "qwen3_next",
    "seed_oss",
    "smollm3",
)
# Families whose first layers differ from the others, so that no pipeline can cut them.
IN_ONE_STAGE = ("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite")
BUILT_IN = tuple(module.name for module in pkgutil.iter_modules(strategies.__path__))


def runs(strategy: str, family: str, *, mixture: bool) -> bool:
    """Returns whether tests of every strategy with every family have this pair.

    Args:
      strategy: A built-in one.
      family: Key of the table of families.
      mixture: Whether its models have experts.
    """
    if strategy in FOR_EXPERTS and not mixture:
        return False
    if family in IN_ONE_STAGE and "stage" in MESHES[strategy]:
        return False
    if family in EVERY_STRATEGY:
        return True
    if family in COMPOSED:
        in_turn = ("fsdp_tp_sp", "pp_fsdp_tp")[COMPOSED.index(family) % 2]
        return strategy == ("fsdp_ep" if mixture else in_turn)
    return strategy in OF_ALL_AXES
