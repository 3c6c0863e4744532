"""Disk that a run takes, before it is started."""

import dataclasses
import math

import jax
import optax

from jaxft.config import RunConfig
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture
from jaxft.training.optim import make_optimizer
from jaxft.training.state import init_state


def checkpoint_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Returns the most that a run's checkpoints take at one time.

    A checkpoint holds what trains and what is frozen, the optimizer's state, and what trains once
    more beside an average of it; not the model that adapters are made for. The newest
    `train.keep_last`, the best, and the one being written exist together.
    """
    model = architecture.abstract(make_numerics(config.model.dtypes))
    # Patterns of rates may be of parameters that are not known here; rates take no memory.
    alike = dataclasses.replace(config.optim, rates="", lora_plus=1.0)
    optimizer = make_optimizer(alike, optax.constant_schedule(0.0), model)
    freeze, adaptation = config.optim.freeze, architecture.adaptation
    state = jax.eval_shape(lambda p: init_state(p, optimizer, freeze, adaptation), model.params)
    trained = state.trainable if state.is_averaged else {}
    arrays = jax.tree.leaves((state.saved, trained, state.opt_state))
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays if array.shape)
    return size * (config.train.keep_last + 2)
