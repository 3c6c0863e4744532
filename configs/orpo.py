"""Fine-tuning and preferences in one, from a model that was not tuned; see docs/tuning.md.

jaxft train --config=configs/orpo.py --config.model.path=MODEL --config.data.train=ROWS
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.objective.name = "orpo"
    config.optim.learning_rate = 1e-3  # for 260,032 parameters; 5e-6 for billions
    config.optim.warmup_steps = 20

    config.train.workdir = "runs/orpo"
    config.train.epochs = 2
    config.train.batch_size = 8
    return config
