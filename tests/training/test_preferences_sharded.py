"""Steps of preferences: packed units equal single ones, and devices change nothing."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxft.config import ObjectiveConfig
from jaxft.data.batch import Batch
from jaxft.training.objectives.bound import bind
from jaxft.training.step import with_ratios
from tests.tiny import (
    Document,
    feed,
    load_tiny,
    make_documents,
    make_program,
    pack,
    relative_error,
    start,
)

LENGTH, VOCAB, MOST_UNITS = 32, 64, 4
# Nineteen units of sixteen rows when packed: rows of one to three, in no order, and an empty row.
PACKED = [[7, 2], [11], [0, 16, 5], [13], [3], [18, 9], [1], [], [14], [6, 10], [4], [17], [12]]
PACKED += [[8], [15], []]
# Layers, heads, positions and parameters over eight devices or fewer.
MESHES = {
    "fsdp": {"data": 2, "fsdp": 4},
    "tp": {"data": 2, "tensor": 2},
    "cp": {"data": 2, "context": 4},
    "pp": {"stage": 2, "data": 4},
}


def make_unit(number: int) -> list[Document]:
    """Returns two documents that begin with the same prompt, whose tokens carry no loss."""
    random = np.random.RandomState(number)
    prompt, *answers = random.randint(1, 5, size=3)
    sizes = prompt + answers
    shared = make_documents([prompt], VOCAB, seed=number)[0].tokens
    documents = []
    for document in make_documents(sizes, VOCAB, seed=100 + number):
        text = np.append(document.tokens, document.targets[-1])
        text[:prompt] = shared
        weights = np.zeros(len(text) - 1, np.float32)
        weights[prompt - 1 :] = 1
        documents.append(Document(text[:-1], text[1:], weights))
    return documents


def pack_units(rows: list[list[int]], *, labelled: bool) -> Batch:
    """Returns rows that hold these units; of labelled answers every third one is undesirable."""
    batch = pack([[d for unit in row for d in make_unit(unit)] for row in rows], LENGTH)
    first = batch.segments % 2 == 1
    units = (batch.segments + 1) // 2
    labels = np.where(first, 1, -1)
    if labelled:
        names = np.array([[0, *row, *[0] * (MOST_UNITS - len(row))] for row in rows])
        of_tokens = np.take_along_axis(names, units, axis=1)
        labels = np.where(first, np.where(of_tokens % 3 == 0, -1, 1), 0)
    labels = np.float32(np.where(batch.segments > 0, labels, 0))
    return batch.with_columns(labels=labels, units=np.int32(units))


@functools.cache
def tiny():
    return load_tiny("gqa", num_key_value_heads=2)


@functools.cache
def moved():
    """The weights of the policy, which are not the reference's any more."""
    random = np.random.RandomState(5)
    return {
        path: value + np.float32(0.1 * random.normal(size=value.shape)) * np.abs(value).mean()
        for path, value in tiny().params.items()
    }


def judge(method: str, rows: list[list[int]]):
    """Returns terms and gradient on one device, without a step, in one batch."""
    objective = bind(ObjectiveConfig(name=method, chunk=0), max_units=MOST_UNITS)

    @jax.jit
    def compute(params, reference, batch):
        batch = batch.with_columns(reference=objective.log_probs(tiny().merge(reference), batch))
        if objective.objective.whole is not None:
            batch = with_ratios(batch, objective.whole(tiny().merge(params), batch))

        def total(params):
            terms = objective.judge(tiny().merge(params), batch).terms
            return terms.total, terms

        gradient, terms = jax.grad(total, has_aux=True)(params)
        return terms, jax.tree.map(lambda g: g / terms.weight, gradient)

    batch = pack_units(rows, labelled=method == "kto")
    return jax.device_get(compute(moved(), tiny().params, batch))


@functools.cache
def judge_single(method: str):
    return judge(method, [[unit] for unit in range(19)])


SLOW = pytest.mark.slow(seconds=10)


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("method", ["dpo", *(pytest.param(m, marks=SLOW) for m in ("kto", "orpo"))])
def test_packed_units_give_the_loss_and_gradient_of_units_in_rows_of_their_own(method):
    terms, gradient = judge(method, PACKED)
    expected_terms, expected = judge_single(method)
    assert terms.weight == expected_terms.weight == 19
    assert relative_error(terms, expected_terms) < 1e-5
    assert relative_error(gradient, expected) < 1e-5


def make_step(method: str, reference: str, strategy: str, accumulation: int):
    sizes = MESHES.get(strategy, {})
    return make_program(
        tiny(),
        int(np.prod(list(sizes.values()))),
        max_units=MOST_UNITS,
        strategy=strategy,
        objective__name=method,
        objective__reference=reference,
        data__max_length=LENGTH,
        train__batch_size=len(PACKED),
        train__accumulation=accumulation,
        # What Adam keeps is then the gradient itself.
        optim__beta1=0.0,
        optim__clip_norm=0.0,
        **{f"mesh__{axis}": size for axis, size in sizes.items()},
    )


def cases():
    """Returns every method under every strategy, each with one of the two references."""
    references = ("fixed", "cached") * len(MESHES)
    return [("dpo", "cached", "ddp", 4)] + [
        (method, references[number + (method == "kto")], strategy, 2)
        for method in ("dpo", "kto")
        for number, strategy in enumerate(MESHES)
    ]


@pytest.mark.slow(seconds=11)
@pytest.mark.parametrize(("method", "reference", "strategy", "accumulation"), cases())
def test_a_step_of_packed_units_has_the_loss_figures_and_gradient_of_single_ones(
    method, reference, strategy, accumulation
):
    program = make_step(method, reference, strategy, accumulation)
    rows, evaluator = pack_units(PACKED, labelled=method == "kto"), program.evaluator
    params = jax.device_put(tiny().params, evaluator.shardings)
    if reference == "cached":
        on_devices = jax.device_put(rows, evaluator.placement.rows)
        log_probs = evaluator.score_step(params, on_devices)
        rows, params = rows.with_columns(reference=np.asarray(log_probs)), {}
    state, figures = program.train_step(start(program, moved()), params, feed(program, rows))
    terms, gradient = judge_single(method)
    expected = {"loss": (terms.total, terms.weight), **terms.figures}
    assert relative_error(jax.device_get(figures.ratios), expected) < 1e-5
    found = optax.tree.get(state.opt_state, "mu")
    assert relative_error({path: found[path] for path in gradient}, gradient) < 1e-5
