"""Fully sharded data parallel over `fsdp`, expert parallel over `expert`.

    experts                split over `expert`
    embedding dimension    split over `fsdp`, of experts and of all other weights
    rows                   split over `data`, `fsdp` and `expert`

Collectives to expect: those of `fsdp`, on an `expert`-th of the experts' weights; the all-to-alls
of `ep`; an all-reduce over `data` of what is left of the gradients, of all weights but the experts'
over `expert`, too.
Source: Lepikhin et al., GShard, https://arxiv.org/abs/2006.16668.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "fsdp", "expert"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp", "expert"),
        "act_experts": "expert",
        "embed": "fsdp",
        "latent": if_divisible("fsdp"),
        "experts": "expert",
    },
)
