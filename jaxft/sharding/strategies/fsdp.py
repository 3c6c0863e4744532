"""Fully sharded data parallel (ZeRO-3): every device holds a part of each weight and of the rows.

    parameters, gradients, optimizer state   split over `fsdp` along the embedding dimension,
                                             replicated over `data`
    rows                                     split over `data` and `fsdp`

Collectives to expect: an all-gather of each layer's weights in the forward and again in the
backward pass, a reduce-scatter of its gradients; an all-reduce of what is left of them over `data`.
Over several slices `fsdp` spans them all, so that these go over the slow network between them, too;
`hsdp` keeps them within a slice.
Source: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054.
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("data", "fsdp"),
    fill="fsdp",
    rules={
        "batch": ("data", "fsdp"),
        "embed": "fsdp",
        "latent": if_divisible("fsdp"),
    },
    across_slices="fsdp",
)
