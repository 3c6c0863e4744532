"""The training step: PyTorch's trajectory, and what must not change its result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data.batch import STANDARD, Batch
from jaxft.errors import ConfigError
from jaxft.models.config import make_numerics
from jaxft.training.objectives import sft
from jaxft.training.objectives.bound import BoundObjective
from jaxft.training.objectives.contract import Objective
from jaxft.training.objectives.token_scores import (
    TrainedFirst,
    cross_entropy,
    token_scores,
)
from jaxft.training.step import make_train_step
from tests.oracle.cases import load_case
from tests.tiny import (
    feed,
    judge,
    load_tiny,
    make_documents,
    make_program,
    pack,
    random_rows,
    relative_error,
    start,
)

VOCAB, LENGTH = 64, 24


@pytest.fixture(scope="module")
def tiny():
    return load_tiny("gqa", num_key_value_heads=1)


@pytest.fixture(scope="module")
def program_of(tiny):
    """Returns `make_program`, whose steps are compiled once for all tests here."""
    return functools.cache(functools.partial(make_program, tiny))


def run(program, params, batches, freeze=""):
    """Returns the final state and the metrics of each step."""
    state, metrics = start(program, params, freeze), []
    for rows in batches:
        state, step_metrics = program.train_step(state, {}, feed(program, rows))
        metrics.append(jax.device_get(step_metrics))
    return state, metrics


def losses(metrics) -> np.ndarray:
    return np.array([m.ratios["loss"][0] / m.ratios["loss"][1] for m in metrics])


def test_ten_steps_follow_the_reference_implementation():
    case, tiny = load_case("trajectory"), load_tiny("trajectory")
    program = make_program(tiny, data__max_length=16, train__batch_size=4, optim__weight_decay=0.1)
    batches = [Batch(**{name: case.arrays[name][i] for name in STANDARD}) for i in range(10)]
    state, metrics = run(program, tiny.params, batches)
    np.testing.assert_allclose(losses(metrics), case.losses, rtol=1e-5)
    np.testing.assert_allclose([m.latest["grad_norm"] for m in metrics], case.grad_norms, rtol=1e-4)
    logits = tiny.merge(state.params)(batches[0].tokens)
    np.testing.assert_allclose(logits, case.final_logits, atol=1e-4)


def ragged_rows() -> Batch:
    """Eight rows whose quarters have no, one, few and many trained tokens."""
    rows = random_rows(8, LENGTH, VOCAB, seed=3)
    weights = np.zeros_like(rows.weights)
    weights[2, 1] = 1
    weights[4:6, :5] = rows.weights[4:6, :5]
    weights[6:] = rows.segments[6:] > 0
    return rows.with_columns(weights=weights)


@pytest.mark.slow(seconds=30)
def test_accumulation_does_not_change_the_result(tiny, program_of):
    batches = [ragged_rows(), random_rows(8, LENGTH, VOCAB, seed=1), ragged_rows()]
    results = {}
    for accumulation in (1, 2, 4):
        program = program_of(train__accumulation=accumulation)
        state, metrics = run(program, tiny.params, batches)
        results[accumulation] = jax.device_get(state.params), metrics
    for accumulation in (2, 4):
        assert relative_error(results[accumulation], results[1]) < 1e-5


def test_a_step_without_trained_tokens_changes_nothing_but_the_counter(tiny, program_of):
    rows = random_rows(8, LENGTH, VOCAB)
    program = program_of(train__accumulation=2)
    empty = rows.with_columns(weights=np.zeros_like(rows.weights))
    state, (metrics,) = run(program, tiny.params, [empty])
    assert (metrics.ratios["loss"], metrics.latest["grad_norm"]) == ((0, 0), 0)
    assert int(state.step) == 1
    for path, value in state.params.items():
        decay = 1 if path.endswith("scale") else 1 - 1e-3 * 0.01
        np.testing.assert_allclose(value, decay * tiny.params[path], rtol=1e-6)


def test_metrics_count_tokens_and_squared_document_lengths(tiny, program_of):
    documents = make_documents([5, 9, 24, 3], VOCAB)
    rows = pack([documents[:2], documents[2:3], documents[3:], *[[]] * 5], LENGTH)
    program = program_of(train__accumulation=2)
    _, (metrics,) = run(program, tiny.params, [rows])
    assert metrics.counts["tokens"] == 5 + 9 + 24 + 3
    assert metrics.counts["squared_lengths"] == 5**2 + 9**2 + 24**2 + 3**2
    assert metrics.ratios["loss"][1] == rows.weights.sum()
    assert metrics.latest["learning_rate"] == np.float32(1e-3)


def summed_gradient(tiny, rows: Batch, chunk: int = 0):
    def total(params):
        return judge(tiny.merge(params), rows, chunk=chunk).minimised

    return jax.jit(jax.value_and_grad(total))(tiny.params)


def test_packing_does_not_change_the_gradient(tiny):
    documents = make_documents([5, 9, 3, 7, 24, 12, 11], VOCAB)
    packed = pack([documents[:4], documents[4:5], documents[5:]], LENGTH)
    alone = pack([[document] for document in documents], LENGTH)
    found, expected = summed_gradient(tiny, packed), summed_gradient(tiny, alone)
    assert relative_error(found, expected) < 1e-5


def test_the_step_is_traced_once_and_donates_its_state(tiny):
    program = make_program(tiny, train__accumulation=2)
    evaluator, traces = program.evaluator, []

    def loss(policy, batch, keys):
        traces.append(None)
        return sft.loss(policy, batch, keys)

    step = make_train_step(
        evaluator.abstract.graphdef,
        BoundObjective(
            objective=Objective(keys=sft.Keys, loss=loss, rows=sft.rows), keys=sft.Keys(), chunk=0
        ),
        program.optimizer,
        schedule=lambda step: 1e-3 / (step + 1),
        placement=evaluator.placement,
        abstract_state=program.state,
        fixed={},
        gradients=program.gradients,
        windows=[0, 0],
    )
    state = start(program, tiny.params)
    after_first = None
    for seed in range(4):
        before = jax.tree.leaves(state)
        state, metrics = step(state, {}, feed(program, random_rows(8, LENGTH, VOCAB, seed=seed)))
        assert all(leaf.is_deleted() for leaf in before)
        np.testing.assert_allclose(metrics.latest["learning_rate"], 1e-3 / (seed + 1), rtol=1e-6)
        after_first = after_first or len(traces)
    assert len(traces) == after_first
    assert step._cache_size() == 1


@pytest.mark.parametrize("chunk", [1, 7, 24, 100, 0])
def test_cross_entropy_in_chunks_and_its_gradients_are_the_closed_form(tiny, chunk):
    rows = random_rows(3, LENGTH, VOCAB)
    rows = rows.with_columns(weights=rows.weights * np.float32([[2.0], [0.5], [1.0]]))
    table = np.asarray(tiny.params["head.w"], np.float64)
    hidden = np.random.RandomState(0).randn(3, LENGTH, 32).astype(np.float32)
    hidden[:, ::3] += 3 * table[rows.targets[:, ::3]]  # some targets are the likeliest

    def scored(hidden, params):
        model = tiny.merge(params)
        scores = token_scores(model, hidden, rows.targets, rows.weights, chunk=chunk)
        return jnp.sum(-scores.log_probs * rows.weights), scores

    def summed(hidden, params):
        model = tiny.merge(params)
        terms = cross_entropy(model, hidden, rows.targets, rows.weights, chunk=chunk)
        return terms.total, terms

    logits = hidden.astype(np.float64) @ table.T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(VOCAB)[rows.targets]
    d_logits = (np.exp(log_probs) - one_hot) * rows.weights[..., None]
    trained = rows.weights > 0

    of_scores = jax.jit(jax.value_and_grad(scored, (0, 1), has_aux=True))(hidden, tiny.params)
    scores = of_scores[0][1]
    at_target = (log_probs * one_hot).sum(-1)
    np.testing.assert_allclose(scores.log_probs, at_target * trained, rtol=1e-5)
    right = (logits.argmax(-1) == rows.targets) * trained
    assert 0 < right.sum() < trained.sum()
    np.testing.assert_array_equal(scores.correct, right)
    of_sum = jax.jit(jax.value_and_grad(summed, (0, 1), has_aux=True))(hidden, tiny.params)
    for found in (of_sum[0][1], jax.jit(summed)(hidden, tiny.params)[1]):
        counted = (right * rows.weights).sum(), rows.weights.sum()
        np.testing.assert_array_equal(found.figures["token_accuracy"], counted)
        assert found.weight == rows.weights.sum()
    for (found, _), (d_hidden, d_params) in (of_scores, of_sum):
        np.testing.assert_allclose(found, -(at_target * rows.weights).sum(), rtol=1e-5)
        np.testing.assert_allclose(d_hidden, d_logits @ table, atol=1e-5)
        wanted = np.einsum("btv,btd->vd", d_logits, hidden)
        np.testing.assert_allclose(d_params["head.w"], wanted, atol=1e-4)


@pytest.mark.parametrize("trained", [0, 1, 20, 21, 48])
def test_chunks_without_a_trained_position_are_left_out(trained):
    weights = np.zeros(48, np.float32)
    weights[np.random.RandomState(trained).permutation(48)[:trained]] = 0.5
    order = TrainedFirst.of(weights.reshape(2, 24), 20)

    def body(chunk, seen):
        places = jnp.where(chunk.real, chunk.order, 49)  # dropped
        return seen.at[places].add(1, mode="drop").at[48].add(1)

    seen = np.asarray(order.over(body, jnp.zeros(49, jnp.int32)))
    np.testing.assert_array_equal(seen[:48], weights > 0)
    assert seen[48] == math.ceil(trained / 20)


def test_rows_without_a_trained_target_have_no_loss_and_no_gradient(tiny):
    rows = random_rows(2, LENGTH, VOCAB)
    rows = rows.with_columns(weights=np.zeros_like(rows.weights))

    def total(params):
        return judge(tiny.merge(params), rows, chunk=5).minimised

    found, gradients = jax.jit(jax.value_and_grad(total))(tiny.params)
    assert found == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_the_head_has_no_gradient_where_it_does_not_learn(tiny):
    """Its product, a third of the head's work, is left out."""
    rows = random_rows(2, LENGTH, VOCAB)
    frozen = tiny.params

    def work(learns: bool) -> float:
        def total(hidden, w):
            model = tiny.merge({**frozen, "head.w": w})
            return cross_entropy(model, hidden, rows.targets, rows.weights, chunk=0).total

        hidden = np.zeros((2, LENGTH, 32), np.float32)
        gradient = jax.jit(jax.grad(total, (0, 1) if learns else 0))
        return gradient.lower(hidden, frozen["head.w"]).compile().cost_analysis()["flops"]

    product = 2 * 2 * LENGTH * 32 * VOCAB
    assert work(True) - work(False) >= product


