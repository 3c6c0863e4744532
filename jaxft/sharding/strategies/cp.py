"""Context parallel: each device holds a part of the positions of a row, in every layer.

    rows                          split over `data`, their positions over `context`, two chunks for
                                  each device: one of the start, the mirrored one of the end
    parameters, optimizer state   replicated

Collectives to expect, over `context`: with ring attention, a collective-permute of keys and values
for each of its devices, in each layer (in the backward pass with their gradients); with another
back end an all-gather of keys and values. Over both axes an all-reduce of gradients.
Source: Liu et al., Ring Attention, https://arxiv.org/abs/2310.01889.
"""

from jaxft.sharding.rules import Strategy

STRATEGY = Strategy(
    mesh_axes=("data", "context"),
    fill="context",
    rules={"batch": "data", "seq": "context", "stream_seq": "context"},
)
