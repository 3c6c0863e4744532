"""Kahneman-Tversky optimisation of answers marked good or bad; see docs/tuning.md.

jaxft train --config=configs/kto.py --config.model.path=MODEL --config.data.train=ROWS

ROWS are labelled answers, or pairs, which are taken apart.

Result with MODEL what configs/sft.py made of stories260K (260,032 parameters) and ROWS 400 pairs of
rasbt-instruct (FILE:limit=400; --config.data.bad_rows=skip for equal answers), on 2 CPU cores in
some minutes: held-out loss 0.500 before and 0.419 after 32 steps; 66.7 % of 120 held-out answers on
the side of the KL estimate that their label says (95 % interval 58.3 to 75.0 %). Their instructions
may have occurred in the fine-tuning before.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.objective.name = "kto"
    config.optim.learning_rate = 1e-4  # for 260,032 parameters; 5e-7 to 5e-6 for billions
    config.optim.warmup_steps = 5

    config.train.workdir = "runs/kto"
    config.train.epochs = 1
    config.train.batch_size = 8
    config.train.eval_every = 20
    return config
