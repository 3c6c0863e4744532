"""Simple preference optimisation of pairs, without a reference; see docs/tuning.md.

jaxft train --config=configs/simpo.py --config.model.path=MODEL --config.data.train=PAIRS

Result with MODEL what configs/sft.py made of stories260K (260,032 parameters) and PAIRS those of
rasbt-instruct (1,100; --config.data.bad_rows=skip leaves out six with equal answers), on 2 CPU
cores in some minutes: held-out loss 1.315 before and 1.045 after 44 steps; of 164 held-out pairs
56.7 % preferred before and 62.8 % after (95 % interval 55.5 to 70.1 %), margin 0.46 and 1.04. Their
instructions may have occurred in the fine-tuning before.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.objective.name = "simpo"
    config.optim.learning_rate = 1e-4  # for 260,032 parameters; 3e-7 to 1e-6 for billions
    config.optim.warmup_steps = 5

    config.train.workdir = "runs/simpo"
    config.train.epochs = 1
    config.train.batch_size = 8
    config.train.eval_every = 20
    return config
