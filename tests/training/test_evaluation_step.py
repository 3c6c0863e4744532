"""Evaluation: sums that depend on nothing but the documents."""

import jax
import numpy as np
import pytest

from jaxft.data.batch import Batch
from jaxft.training.feeding import put
from tests.tiny import load_tiny, make_documents, make_program, pack

LENGTHS = [5, 9, 3, 7, 24, 12, 11, 1, 2, 20, 6, 6, 17, 8, 24, 3]
LENGTH = 24
FIELDS = {"objective__chunk": 7, "data__max_length": LENGTH}


@pytest.fixture(scope="module")
def tiny():
    return load_tiny("gqa")


@pytest.fixture(scope="module")
def documents():
    return make_documents(LENGTHS, 64)


@pytest.fixture(scope="module")
def expected(tiny, documents):
    """Loss, weight and hits of all documents, from the logits of each alone."""
    rows = pack([[document] for document in documents], LENGTH)
    logits = np.asarray(jax.jit(tiny.merge())(rows.tokens), np.float64)
    at_target = np.take_along_axis(logits, rows.targets[..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - at_target
    hits = logits.argmax(-1) == rows.targets
    return [(x * rows.weights).sum() for x in (nats, np.ones_like(nats), hits)]


def sums(tiny, rows: Batch, *, batch_size: int, devices: int = 1, **changes):
    """Evaluates rows in batches, the last one filled with empty rows."""
    program = make_program(tiny, devices, train__batch_size=batch_size, **FIELDS | changes)
    evaluator = program.evaluator
    params = jax.device_put(tiny.params, evaluator.shardings)
    found = []
    for first in range(0, len(rows.tokens), batch_size):
        part = Batch(**{name: x[first : first + batch_size] for name, x in rows.items()})
        missing = batch_size - len(part.tokens)
        filler = ((0, missing), (0, 0))
        part = Batch(**{name: np.pad(x, filler) for name, x in part.items()})
        terms = evaluator.eval_step(params, put(part, evaluator.placement.rows))
        correct, _ = terms.figures["token_accuracy"]
        sums = (terms.total, terms.weight, correct)
        assert all(sum_of_rows.shape == (batch_size,) for sum_of_rows in sums)
        found.append(jax.device_get(sums))
    return [np.sum(column, dtype=np.float64) for column in zip(*found, strict=True)]


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("batch_size", [16, 5])
def test_loss_and_accuracy_do_not_depend_on_the_batch_size(tiny, documents, expected, batch_size):
    rows = pack([[document] for document in documents], LENGTH)
    assert_equal(sums(tiny, rows, batch_size=batch_size), expected)


def packed(documents):
    rows, free = [[]], LENGTH
    for document in documents:
        if len(document.tokens) > free:
            rows.append([])
            free = LENGTH
        rows[-1].append(document)
        free -= len(document.tokens)
    return pack(rows, LENGTH)


def test_loss_and_accuracy_do_not_depend_on_packing(tiny, documents, expected):
    rows = packed(documents)
    assert len(rows.tokens) < len(documents)
    assert_equal(sums(tiny, rows, batch_size=5), expected)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (8, {"strategy": "fsdp"}),
        (8, {"strategy": "fsdp_tp", "mesh__tensor": 2, "mesh__data": 2}),
        pytest.param(2, {"strategy": "ddp"}, marks=pytest.mark.slow(seconds=5)),
    ],
)
def test_loss_and_accuracy_do_not_depend_on_devices(tiny, documents, expected, devices, changes):
    rows = packed(documents)
    assert_equal(sums(tiny, rows, batch_size=8, devices=devices, **changes), expected)
