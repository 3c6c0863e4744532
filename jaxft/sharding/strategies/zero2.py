"""ZeRO stage 2: as `zero1`, and each device sums the gradients of its part of each weight alone.

    parameters                   replicated
    gradients, optimizer state   split over `data` along the embedding dimension
    rows                         split over `data`

Collectives to expect: a reduce-scatter of the gradients a micro-batch, half the bytes of `ddp`, and
an all-gather of the updated float32 weights a step.
Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data",),
    fill="data",
    rules={"batch": "data"},
    gradients={"embed": "data", "latent": if_divisible("data")},
    moments={"embed": "data", "latent": if_divisible("data")},
)
