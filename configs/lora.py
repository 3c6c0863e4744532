"""LoRA: low-rank adapters of every linear layer beside fixed weights; see docs/tuning.md.

jaxft train --config=configs/lora.py --config.model.path=MODEL --config.data.train=ROWS

Result with MODEL the 260,032 parameters of stories260K and ROWS the 1,100 instructions of rasbt-
instruct, on 2 CPU cores in some minutes: validation loss 4.737 before and 2.416 after 99 steps;
token accuracy 23.3 % and 49.9 %. Full tuning (configs/sft.py) reaches 2.146 and 54.0 %: models
this small leave adapters little to build on.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.adapter.rank = 8
    config.optim.learning_rate = 1e-2  # for 260,032 parameters; 1e-4 to 2e-4 for billions
    config.optim.warmup_steps = 20

    config.train.workdir = "runs/lora"
    config.train.epochs = 5
    config.train.batch_size = 8
    return config
