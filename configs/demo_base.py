"""Pre-trains the demo's base model from random weights on generated text.

`python -m jaxft.demo.make_base` runs it, data and tokenizer included. To run this step alone, write
the data with `python -m jaxft.demo.data` first.
"""

from jaxft.config import RunConfig
from jaxft.demo import BASE


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.path = str(BASE)
    config.model.random_init = True
    config.model.dtypes = "float32"
    config.model.remat = "none"

    config.data.train = "runs/demo_base/data/train.txt"
    config.data.validation = "runs/demo_base/data/validation.txt"
    config.data.format = "text"
    config.data.max_length = 256

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 100

    config.train.workdir = "runs/demo_base/pretrain"
    config.train.epochs = 1
    config.train.batch_size = 8
    config.train.save_every = 500
    config.train.eval_every = 500
    return config
