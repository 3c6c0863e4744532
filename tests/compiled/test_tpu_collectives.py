"""What the compiler for TPU makes of the training step of an 8B model on 64 chips and more."""

import functools
import math

import jax
import pytest

from jaxft.compiled.collectives import collectives
from jaxft.config import RunConfig
from jaxft.models.families import architecture_from_hf
from jaxft.training import program
from tests.tpu import compiles_for_tpu, tpu_devices
from tests.write_golden import MODELS

LARGE = 2**20


@functools.cache
def compiled(strategy: str, slices: int) -> tuple[program.Program, list]:
    """The step of Llama-3.1-8B, one row of 1,024 tokens for each chip of v5e slices of 8 x 8."""
    devices = tpu_devices("v5e:8x8", num_slices=slices)
    config = RunConfig(strategy=strategy)
    config.data.max_length, config.train.batch_size = 1024, len(devices)
    placement = program.make_placement(config, devices)
    evaluator = program.build_evaluator(
        config, architecture_from_hf(MODELS["llama_8b"]), max_segments=8, placement=placement
    )
    built = program.build(config, evaluator, steps=10)
    text = built.compile().as_text()
    return built, collectives(text, placement.mesh)


def gradient_bytes(built: program.Program) -> int:
    """Bytes, as they are computed, of the gradients of all weights that the model multiplies by.

    The table of embeddings is not one: its rows are added up where they live. Those of norms are
    small.
    """
    matrices = {
        path: leaf
        for path, leaf in built.state.trainable.items()
        if path != "embed.w" and any(leaf.sharding.spec)
    }
    itemsize = jax.numpy.dtype(built.evaluator.numerics.compute_dtype).itemsize
    return sum(math.prod(leaf.shape) * itemsize for leaf in matrices.values())


@pytest.mark.slow(seconds=60)
@compiles_for_tpu
@pytest.mark.parametrize(("strategy", "slices"), [("fsdp", 1), ("hsdp", 2)])
def test_gradients_of_weights_are_scattered_and_never_whole_on_a_chip(strategy, slices):
    """Of a gradient b, a ring of n chips sends b(n-1)/n for that; a sum and a cut would be 2b.

    On v5e it goes from chip to chip, beside products.
    """
    built, found = compiled(strategy, slices)
    chips = built.evaluator.placement.mesh.shape["fsdp"]
    assert chips == 64
    whole = [
        one for one in found if one.kind == "all-reduce" and "fsdp" in one.axes and not one.gathers
    ]
    assert [one for one in whole if max(one.arrays) > LARGE] == []
    assert not [one for one in found if one.kind == "reduce-scatter"]
    scattered = [one for one in found if one.kind == "collective-permute"]
    assert {one.axes for one in scattered} == {("fsdp",)}
    sent = sum(one.count * one.wire_bytes for one in scattered)
    assert sent == pytest.approx(gradient_bytes(built) * (chips - 1) / chips, rel=1e-3)


@pytest.mark.slow(seconds=60)
@compiles_for_tpu
def test_slices_exchange_their_parts_of_the_gradients_alone():
    built, found = compiled("hsdp", 2)
    chips = built.evaluator.placement.mesh.shape["fsdp"]
    between = [one for one in found if one.axes == ("data",)]
    assert {one.kind for one in between} == {"all-reduce"}
    assert all(one.across_slices for one in between)
    parts = sum(one.count * size for one in between for size in one.arrays if size > 4096)
    assert parts >= gradient_bytes(built) / chips
