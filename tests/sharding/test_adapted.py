"""Adapters under every strategy, and what a compiled step does for them alone."""

import functools

import jax
import numpy as np
import pytest

from jaxft.models.config import Numerics
from jaxft.models.quantised import block_size, encode, weight_of
from jaxft.sharding.rules import load_strategy
from jaxft.training.adaptation import quantised
from jaxft.training.state import partition
from tests.oracle.cases import CASES
from tests.sharding.test_strategies import CASES as MODELS
from tests.sharding.test_strategies import LENGTH, mesh_of, run
from tests.strategies import BUILT_IN, FOR_EXPERTS, MESHES, OF_ALL_AXES
from tests.tiny import (
    Tiny,
    feed,
    load_tiny,
    make_program,
    random_rows,
    relative_error,
    start,
    with_adapters,
)
from tests.training.test_preferences_sharded import LENGTH as PAIR_LENGTH
from tests.training.test_preferences_sharded import MOST_UNITS, PACKED, pack_units

# Dropout and magnitudes are of dense layers; experts have neither.
KEYS = {
    "llama": {"rank": 4, "dropout": 0.25, "dora": True, "train": "norm", "start": "pissa"},
    "gpt_oss": {"rank": 4, "scaling": "rslora", "added_rows": True},
}
IN_LONG = (("fsdp_tp_sp", "llama"), ("fsdp_ep", "gpt_oss"))


@functools.cache
def load(family: str) -> Tiny:
    added = (3, 5) if KEYS[family].get("added_rows") else ()
    return with_adapters(load_tiny(MODELS[family]), added=added, **KEYS[family])


@functools.cache
def on_one_device(family: str) -> tuple:
    return run(load(family), 1)


def pairs() -> list:
    found = [(s, "llama") for s in BUILT_IN if s not in FOR_EXPERTS]
    found += [(s, "gpt_oss") for s in OF_ALL_AXES]
    return [
        pytest.param(*pair, marks=pytest.mark.slow(seconds=25))
        if pair in IN_LONG
        else pytest.param(*pair, marks=[pytest.mark.matrix(seconds=6), pytest.mark.xdist_group(f)])
        for pair in found
        for f in [f"adapters of {pair[1]}"]
    ]


@pytest.mark.parametrize(("strategy", "family"), pairs())
def test_steps_of_adapters_equal_those_of_one_device(strategy, family):
    """With dropout, whose masks do not depend on the devices, and a base that stays as it is."""
    tiny = load(family)
    sizes = mesh_of(strategy, tiny.architecture.config)
    mesh = {f"mesh__{axis}": size for axis, size in sizes.items()}
    devices = int(np.prod(list(sizes.values())))
    params, records = run(tiny, devices, strategy=strategy, **mesh)
    expected, expected_records = on_one_device(family)
    assert relative_error(records, expected_records) < 1e-5
    assert relative_error(params, expected) < 1e-5
    trained, frozen, base = partition(params, "", tiny.architecture.adaptation)
    assert relative_error(trained, {path: tiny.params[path] for path in trained}) > 0.01
    for path, value in (frozen | base).items():
        np.testing.assert_array_equal(value, expected[path])
        np.testing.assert_array_equal(value, tiny.params[path])


@functools.cache
def in_codes() -> Tiny:
    """A model of four layers, wide enough that two devices hold whole blocks of every weight."""
    widths = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 4}
    tiny = with_adapters(load_tiny("gqa", **widths), rank=4)
    coded = quantised(tiny.architecture, "nf4")
    abstract = coded.abstract(Numerics())
    params = dict(tiny.params)
    for path in abstract.params:
        if path.endswith(".codes"):
            weight = params.pop(weight_of(path))
            leaves = encode(weight, "nf4", block=block_size(weight.shape[-1]))
            params |= dict(zip((path, path.replace(".codes", ".scales")), leaves, strict=True))
    return Tiny(coded, abstract, params)


