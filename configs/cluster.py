"""Fine-tunes an 8B model on several hosts: what the files of launch/ run.

All hosts see `/shared`: the model, the data and the run lie there.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.path = "/shared/models/Llama-3.1-8B-Instruct"

    config.data.train = "/shared/data/train.jsonl"
    config.data.validation = "/shared/data/validation.jsonl"
    config.data.cache = "/shared/cache"  # rows are made once, by the first host
    config.data.max_length = 4096

    config.optim.learning_rate = 1e-5
    config.optim.warmup_steps = 50

    config.strategy = "fsdp"
    config.train.workdir = "/shared/runs/cluster"
    config.train.batch_size = 64
    config.train.save_every = 200
    return config
