"""Sequence parallel: `fsdp_tp`, with the residual stream split over `tensor` along positions.

    heads, mlp, vocabulary   split over `tensor`; key heads and vocabulary if it divides them
    embedding dimension      split over `fsdp`
    residual stream, norms   positions split over `tensor`: no device does another's work again,
                             and what a layer keeps for its backward pass is a `tensor`-th
    rows                     split over `data` and `fsdp`

Collectives to expect: those of `fsdp`; in place of each all-reduce of `tp` an all-gather before and
a reduce-scatter after each part of a layer, and one more all-gather in the backward pass. XLA for
CPU sums activations whole in place of scattering them.
Source: Korthikanti et al., https://arxiv.org/abs/2205.05198.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "fsdp", "tensor"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp"),
        "stream_seq": "tensor",
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
