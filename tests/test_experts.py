"""Mixture of experts: both ways of dispatch against a loop, on one device and on a mesh."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import RunConfig
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.experts import balance_loss
from jaxft.models.layers import Routing
from jaxft.models.module import abstract_model, merge
from jaxft.objectives import sft
from jaxft.program import make_placement
from tests.tiny import feed, load_tiny, make_program, random_rows, relative_error, start

# Biases and a clamp; no bias and weights that do not sum to 1.
CASES_OF_EXPERTS = ["gpt_oss_gqa", "qwen3_moe_unnormalised_mha"]


def one_layer(case: str, capacity: float = 0.0) -> tuple[Any, Any, Any]:
    """Returns the experts of a model's first layer, and their weights."""
    tiny = load_tiny(case)
    prefix = "layers.mlp."
    params = {p[len(prefix) :]: v[0] for p, v in tiny.params.items() if p.startswith(prefix)}
    config = tiny.architecture.config
    numerics = Numerics(expert_capacity=capacity)
    block: Any = tiny.architecture.block

    abstract = abstract_model(lambda rngs: block(config, numerics, rngs).mlp)
    return config, params, lambda params: merge(abstract.graphdef, params)


def by_hand(config: Any, params, gating, x, limit=None):
    """Each token by itself, in NumPy float64; `limit` tokens of a row at most for an expert."""
    p = {path: np.asarray(value, np.float64) for path, value in params.items()}
    out, dropped = np.zeros_like(x), 0
    for row in range(x.shape[0]):
        logits = x[row] @ p["router.w"].T + p.get("router.b", 0)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.argsort(-probabilities, axis=-1)[:, : config.experts.chosen]
        weights = np.take_along_axis(probabilities, chosen, -1)
        if config.experts.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        taken = np.zeros(config.experts.count, int)
        for choice in range(config.experts.chosen):
            for token in range(x.shape[1]):
                e = chosen[token, choice]
                taken[e] += 1
                if limit is not None and taken[e] > limit:
                    dropped += 1
                    continue
                gate = p["gate.w"][e] @ x[row, token] + (p["gate.b"][e] if "gate.b" in p else 0)
                up = p["up.w"][e] @ x[row, token] + (p["up.b"][e] if "up.b" in p else 0)
                hidden = np.asarray(gating(jnp.asarray(gate), jnp.asarray(up)), np.float64)
                y = p["down.w"][e] @ hidden + (p["down.b"][e] if "down.b" in p else 0)
                out[row, token] += weights[token, choice] * y
    return out, dropped


def tokens_of(config, rows=2, length=12):
    return np.random.RandomState(0).randn(rows, length, config.embed).astype(np.float32)


