"""Megatron tensor parallel: each device holds a part of the heads and of the hidden width.

    heads, mlp, vocabulary   split over `tensor`; key heads and vocabulary if it divides them
    residual stream          replicated over `tensor`
    rows                     split over `data`

Collectives to expect: over `tensor`, an all-reduce of the residual stream after attention and after
the feed-forward part in the forward pass, and before each in the backward pass; over `data` an
all-reduce of gradients.
Source: Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "tensor"),
    fill="tensor",
    rules={
        "batch": "data",
        "act_heads": "tensor",
        "act_kv_heads": if_divisible("tensor"),
        "act_mlp": "tensor",
        "act_vocab": if_divisible("tensor"),
        "heads": "tensor",
        "kv_heads": if_divisible("tensor"),
        "mlp": "tensor",
        "vocab": if_divisible("tensor"),
    },
)