@functools.cache
def in_codes_on_one_device() -> tuple:
    return run(in_codes(), 1)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("strategy", ["pp", "pp_fsdp_tp", "fsdp_tp_sp", "fsdp_cp"])
def test_steps_beside_codes_equal_those_of_one_device(strategy):
    tiny = in_codes()
    mesh = {f"mesh__{axis}": size for axis, size in MESHES[strategy].items()}
    params, records = run(tiny, 8, strategy=strategy, **mesh)
    expected, expected_records = in_codes_on_one_device()
    assert relative_error(records, expected_records) < 1e-5
    codes = [path for path in params if path.endswith((".codes", ".scales"))]
    assert len(codes) == 2 * len(tiny.architecture.adaptation.sites)
    for path in codes:
        np.testing.assert_array_equal(params.pop(path), tiny.params[path])
    assert relative_error(params, {path: expected[path] for path in params}) < 1e-5


@pytest.mark.slow(seconds=4)
def test_dropout_of_a_step_is_other_than_that_of_the_next():
    """The same rows twice, at a rate too low to learn from them."""
    tiny = load("llama")
    program = make_program(tiny, data__max_length=LENGTH, optim__learning_rate=1e-9)
    rows = feed(program, random_rows(8, LENGTH, tiny.architecture.config.vocab))
    state, found = start(program, tiny.params), []
    for _ in range(2):
        state, metrics = program.train_step(state, {}, rows)
        found.append(float(metrics.ratios["loss"][0]))
    assert abs(found[0] - found[1]) > 1e-3 * found[0]


@pytest.mark.slow(seconds=13, but=r"^ddp$")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_the_base_are_not_computed(strategy):
    """Two thirds of the operations of full tuning, which has as many again for its gradients."""
    config = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 32}
    sizes = {f"mesh__{axis}": 4 for axis in load_strategy(strategy).mesh_axes if axis == strategy}
    plain = load_tiny("gqa", **(CASES["gqa"] | config))
    narrow = with_adapters(plain, rank=1)
    keys = {"data__max_length": 16, "objective__chunk": 0, "strategy": strategy, **sizes}
    counts = []
    for tiny in (plain, narrow):
        program = make_program(tiny, 4 if sizes else 1, **keys)
        counts.append(program.lower().compile().cost_analysis()["flops"])
    assert 0.64 < counts[1] / counts[0] < 0.7


def make_dpo(tiny: Tiny, reference: str, **changes):
    return make_program(
        tiny,
        max_units=MOST_UNITS,
        objective__name="dpo",
        objective__reference=reference,
        data__max_length=PAIR_LENGTH,
        train__batch_size=len(PACKED),
        optim__beta1=0.0,
        optim__clip_norm=0.0,
        **changes,
    )


@pytest.mark.slow(seconds=22)
def test_preferences_with_adapters_hold_no_second_copy_of_the_model():
    """The reference is the same weights with the adapter off, but for norms that train."""
    plain = load_tiny("gqa", num_key_value_heads=2)
    tiny = with_adapters(plain, rank=4, train="^norm")
    program = make_dpo(tiny, "fixed")
    assert program.fixed.keys() == {"norm.scale"}
    held = jax.tree.leaves((program.state, program.fixed, program.batch))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in held)
    compiled = program.lower().compile()
    assert compiled.memory_analysis().argument_size_in_bytes == size
    params = tiny.params | {"norm.scale": tiny.params["norm.scale"] + 0.1}
    rows = pack_units(PACKED, labelled=False)
    fixed = {"norm.scale": plain.params["norm.scale"]}
    found = compiled(start(program, params), fixed, feed(program, rows))
    cached = make_dpo(tiny, "cached")
    score = jax.jit(lambda batch: cached.evaluator.objective.log_probs(plain.merge(), batch))
    rows = rows.with_columns(reference=np.asarray(score(rows)))
    expected = cached.train_step(start(cached, params), {}, feed(cached, rows))
    for one, other in ((found[1], expected[1]), (found[0].opt_state, expected[0].opt_state)):
        assert relative_error(jax.device_get(one), jax.device_get(other)) < 1e-5
