"""Direct preference optimisation of pairs, against the weights it starts from; see docs/tuning.md.

jaxft train --config=configs/dpo.py --config.model.path=MODEL --config.data.train=PAIRS

Result with MODEL what configs/sft.py made of stories260K (260,032 parameters) and PAIRS the 1,100
of rasbt-instruct, of which --config.data.bad_rows=skip leaves out six with equal answers, on 2 CPU
cores in some minutes: held-out loss 0.693 before and 0.336 after 44 steps; 89.0 % of 164 held-out
pairs preferred (95 % interval 84.1 to 93.3 %), margin 1.82. Their instructions may have occurred
in the fine-tuning before.
"""

from jaxft.config import RunConfig


def get_config() -> RunConfig:
    config = RunConfig()
    config.model.dtypes = "float32"  # for a CPU; on a TPU or GPU the default, mixed, is right

    config.data.validation = "15%"
    config.data.max_length = 512

    config.objective.name = "dpo"
    config.optim.learning_rate = 1e-4  # for 260,032 parameters; 5e-7 for billions
    config.optim.warmup_steps = 5

    config.train.workdir = "runs/dpo"
    config.train.epochs = 1
    config.train.batch_size = 8
    config.train.eval_every = 20
    return config
