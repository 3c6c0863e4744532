"""Optimizers against optax, closed forms and other people's steps; split, resumed, averaged."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey, GetAttrKey

from jaxft.config import OptimConfig, from_dict
from jaxft.errors import ConfigError
from jaxft.models.module import AbstractModel
from jaxft.training.optim import make_optimizer
from jaxft.training.optimizers.adafactor import scale_by_adafactor
from jaxft.training.optimizers.moments import (
    Blocks,
    block_count,
    from_blocks,
    store_moments,
    stored_types,
    to_blocks,
)
from jaxft.training.optimizers.muon import orthogonalise
from jaxft.training.optimizers.placing import sharding_of
from jaxft.training.optimizers.rounding import apply_updates, round_stochastically
from jaxft.training.program import make_placement
from jaxft.training.state import TrainState, abstract_state, init_state
from jaxft.workdir.checkpoint import Checkpoints, Progress
from tests.oracle import optimizers as oracle
from tests.oracle.cases import OPTIMIZERS

AXES = {
    "embed.w": ("vocab", "embed"),
    "layers.attn.o.w": ("layers", "embed", "heads", "head_dim"),
    "layers.attn.q.w": ("layers", "heads", "head_dim", "embed"),
    "layers.mlp.up.b": ("layers", "mlp"),
    "layers.mlp.up.w": ("layers", "experts", "mlp", "embed"),
    "norm.scale": ("norm",),
}
SHAPES = {
    "embed.w": (6, 512),
    "layers.attn.o.w": (3, 512, 2, 4),
    "layers.attn.q.w": (3, 2, 4, 512),
    "layers.mlp.up.b": (3, 16),
    "layers.mlp.up.w": (3, 2, 16, 512),
    "norm.scale": (512,),
}
SQUARE = jax.ShapeDtypeStruct((16, 64), jnp.float32)
# Each optimizer, and each form of moments and averages.
RUNS = {
    "adamw": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "ema": {"ema": 0.9},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "muon": {"name": "muon"},
    "sgd": {"name": "sgd"},
    "schedule_free": {"name": "schedule_free", "schedule": "constant", "moments": "int8"},
}


def model_of() -> AbstractModel:
    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    return AbstractModel(None, shapes, AXES, stacks={"layers": range(3)})


def draw(seed: int):
    random = np.random.default_rng(seed)
    return {path: random.normal(size=s).astype(np.float32) for path, s in SHAPES.items()}


def optimizer_of(**changes):
    config = OptimConfig(**{"learning_rate": 0.01, "weight_decay": 0.1} | changes)
    assert not list(config.problems())
    return make_optimizer(config, optax.constant_schedule(config.learning_rate), model_of())


@functools.partial(jax.jit, static_argnums=0)
def advance(optimizer, state, gradients):
    updates, after = optimizer.update(gradients, state.opt_state, state.trainable)
    trainable = apply_updates(state.trainable, updates, state.step)
    return TrainState(state.step + 1, trainable, state.frozen, after)


@functools.partial(jax.jit, static_argnums=0)
def _init(optimizer, params):
    return init_state(params, optimizer, "")


def init(optimizer):
    return _init(optimizer, draw(0))


def run(optimizer, steps=3):
    """Returns the state after a few steps of random gradients."""
    state = init(optimizer)
    for step in range(steps):
        state = advance(optimizer, state, draw(1 + step))
    return state


def unstacked(path, value):
    """Yields the matrices and vectors that a parameter stacks, heads and their size as one."""
    lead = sum(name in ("layers", "experts") for name in AXES[path])
    for index in itertools.product(*map(range, value.shape[:lead])):
        one = value[index]
        if path == "layers.attn.q.w":
            one = one.reshape(8, 512)
        yield one.reshape(one.shape[0], -1) if one.ndim > 1 else one


def assert_unstacked_equal(ours, theirs, steps=3, rtol=2e-5):
    """Compares a transformation with one of optax that is applied to each matrix by itself."""
    params = draw(0)
    step_ours, step_theirs = jax.jit(ours.update), jax.jit(theirs.update)
    state = jax.jit(ours.init)(params)
    apart = {path: list(unstacked(path, value)) for path, value in params.items()}
    their_state = jax.jit(theirs.init)(apart)
    for step in range(steps):
        gradients = draw(1 + step)
        found, state = step_ours(gradients, state, params)
        split = {path: list(unstacked(path, value)) for path, value in gradients.items()}
        expected, their_state = step_theirs(split, their_state, apart)
        for path in params:
            for a, b in zip(unstacked(path, found[path]), expected[path], strict=True):
                np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=path)


def test_adafactor_is_that_of_the_unstacked_matrices():
    theirs = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0)
    )
    assert_unstacked_equal(scale_by_adafactor(AXES), theirs)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_steps_are_those_of_published_optimizers(name):
    """Of transformers' Adafactor, and of torch's Muon, which multiplies in bfloat16."""
    axes = {"layers.w": ("layers", "mlp", "embed")}
    params = {"layers.w": oracle.gradient(0)[None]}
    model = AbstractModel(None, jax.eval_shape(lambda: params), axes, {"layers": range(1)})
    config = OptimConfig(name=name, clip_norm=0.0, weight_decay=oracle.DECAY)
    optimizer = make_optimizer(config, optax.constant_schedule(oracle.RATE), model)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(1, 1 + oracle.STEPS):
        gradients = {"layers.w": oracle.gradient(step)[None]}
        updates, state = update(gradients, state, params)
        params = jax.tree.map(np.add, params, updates)
    with np.load(OPTIMIZERS) as stored:
        found, expected = params["layers.w"][0], stored[name]
        atol = oracle.RATE * (1e-4 if name == "adafactor" else 0.05)
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_muon_makes_each_matrix_orthogonal_and_as_large_as_steps_of_adamw():
    numbers = optax.contrib.MuonDimensionNumbers()
    theirs = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: numbers, tree),
    )
    of_layers = {p: value for p, value in draw(1).items() if p.endswith(("q.w", "up.w"))}
    found, _ = jax.jit(orthogonalise(AXES).update)(of_layers, optax.EmptyState())
    for path, value in of_layers.items():
        matrices = list(unstacked(path, value))
        expected, _ = jax.jit(theirs.update)(matrices, theirs.init(matrices))
        for a, b in zip(unstacked(path, found[path]), expected, strict=True):
            np.testing.assert_allclose(a, 0.2 * 512**0.5 * b, rtol=1e-4, atol=1e-4)
            sizes = np.linalg.svd(a, compute_uv=False) / (0.2 * 512**0.5)
            assert sizes.min() > 0.6 and sizes.max() < 1.3


def test_muon_leaves_vectors_and_tables_to_adamw():
    muon, adamw = (run(optimizer_of(name=name)) for name in ("muon", "adamw"))
    for path, axes in AXES.items():
        same = np.array_equal(muon.trainable[path], adamw.trainable[path])
        assert same == (path in ("embed.w", "norm.scale", "layers.mlp.up.b")), axes
    trained = optax.tree.get(muon.opt_state, "trace")
    assert [p for p in AXES if isinstance(trained[p], jax.Array)] == [
        "layers.attn.o.w",
        "layers.attn.q.w",
        "layers.mlp.up.w",
    ]


def test_lion_takes_the_sign_of_what_two_decays_make():
    found = run(optimizer_of(name="lion", clip_norm=0.0, beta1=0.9, beta2=0.99), steps=2)
    for path, p in draw(0).items():
        decay = 0.1 if len(AXES[path]) > 2 or path == "embed.w" else 0.0
        moment = np.zeros_like(p)
        for step in (1, 2):
            g = np.asarray(draw(step)[path])
            p = p - 0.01 * (np.sign(0.9 * moment + 0.1 * g) + decay * p)
            moment = 0.99 * moment + 0.01 * g
        np.testing.assert_allclose(found.trainable[path], p, rtol=1e-5, atol=1e-6)


def test_schedule_free_is_the_three_sequences_of_its_paper():
    """With a warm-up, which the weights of the average follow; without decay."""
    rates = [0.01, 0.02, 0.03]
    config = OptimConfig(name="schedule_free", schedule="constant", clip_norm=0.0, weight_decay=0.0)
    optimizer = make_optimizer(config, lambda count: jnp.asarray(rates)[count], model_of())
    state = run(optimizer)
    for path, start in draw(0).items():
        x = y = z = np.asarray(start, np.float64)
        second = total = 0.0
        for step, rate in enumerate(rates, 1):
            g = np.asarray(draw(step)[path], np.float64)
            second = 0.95 * second + 0.05 * g**2
            z = z - rate * g / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
            total += rate**2
            x = (1 - rate**2 / total) * x + rate**2 / total * z
            y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(state.trainable[path], y, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.evaluated[path], x, rtol=1e-4, atol=1e-6)


@pytest.mark.slow(seconds=2)
def test_an_average_of_weights_follows_each_step_and_is_what_is_evaluated():
    plain, averaged = optimizer_of(), optimizer_of(ema=0.15)
    average = draw(0)
    for step in range(3):
        now = run(plain, step + 1).trainable
        kept = min(0.15, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, average, now)  # noqa: B023
    state = run(averaged)
    assert state.is_averaged and not run(plain, 1).is_averaged
    for path, value in state.trainable.items():
        np.testing.assert_array_equal(value, now[path])  # training is not touched
        np.testing.assert_allclose(state.evaluated[path], average[path], rtol=1e-5, atol=1e-6)


@pytest.mark.slow(seconds=5, but=r"^muon$")
@pytest.mark.parametrize("name", RUNS)
def test_state_is_split_resumed_and_steps_as_on_one_device(name, tmp_path):
    """The resumed run starts from a checkpoint after its first step, on eight devices."""
    optimizer = optimizer_of(**RUNS[name])
    placement = make_placement(from_dict({"strategy": "fsdp", "mesh.fsdp": 8}))
    model = model_of()
    abstract = abstract_state(
        model.params,
        placement.shardings(model.params, model.axes),
        optimizer,
        "",
        placement=placement,
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract.opt_state):
        keys = [entry.key for entry in path if isinstance(entry, DictKey)]
        if leaf.size >= 512 and "norm.scale" not in keys:
            assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape, path

    shardings = jax.tree.map(lambda spec: spec.sharding, abstract)
    advance_split = jax.jit(
        functools.partial(advance, optimizer),
        in_shardings=(shardings, shardings.trainable),
        out_shardings=shardings,
    )

    def step(state, seed):
        return advance_split(state, jax.device_put(draw(seed), shardings.trainable))

    state = jax.device_put(init(optimizer), shardings)
    first = step(state, 1)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(first, progress=Progress(data={}), config={})
        checkpoints.wait()
        resumed, _ = checkpoints.restore(abstract, 1)
        exported = checkpoints.restore_params(model.params, 1)
    through, whole = step(step(first, 2), 3), run(optimizer)
    resumed = step(step(resumed, 2), 3)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(through), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for path, value in whole.trainable.items():
        # A code of 8 bits may fall on the other side.
        tolerance = 2e-3 if "moments" in RUNS[name] else 1e-5
        np.testing.assert_allclose(through.trainable[path], value, rtol=1e-5, atol=tolerance)
        np.testing.assert_array_equal(exported[path], first.evaluated[path])


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ((GetAttrKey("mu"), DictKey("other")), (8,), r"\.mu\['other'\] \[8\] belongs to no"),
        ((DictKey("embed.w"),), (512,), r"\['embed.w'\] \[512\] does not follow"),
        ((DictKey("embed.w"),), (4, 512), r"expected for each its size, a divisor of it or 1"),
        ((DictKey("embed.w"),), (6, 4), r"has 4 blocks. Use a mesh size that divides 4"),
    ],
)
def test_state_that_cannot_be_placed_is_refused_by_name(path, shape, message):
    placement = make_placement(from_dict({"strategy": "fsdp", "mesh.fsdp": 8}))
    params = model_of().params
    shardings = {"embed.w": NamedSharding(placement.mesh, P(None, "fsdp"))}
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ConfigError, match=message):
        sharding_of(path, leaf, params, shardings, placement)


@pytest.mark.slow(seconds=6)
def test_blocks_keep_the_size_of_small_numbers_and_the_sign():
    numbers = jnp.concatenate([jnp.logspace(-2, 0, 32), -jnp.logspace(-2, 0, 32)])[None]
    signed = from_blocks(to_blocks(numbers, signed=True))
    np.testing.assert_allclose(signed, numbers, rtol=0.09)
    squares = from_blocks(to_blocks(numbers**2, signed=False))
    np.testing.assert_allclose(squares, numbers**2, rtol=0.09)
    tiny = to_blocks(jnp.asarray([[1.0, 1e-30, 0.0]]), signed=False)
    assert tiny.codes.tolist() == [[255, 1, 0]]
    zeros = from_blocks(to_blocks(jnp.zeros((2, 3)), signed=True))
    np.testing.assert_array_equal(zeros, 0)


def test_blocks_have_64_numbers_or_more_and_are_as_many_as_a_power_of_two():
    sizes = (4096, 2880, 896, 64, 63, 8)
    assert [block_count(size) for size in sizes] == [64, 32, 8, 1, 1, 1]


def test_moments_of_8_bits_take_the_memory_that_is_written():
    state = run(optimizer_of(moments="int8"), 1)
    blocks = (
        optax.tree.get(state.opt_state, "mu")["embed.w"],
        optax.tree.get(state.opt_state, "nu")["embed.w"],
    )
    for block, dtype in zip(blocks, (jnp.int8, jnp.uint8), strict=True):
        assert isinstance(block, Blocks)
        assert (block.codes.dtype, block.codes.shape) == (dtype, (6, 512))
        assert (block.scales.dtype, block.scales.shape) == (jnp.float32, (6, 8))
    assert optax.tree.get(state.opt_state, "mu")["norm.scale"].dtype == jnp.float32


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_second_moments_in_few_bits_follow_gradients_that_fall(moments):
    """A step changes them by a thousandth, and numbers of bfloat16 are a 128th apart or more."""
    types = stored_types({"w": SQUARE}, {"w": ("embed", "embed")}, moments)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)

    @jax.jit
    def sizes():
        def advance(states, step):
            noise = jax.random.normal(jax.random.key(step), SQUARE.shape)
            gradients = {"w": jnp.where(step < 300, 1.0, 0.1) * noise}
            found = [t.update(gradients, s) for t, s in zip(optimizers, states, strict=True)]
            updates, states = zip(*found, strict=True)
            return states, jnp.stack([jnp.mean(jnp.square(u["w"])) for u in updates])

        optimizers = (adam, store_moments(adam, types))
        states = tuple(t.init({"w": jnp.zeros(SQUARE.shape)}) for t in optimizers)
        return jax.lax.scan(advance, states, jnp.arange(2000))[1]

    exact, found = np.mean(np.asarray(sizes())[-100:], axis=0)
    np.testing.assert_allclose(np.sqrt(found / exact), 1, atol=0.02)


@pytest.mark.slow(seconds=3)
def test_updates_of_bfloat16_are_not_lost():
    """A 4096th of the parameter is a 16th of what its type can add."""
    params = {"a": jnp.ones(100_000, jnp.bfloat16)}
    updates = {"a": jnp.full(100_000, 2.0**-12, jnp.float32)}
    found = apply_updates(params, updates, 3)["a"]
    assert found.dtype == jnp.bfloat16
    assert set(np.unique(found.astype(jnp.float32))) == {1.0, 1 + 2.0**-7}
    np.testing.assert_allclose(jnp.mean(found.astype(jnp.float32)), 1 + 2.0**-12, atol=3e-5)
    assert not np.array_equal(found, apply_updates(params, updates, 4)["a"])
    split = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P("fsdp"))
    apart = jax.jit(apply_updates)(*jax.device_put((params, updates), split), 3)["a"]
    np.testing.assert_array_equal(apart, found)


def test_numbers_between_two_of_bfloat16_become_either_and_others_stay():
    x = jnp.asarray([1.0, -1.5, 0.0, jnp.inf, -jnp.inf, jnp.nan, -1 - 2.0**-8], jnp.float32)
    found = jnp.stack([round_stochastically(x, jax.random.key(seed)) for seed in range(20)])
    found = np.asarray(found.astype(jnp.float32))
    np.testing.assert_array_equal(found[:, :6], np.tile(x[:6], (20, 1)))
    assert set(np.unique(found[:, 6])) == {-1.0, -1 - 2.0**-7}


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_a_rate_of_0_leaves_a_parameter_as_it_is(name):
    state = run(optimizer_of(**RUNS[name], rates=r"attn\.q=0,embed=1"))
    for path, value in state.trainable.items():
        same = np.array_equal(value, draw(0)[path])
        assert same == (path == "layers.attn.q.w"), path
    np.testing.assert_array_equal(state.evaluated["layers.attn.q.w"], draw(0)["layers.attn.q.w"])


def rates_of(**changes):
    """Returns by how much each parameter's step differs from that of the run's rate."""
    optimizer = optimizer_of(name="sgd", weight_decay=0.0, clip_norm=0.0, **changes)
    ones = jax.tree.map(jnp.ones_like, draw(0))
    updates, _ = jax.jit(optimizer.update)(ones, optimizer.init(ones), ones)
    return {
        path: value.reshape(value.shape[0], -1)[:, 0] / -0.01 for path, value in updates.items()
    }


@pytest.mark.slow(seconds=3)
def test_rates_follow_the_first_pattern_and_fall_from_layer_to_layer():
    found = rates_of(rates=r"mlp\.up\.w=3,mlp=5,^norm=7", layer_decay=0.5)
    down = np.asarray([0.125, 0.25, 0.5])
    np.testing.assert_allclose(found["embed.w"], 0.0625)
    np.testing.assert_allclose(found["layers.attn.q.w"], down)
    np.testing.assert_allclose(found["layers.mlp.up.w"], 3 * down)
    np.testing.assert_allclose(found["layers.mlp.up.b"], 5 * down)
    np.testing.assert_allclose(found["norm.scale"], 7)


def test_the_rate_of_an_adapters_b_is_a_multiple_of_its_a():
    axes = {"layers.q.lora_a": ("layers", "norm", "embed"), "layers.q.lora_b": ("layers", "heads")}
    params = {path: jnp.ones((2, 3, 4)[: len(names)]) for path, names in axes.items()}
    model = AbstractModel(None, jax.eval_shape(lambda: params), axes, {"layers": range(2)})
    config = OptimConfig(name="sgd", clip_norm=0.0, weight_decay=0.0, lora_plus=16.0)
    optimizer = make_optimizer(config, lambda _: 1.0, model)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert {path: float(u.reshape(-1)[0]) for path, u in updates.items()} == {
        "layers.q.lora_a": -1.0,
        "layers.q.lora_b": -16.0,
    }


@pytest.mark.parametrize("changes", [{"rates": "embed=2"}, {"layer_decay": 0.5}])
def test_factors_of_rates_leave_the_state_that_a_run_is_resumed_with(changes):
    structures = [jax.tree.structure(init(optimizer_of(**keys))) for keys in ({}, changes)]
    assert structures[0] == structures[1]


def test_rates_with_which_nothing_trains_are_refused():
    optimizer = optimizer_of(rates="embed=1,.=0")
    init(optimizer)
    with pytest.raises(ConfigError, match=r"optim\.rates .* every parameter that trains at a rate"):
        optimizer.init({"norm.scale": jnp.zeros(512)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": "lora=2"}, "'lora' matches no parameter. Paths are embed.w"),
        ({"lora_plus": 4.0}, "lora_plus is set, but the model has no adapters"),
    ],
)
def test_rates_of_what_is_not_there_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimConfig(**changes), lambda _: 1.0, model_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lion", "epsilon": 1e-6}, "optim.epsilon is set, but lion does not use it"),
        ({"name": "adafactor", "moments": "int8"}, "optim.moments is set, but adafactor"),
        ({"name": "schedule_free"}, "Set --config.optim.schedule=constant"),
        ({"name": "schedule_free", "schedule": "constant", "ema": 0.9}, "optim.ema is set"),
        ({"name": "schedule_free", "schedule": "constant", "beta1": 0.0}, "optim.beta1 is 0"),
        ({"rates": "embed"}, "optim.rates has 'embed'; expected 'pattern=number'"),
        ({"rates": "embed=1,(=2"}, "optim.rates: '\\(' is not a regular expression"),
        ({"rates": "embed=-1"}, "'embed=-1'; expected 'pattern=number'"),
    ],
)
def test_keys_that_do_not_go_together_are_named(changes, message):
    [problem] = OptimConfig(**changes).problems()
    assert re.search(message, problem)
