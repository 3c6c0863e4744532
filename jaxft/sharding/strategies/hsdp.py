"""Hybrid sharded data parallel: a fully sharded replica in each slice, or each of `data` parts.

                       slice 0                slice 1
    parameters         split over `fsdp`      the same parts again
    rows               split over `data` and `fsdp`, other rows in each slice

`data` spans the slices, over the slow network between data centres' pods (DCN); `fsdp` stays within
one, on its fast links (ICI). On one slice, `mesh.data` says how many replicas there are.

Collectives to expect: within a slice those of `fsdp`; between slices one all-reduce of gradients,
of which each device has 1 / `fsdp` already.
Source: Zhao et al., PyTorch FSDP, https://arxiv.org/abs/2304.11277.
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
    across_slices="data",
)
