"""Data parallel: every device holds the whole model and a part of the rows.

    parameters, optimizer state   replicated
    rows                          split over `data`

Collective to expect: one all-reduce of the gradients a micro-batch.
"""

from jaxft.sharding.rules import Strategy

STRATEGY = Strategy(mesh_axes=("data",), fill="data", rules={"batch": "data"})