@pytest.mark.slow(seconds=3)
def test_chunks_keep_the_logits_of_all_positions_from_existing():
    tiny = load_tiny("gqa", vocab_size=8192, num_hidden_layers=1)
    rows = random_rows(2, 256, 8192)
    logits = 2 * 256 * 8192 * 4

    def temporary_bytes(chunk: int) -> int:
        def total(params):
            return judge(tiny.merge(params), rows, chunk=chunk).minimised

        compiled = jax.jit(jax.grad(total)).lower(tiny.params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(0) > logits
    assert temporary_bytes(32) < logits


@pytest.mark.slow(seconds=3)
def test_frozen_parameters_stay_bit_equal_and_have_no_moments(tiny):
    freeze = r"^embed|\.mlp\."
    program = make_program(tiny, optim__freeze=freeze)
    state, _ = run(
        program, tiny.params, [random_rows(8, LENGTH, VOCAB, seed=seed) for seed in (0, 1)], freeze
    )
    assert set(state.frozen) == {"embed.w", *(f"layers.mlp.{n}.w" for n in ("gate", "up", "down"))}
    for path, value in state.frozen.items():
        np.testing.assert_array_equal(value, tiny.params[path])
    for path, value in state.trainable.items():
        assert not np.array_equal(value, tiny.params[path]), path
    with_moments = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if leaf.shape
    }
    assert with_moments == set(state.trainable)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bfloat16_parameters_and_moments_stay_in_their_type(accumulation):
    tiny = load_tiny("gqa", make_numerics("bfloat16"))
    program = make_program(tiny, model__dtypes="bfloat16", train__accumulation=accumulation)
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), program.batch)
    state, metrics = jax.eval_shape(program.train_step, program.state, {}, batch)
    arrays = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape]
    assert set(arrays) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}


