"""Fine-tunes the demo's base model: a complaint in plain words -> the right clinic department.

`make demo` runs it between two evaluations. To run this step alone, write the data with
`python -m jaxft.demo.data` first.
"""

from jaxft.config import RunConfig
from jaxft.demo import BASE


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.path = str(BASE)
    config.model.dtypes = "float32"
    config.model.remat = "none"

    config.data.train = "runs/demo/data/train.jsonl"
    config.data.validation = "runs/demo/data/held_out.jsonl"
    config.data.max_length = 128

    config.optim.learning_rate = 5e-4
    config.optim.warmup_steps = 10

    config.train.workdir = "runs/demo/finetune"
    config.train.epochs = 2
    config.train.batch_size = 8

    config.eval.retention = "runs/demo/data/retention.txt"
    config.eval.answers = "label"
    config.eval.answer_rows = 0
    config.eval.max_new_tokens = 12  # more than the longest label has
    return config
