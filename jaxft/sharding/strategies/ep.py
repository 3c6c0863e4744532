"""Expert parallel: each device holds some of the experts of each layer, and all other weights.

    experts                split over `expert`
    all other parameters   replicated
    rows                   split over `data` and `expert`

Collectives to expect: in each layer an all-to-all over `expert` that brings tokens to their experts
and one that brings them back, in both passes; an all-reduce of gradients, those of experts over
`data` alone.
Source: Lepikhin et al., GShard, https://arxiv.org/abs/2006.16668.
"""

from jaxft.sharding.rules import Strategy

STRATEGY = Strategy(
    mesh_axes=("data", "expert"),
    fill="expert",
    rules={
        "batch": ("data", "expert"),
        "act_experts": "expert",
        "experts": "expert",
    },
)
