"""Supervised fine-tuning on instructions, with answers counted; see docs/tuning.md.

jaxft train --config=configs/sft.py --config.model.path=MODEL --config.data.train=ROWS
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 256

    config.objective.name = "sft"
    config.optim.learning_rate = 1e-3  # for 260,032 parameters; 1e-5 to 2e-5 for billions
    config.optim.warmup_steps = 20

    config.train.workdir = "runs/sft"
    config.train.epochs = 5
    config.train.batch_size = 16

    config.eval.answers = "exact"
    return config
