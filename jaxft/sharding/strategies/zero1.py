"""ZeRO stage 1: as `ddp`, but each device keeps the optimizer's state of a part of each weight.

    parameters, gradients   replicated
    optimizer state         split over `data` along the embedding dimension
    rows                    split over `data`

Collectives to expect: an all-reduce of the gradients a micro-batch, and an all-gather of the
updated weights a step.
Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data",),
    fill="data",
    rules={"batch": "data"},
    moments={"embed": "data", "latent": if_divisible("data")},
)
