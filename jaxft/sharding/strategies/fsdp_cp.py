"""Fully sharded data parallel over `fsdp` and `context`, context parallel over `context`.

    rows                          split over `data` and `fsdp`, their positions over `context`
    embedding dimension           split over `fsdp` and `context`, whose devices read different
                                  tokens and so need not hold the same weights

Collectives to expect: those of `fsdp` over both axes, and those of `cp` for keys and values.
Source: Liu et al., Ring Attention, https://arxiv.org/abs/2310.01889.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "fsdp", "context"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp"),
        "seq": "context",
        "stream_seq": "context",
        "embed": ("fsdp", "context"),
        "latent": if_divisible("fsdp", "context"),
    },
)