def test_a_micro_batch_that_cannot_be_split_is_refused_with_a_size_that_can(program_of):
    message = (
        "batch_size 8 in 2 micro-batches gives 4 rows, .* over 8 devices. Use a multiple of 16"
    )
    with pytest.raises(ConfigError, match=message):
        program_of(8, train__accumulation=2)


@pytest.mark.slow(seconds=5)
def test_attention_work_is_counted_within_windows():
    tiny = load_tiny("gemma2_gqa")
    program = make_program(tiny)
    rows = pack([[document] for document in make_documents([20] * 8, VOCAB)], LENGTH)
    _, metrics = program.train_step(start(program, tiny.params), {}, feed(program, rows))
    config = tiny.architecture.config
    expected = 0
    for kind in config.pattern:
        window = config.kinds[kind].window or 20
        # Twice the keys that each query sees, less itself.
        expected += 8 * sum(2 * min(place + 1, window) - 1 for place in range(20))
    assert len({kind.window for kind in config.kinds}) == 2
    np.testing.assert_allclose(
        metrics.counts["squared_lengths"], expected / config.layers, rtol=1e-6
    )


@pytest.mark.slow(seconds=2)
def test_terms_of_a_wrong_shape_are_refused(tiny):
    batch = random_rows(2, LENGTH, VOCAB)

    def rows(policy, batch, keys):
        return sft.rows(policy, batch, keys)._replace(weight=1.0)

    def loss(policy, batch, keys):
        return sft.rows(policy, batch, keys)

    objective = Objective(keys=sft.Keys, loss=loss, rows=rows)
    bound = BoundObjective(objective=objective, keys=sft.Keys(), chunk=0, name="mine")
    model = tiny.merge(tiny.params)
    with pytest.raises(
        ConfigError, match=r"rows of objective 'mine' .* weight \[\]; expected \[2\]"
    ):
        bound.rows(model, batch)
    with pytest.raises(ConfigError, match=r"loss of objective 'mine' .* total \[2\]"):
        bound.judge(model, batch)
