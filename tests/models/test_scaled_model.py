"""Models whose layers are trained by products of 8-bit numbers: which are, and what they give."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.models.config import Numerics
from jaxft.models.dispatch import GROUPS, SLOTS
from jaxft.models.expert_weights import Projection
from jaxft.models.layers import Linear
from jaxft.models.module import Param, merge, optional
from jaxft.models.weights import Site
from jaxft.sharding.scaled import project_scaled
from jaxft.training.program import Program
from tests.tiny import feed, judge, load_tiny, make_program, random_rows, relative_error, start
from tests.training.test_preferences_sharded import MOST_UNITS, PACKED, pack_units

EXPERTS, SLOTS_OF_EACH, INPUTS, OUTPUTS = 3, 4, 16, 12


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def with_gradients(function: Any, x: Any, w: Any) -> Any:
    """Returns what a function gives, and the gradients of the sum of its sines."""

    def total(x: Any, w: Any) -> Any:
        out = function(x, w)
        return jnp.sum(jnp.sin(out)), out

    (_, out), found = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w)
    return out, *found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_expert_multiplies_as_a_dense_layer_of_its_weight_would(kind):
    """In slots, and in groups with rows of none behind, whose experts have tokens alike."""
    x, w = normal(EXPERTS, SLOTS_OF_EACH, INPUTS), normal(EXPERTS, OUTPUTS, INPUTS, seed=1)
    x *= np.array([1e-3, 1, 1e3], np.float32)[:, None, None]

    def dense(x: Any, w: Any) -> Any:
        parts = [
            project_scaled(x[e][None], w[e], axes=("mlp", "embed"), inputs=1, kind=kind)
            for e in range(EXPERTS)
        ]
        return jnp.concatenate(parts)

    def projection(w: Any) -> Projection:
        return Projection(("experts", "mlp", "embed"), kind, w=w)

    def slots(x: Any, w: Any) -> Any:
        return projection(w).applied(SLOTS, x)

    def groups(x: Any, w: Any) -> Any:
        rows = jnp.pad(x.reshape(-1, INPUTS), ((0, 2), (0, 0)))
        used = jnp.arange(len(rows))[:, None] < EXPERTS * SLOTS_OF_EACH
        expert = jnp.minimum(jnp.arange(len(rows)) // SLOTS_OF_EACH, EXPERTS - 1)
        sizes = jnp.full(EXPERTS, SLOTS_OF_EACH, jnp.int32)
        out = projection(w).applied(GROUPS, rows, sizes, used, expert)
        return out[:-2].reshape(EXPERTS, SLOTS_OF_EACH, -1)

    expected = with_gradients(dense, x, w)
    assert relative_error(with_gradients(slots, x, w), expected) < 1e-6
    assert relative_error(with_gradients(groups, x, w), expected) < 1e-6
    assert relative_error(expected[0], np.einsum("end,efd->enf", x, w)) > 1e-3


def test_an_adapter_is_multiplied_whole_beside_a_weight_that_is_rounded():
    layer = Linear(
        (6,), (8,), axes=("mlp", "embed"), dtype=jnp.float32, scale=1.0, rngs=nnx.Rngs(0)
    )
    layer.site = Site(rank=2, alpha=4.0)
    layer.lora_a = optional(Param(jnp.asarray(normal(2, 8)), axes=("rank", "embed")))
    layer.lora_b = optional(Param(jnp.asarray(normal(6, 2)), axes=("mlp", "rank")))
    x = normal(2, 3, 8, seed=1)
    whole = layer(x)
    layer.matmul = "int8"
    rounded = project_scaled(x, layer.w[...], axes=layer.axes, inputs=1, kind="int8")
    added = whole - x @ np.asarray(layer.w[...]).T
    assert relative_error(layer(x) - rounded, added) < 1e-5
    assert relative_error(rounded + added, whole) > 1e-4


def step_of(case: str, **changes: Any) -> tuple[Program, Any]:
    """Returns the program, and what it makes of some rows in one step."""
    tiny = load_tiny(case)
    program = make_program(tiny, optim__epsilon=1.0, optim__learning_rate=0.1, **changes)
    rows = random_rows(8, 24, tiny.architecture.config.vocab)
    state, figures = program.train_step(start(program, tiny.params), {}, feed(program, rows))
    return program, jax.device_get((state.params, figures.ratios))


def products(lowered: Any) -> tuple[int, int]:
    """Returns how many products of 8-bit numbers and of others a program has."""
    found = re.findall(r"(?:dot_general|ragged_dot)\"?[ (].*", lowered.as_text())
    rounded = sum("xi8>" in line for line in found)
    return rounded, len(found) - rounded


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("llama3_rope", 7),
        # Each expert's product on CPU is one with all tokens.
        pytest.param("gpt_oss_gqa", 7, marks=pytest.mark.slow(seconds=10)),
    ],
)
def test_layers_are_trained_by_such_products_forward_and_for_inputs_and_nothing_else(case, weights):
    """Not the router, the head, attention or gradients of weights; nor an evaluation."""
    whole, expected = step_of(case)
    program, found = step_of(case, model__matmul="int8")
    rounded, others = products(program.lower())
    assert rounded == 2 * weights
    assert (rounded + others, 0) == (sum(products(whole.lower())), products(whole.lower())[0])
    assert 1e-5 < relative_error(found[1]["loss"], expected[1]["loss"]) < 0.01
    assert 1e-5 < relative_error(found[0], expected[0]) < 0.05
    evaluator = program.evaluator
    params = {path: program.state.params[path] for path in evaluator.abstract.params}
    batch = program.batch.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    assert products(evaluator.eval_step.lower(params, batch))[0] == 0


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("remat", ["full", "dots", "qkv+attention"])
def test_what_layers_keep_changes_nothing(remat):
    _, expected = step_of("llama3_rope", model__matmul="int8")
    _, found = step_of("llama3_rope", model__matmul="int8", model__remat=remat)
    assert relative_error(found, expected) < 1e-5


def test_dots_keep_the_results_of_products_and_not_their_wide_sums():
    tiny, kept = load_tiny("llama3_rope"), []
    shape = 4, 128  # products of fewer rows are other ones on a CPU
    for matmul in ("", "int8"):
        model = tiny.architecture.abstract(Numerics(remat="dots", matmul=matmul))

        def pass_back(params: Any, graphdef: Any = model.graphdef) -> Any:
            rows = random_rows(*shape, 64)
            return jax.vjp(lambda p: judge(merge(graphdef, p), rows).minimised, params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pass_back, tiny.params))
        of_tokens = [x for x in leaves if x.shape[:3] == (tiny.architecture.config.layers, *shape)]
        kept.append((sum(x.size for x in of_tokens), {x.dtype.name for x in of_tokens}))
    assert kept[0] == kept[1]
    assert kept[1][1] == {"float32"}


@pytest.mark.slow(seconds=10)
def test_a_policy_is_its_reference_until_something_is_learnt():
    """Both by products of 8-bit numbers: rounding makes no difference between them."""
    tiny = load_tiny("gqa", num_key_value_heads=2)
    program = make_program(
        tiny,
        max_units=MOST_UNITS,
        objective__name="dpo",
        model__matmul="int8",
        data__max_length=32,
        train__batch_size=len(PACKED),
    )
    batch = feed(program, pack_units(PACKED, labelled=False))
    fixed = {path: jnp.copy(tiny.params[path]) for path in program.fixed}
    _, figures = program.train_step(start(program, tiny.params), fixed, batch)
    total, count = figures.ratios["loss"]
    assert total / count == pytest.approx(np.log(2), rel=1e-6)
