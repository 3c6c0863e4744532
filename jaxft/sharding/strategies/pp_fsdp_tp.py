"""Pipeline parallel over `stage`; within each stage `fsdp_tp`.

    layers                   split over `stage`
    heads, mlp               split over `tensor`; key heads if it divides them
    embedding dimension      split over `fsdp`
    vocabulary               split over `stage` and `tensor` if they divide it
    rows of a micro-batch    split over `data` and `fsdp`

Collectives to expect: those of `pp` between stages; within a stage those of `fsdp_tp`, once in each
turn.
Source: Narayanan et al., Megatron-LM, https://arxiv.org/abs/2104.04473.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("stage", "data", "fsdp", "tensor"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp"),
        "layers": "stage",
        "act_heads": "tensor",
        "act_kv_heads": if_divisible("tensor"),
        "act_mlp": "tensor",
        "act_vocab": if_divisible("stage", "tensor"),
        "embed": "fsdp",
        "latent": if_divisible("fsdp"),
        "heads": "tensor",
        "kv_heads": if_divisible("tensor"),
        "mlp": "tensor",
        "vocab": if_divisible("stage", "tensor"),
    },
)
