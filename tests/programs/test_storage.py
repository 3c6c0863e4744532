"""The disk that a run takes is what its checkpoints hold."""

import dataclasses

from jaxft.config import RunConfig
from jaxft.models.config import Numerics
from jaxft.programs.storage import checkpoint_bytes
from jaxft.training.adaptation import adapted
from tests.tiny import load_tiny


def test_checkpoints_hold_what_trains_and_its_moments_several_times():
    config = RunConfig()
    config.train.keep_last = 2
    architecture = load_tiny("gqa").architecture
    abstract = architecture.abstract(Numerics())
    size = sum(4 * spec.size for spec in abstract.params.values())
    assert checkpoint_bytes(config, architecture) == size * 3 * 4
    # The average in float32, and what trains beside it.
    averaged = dataclasses.replace(config.optim, name="sgd", ema=0.9)
    assert checkpoint_bytes(dataclasses.replace(config, optim=averaged), architecture) == (
        (3 * size + size) * 4
    )


def test_checkpoints_of_adapters_do_not_hold_the_model():
    config = RunConfig()
    config.adapter.rank, config.adapter.train = 2, "^norm"
    config.train.keep_last = 1
    architecture = adapted(load_tiny("gqa").architecture, config.adapter)
    abstract = architecture.abstract(Numerics())
    learnt = [s.size for path, s in abstract.params.items() if "lora" in path or path[0] == "n"]
    assert checkpoint_bytes(config, architecture) == sum(learnt) * 4 * 3 * 3
