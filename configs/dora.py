"""DoRA: adapters that learn the size of each row apart from its direction; see docs/tuning.md.

jaxft train --config=configs/dora.py --config.model.path=MODEL --config.data.train=ROWS

Result with MODEL the 260,032 parameters of stories260K: not measured yet with this file;
benchmarks/adapters.py compares it with full fine-tuning on three tasks.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.adapter.rank = 8
    config.adapter.dora = True
    config.optim.learning_rate = 1e-2  # for 260,032 parameters; 1e-4 to 2e-4 for billions
    config.optim.warmup_steps = 20

    config.train.workdir = "runs/dora"
    config.train.epochs = 5
    config.train.batch_size = 8
    return config