@pytest.mark.parametrize("case", CASES_OF_EXPERTS)
def test_without_capacity_every_token_goes_through_its_experts(case):
    config, params, module = one_layer(case)
    x, real = tokens_of(config), np.ones((2, 12), bool)
    out, routing = module(params)(x, real)
    expected, _ = by_hand(config, params, module(params).gating, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert float(jnp.sum(routing.counts)) == 2 * 12 * config.experts.chosen
    assert float(routing.dropped) == 0


@pytest.mark.parametrize("case", CASES_OF_EXPERTS)
@pytest.mark.parametrize("capacity", [0.5, 1.0, 100.0])
def test_a_capacity_takes_first_choices_first_and_counts_what_it_drops(case, capacity):
    config, params, module = one_layer(case, capacity)
    x, real = tokens_of(config), np.ones((2, 12), bool)
    out, routing = module(params)(x, real)
    share = 12 * config.experts.chosen / config.experts.count
    limit = min(12, int(np.ceil(capacity * share)))
    expected, dropped = by_hand(config, params, module(params).gating, x, limit)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert float(routing.dropped) == dropped
    assert (dropped == 0) == (capacity == 100.0)


def test_padding_takes_no_slot_and_is_not_counted():
    config, params, module = one_layer(CASES_OF_EXPERTS[0], capacity=0.6)
    x = tokens_of(config)
    real = np.arange(12)[None] < np.array([[12], [5]])
    out, routing = module(params)(x, real)
    assert float(routing.tokens) == 17
    assert float(jnp.sum(routing.counts)) == 17 * config.experts.chosen
    # Other padding gives the same: it competes with nothing.
    moved, _ = module(params)(np.where(real[..., None], x, x[:, ::-1]), real)
    np.testing.assert_array_equal(np.asarray(out)[real], np.asarray(moved)[real])


def test_the_balance_loss_follows_its_formula():
    random = np.random.RandomState(0)
    probabilities = random.dirichlet(np.ones(4), size=(3, 10))  # of 3 layers and 10 tokens
    chosen = np.argsort(-probabilities, axis=-1)[..., :2]
    one_hot = np.eye(4)[chosen]  # [3, 10, 2, 4]
    routing = Routing(
        counts=jnp.asarray(one_hot.sum((1, 2)), jnp.float32),
        probabilities=jnp.asarray(probabilities.sum(1), jnp.float32),
        tokens=jnp.full(3, 10.0),
        dropped=jnp.zeros(3),
    )
    shares, means = one_hot.sum(2).mean((0, 1)), probabilities.mean((0, 1))
    np.testing.assert_allclose(balance_loss(routing), 4 * (shares * means).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "tensor", "capacity"),
    [
        ("fsdp_tp", 2, 0.0),
        ("fsdp", 1, 1.0),
        pytest.param("fsdp", 1, 0.0, marks=pytest.mark.slow),
        pytest.param("fsdp_tp", 2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_a_step_on_a_mesh_equals_one_on_one_device(strategy, tensor, capacity):
    tiny = load_tiny("gpt_oss_packed")
    settings = {"model__expert_capacity": capacity, "objective__balance": 0.5}
    if tensor > 1:
        settings["mesh__tensor"] = tensor
    rows = random_rows(8, 24, 64)
    results = []
    for devices, changes in ((1, {}), (8, settings | {"strategy": strategy})):
        changes = {k: v for k, v in settings.items() if k != "mesh__tensor"} | changes
        program = make_program(tiny, devices, **changes)
        state, metrics = program.train_step(start(program, tiny.params), feed(program, rows))
        results.append((jax.device_get(state.params), jax.device_get(metrics)))
    (params, metrics), (on_mesh, metrics_on_mesh) = results
    assert metrics.experts is not None and metrics.experts.balance > 1.5
    assert (metrics.experts.dropped > 0) == (capacity > 0)
    assert relative_error(metrics_on_mesh, metrics) < 1e-5
    assert relative_error(on_mesh, params) < 1e-5


def test_the_balance_loss_moves_the_router_towards_unused_experts():
    tiny = load_tiny("mixtral_tied")
    batch = random_rows(4, 24, 64)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, balance):
        def total(params):
            terms = sft.loss(tiny.merge(params), batch, chunk=0, balance=balance)
            return terms.auxiliary / terms.weight, terms

        return jax.value_and_grad(total, has_aux=True)(params)

    params, values = dict(tiny.params), []
    for _ in range(20):
        (value, _), gradients = gradient(params, 1.0)
        values.append(float(value))
        router = "layers.mlp.router.w"
        params[router] = params[router] - 0.3 * gradients[router]
    assert values[-1] < values[0] - 0.02
    assert values[-1] > 1.9  # the chosen experts of a token: 2 with perfect balance
    (off, terms), _ = gradient(tiny.params, 0.0)
    assert off == terms.auxiliary == 0


def test_experts_without_a_mesh_and_under_a_placement_trace_alike():
    config, params, module = one_layer("qwen3_moe_gqa_published")
    x, real = tokens_of(config, rows=8), np.ones((8, 12), bool)
    expected, _ = module(params)(x, real)
    with make_placement(RunConfig(strategy="fsdp")).activate():
        found, _ = jax.jit(lambda p: module(p)(x, real))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_router_is_never_computed_in_fewer_bits():
    tiny = load_tiny("mixtral_tied", make_numerics("mixed"))
    batch = random_rows(2, 16, 64)
    text = str(jax.make_jaxpr(lambda p: sft.loss(tiny.merge(p), batch, chunk=0).total)(tiny.params))
    # [B, T, D] x [E, D] in float32 at the highest precision.
    assert re.search(r"f32\[2,16,4\] = dot_general\[[^=]*=[^=]*=\(Precision\.HIGHEST", text)


@pytest.mark.parametrize(("length", "capacity"), [(64, 1.5), (256, 1.5)])
def test_memory_of_slots_grows_with_tokens_and_not_with_their_square(length, capacity):
    config, params, module = one_layer("qwen3_moe_gqa_published", capacity)
    x = jax.ShapeDtypeStruct((1, length, config.embed), jnp.float32)
    real = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    jaxpr = jax.make_jaxpr(lambda x, real: module(params)(x, real))(x, real)
    largest = max(v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars)
    # Tokens times the largest of: choices by experts, slots by width.
    slots = capacity * config.experts.chosen
    assert largest <= length * max(config.experts.chosen * 4, slots * config.embed) + 2048


def test_evaluation_drops_no_token():
    tiny = load_tiny("mixtral_tied")
    program = make_program(tiny, model__expert_capacity=0.5)
    rows = random_rows(8, 24, 64)
    state = start(program, tiny.params)
    terms = program.evaluator.eval_step(state.params, rows)
    exact = sft.row_terms(tiny.merge(), rows, chunk=0)
    np.testing.assert_allclose(terms.total, exact.total, rtol=1e-5)
    _, metrics = program.train_step(state, feed(program, rows))
    assert metrics.experts.dropped > 0
    assert abs(float(metrics.total / exact.total.sum()) - 1) > 1e-3
