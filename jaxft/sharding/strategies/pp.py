"""Pipeline parallel: each device holds a group of consecutive layers; micro-batches pass through.

    layers                       split over `stage`
    embedding and head           rows of the vocabulary split over `stage` if it divides them
    rows of each micro-batch     split over `data`

The micro-batches are those of `train.accumulation`, A of them: a stage is idle for `stage` - 1 of
A + `stage` - 1 turns, and keeps the inputs of at most 2 `stage` - 1 micro-batches.

Collectives to expect: in each turn a collective-permute of the residual stream from stage to stage
and one of its gradient back; all-reduces that share the first and the last stage's stream with the
embedding and the head, which all stages hold parts of; over `data` an all-reduce of gradients.
Source: Narayanan et al., PipeDream-2BW, https://arxiv.org/abs/2006.09503 (the 1F1B schedule).
"""

from jaxft.sharding.rules import Strategy, if_divisible

STRATEGY = Strategy(
    mesh_axes=("stage", "data"),
    fill="stage",
    rules={
        "batch": "data",
        "layers": "stage",
        "act_vocab": if_divisible("stage"),
        "vocab": if_divisible("stage"),
    },
)
