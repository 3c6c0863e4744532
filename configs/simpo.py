"""Simple preference optimisation of pairs, without a reference; see docs/tuning.md.

jaxft train --config=configs/simpo.py --config.model.path=MODEL --config.data.train=ROWS
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
