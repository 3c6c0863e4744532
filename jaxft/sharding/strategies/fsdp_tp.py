"""Fully sharded data parallel over `fsdp`, Megatron tensor parallel over `tensor`.

    heads, mlp, vocabulary   split over `tensor`; key heads and vocabulary if it divides them
    embedding dimension      split over `fsdp`
    residual stream          replicated over `tensor`
    rows                     split over `data` and `fsdp`

Collectives to expect: those of `fsdp` on a `tensor`-th of each weight, and those of `tp`.
Source: Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "fsdp", "tensor"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp"),
        "act_heads": "tensor",
        "act_kv_heads": if_divisible("tensor"),
        "act_mlp": "tensor",
        "act_vocab": if_divisible("tensor"),
        "embed": "fsdp",
        "latent": if_divisible("fsdp"),
        "heads": "tensor",
        "kv_heads": if_divisible("tensor"),
        "mlp": "tensor",
        "vocab": if_divisible("tensor"),
    },
)
