"""Pipeline parallelism: what it keeps, how long it takes, and evaluation through stages."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxft.config import from_dict
from jaxft.training.feeding import put
from jaxft.training.objectives import sft
from jaxft.training.program import build
from tests.tiny import feed, load_tiny, make_program, random_rows, relative_error, start

LENGTH = 24


@pytest.fixture(scope="module")
def tiny():
    return load_tiny("gqa", num_hidden_layers=4)


def program_of(tiny, micros: int, *, stages: int = 4, **changes):
    return make_program(
        tiny,
        8,
        strategy="pp",
        mesh__stage=stages,
        mesh__data=8 // stages,
        optim__epsilon=1.0,
        optim__learning_rate=0.1,
        train__accumulation=micros,
        train__batch_size=2 * micros,
        **changes,
    )


@pytest.mark.slow(seconds=7)
@pytest.mark.parametrize("micros", [1, 3, 8])
def test_more_or_fewer_micro_batches_than_stages_give_the_same_as_one_device(tiny, micros):
    rows = random_rows(2 * micros, LENGTH, 64)
    results = []
    reference = make_program(
        tiny, 1, optim__epsilon=1.0, optim__learning_rate=0.1, train__batch_size=2 * micros
    )
    for program in (program_of(tiny, micros), reference):
        state, metrics = program.train_step(start(program, tiny.params), {}, feed(program, rows))
        results.append(jax.device_get((state.params, metrics)))
    assert relative_error(*results) < 1e-5


def trip_counts(program) -> list[int]:
    """Returns the lengths of the scans over turns: those that hand activations on."""
    equations = program.train_step.trace(program.state, program.fixed, program.batch).jaxpr.eqns
    scans = [e.params for e in equations if e.primitive.name == "scan"]
    return [scan["length"] for scan in scans if "ppermute" in str(scan["jaxpr"])]


@pytest.mark.parametrize("micros", [2, 8])
def test_the_idle_share_is_that_of_one_forward_one_backward(tiny, micros):
    """S - 1 turns forward, M both ways, S - 1 backward: M + S - 1 of each kind."""
    assert trip_counts(program_of(tiny, micros)) == [3, micros, 3]


def temporary_bytes(program) -> int:
    compiled = program.lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow(seconds=7)
def test_memory_does_not_grow_with_the_number_of_micro_batches():
    """Activations of one micro-batch are large here beside parameters and token ids."""
    tiny = load_tiny("gqa", num_hidden_layers=4)
    few, many = (
        temporary_bytes(program_of(tiny, micros, data__max_length=512)) for micros in (8, 32)
    )
    ids = 5 * 4 * 512 * 24 * 2  # of the 24 micro-batches more, once more for the copy
    assert many < few + 2 * ids


@pytest.mark.slow(seconds=9)
def test_frozen_layers_stay_and_the_rest_trains(tiny):
    freeze = r"\.mlp\.|^embed"
    program = program_of(tiny, 2, optim__freeze=freeze)
    state = start(program, tiny.params, freeze)
    rows = random_rows(4, LENGTH, 64)
    state, _ = program.train_step(state, {}, feed(program, rows))
    for path, value in state.params.items():
        same = np.array_equal(value, tiny.params[path])
        assert same == (path in state.frozen), path


@pytest.mark.slow(seconds=7, but=r"^gqa$")
@pytest.mark.parametrize("case", ["gqa", "mixtral_gqa_published"])
def test_evaluation_through_stages_gives_the_sums_of_each_row(case):
    tiny = load_tiny(case)
    rows = random_rows(16, LENGTH, 64)
    changes = {"train__batch_size": 16}
    piped = make_program(tiny, 8, strategy="pp", mesh__stage=2, mesh__data=4, **changes)
    plain = make_program(tiny, 1, **changes)
    terms = []
    for program in (piped, plain):
        evaluator = program.evaluator
        params = jax.device_put(tiny.params, evaluator.shardings)
        found = evaluator.eval_step(params, jax.device_put(rows, evaluator.placement.rows))
        terms.append(jax.device_get(found[:3]))
    assert relative_error(*terms) < 1e-5
    assert piped.evaluator.placement.row_multiple == 8


def test_a_batch_of_an_evaluation_is_a_multiple_of_stages_and_rows(tiny):
    placement = program_of(tiny, 2).evaluator.placement
    assert (placement.batch_shards, placement.row_multiple) == (2, 8)


def test_an_objective_passes_a_pipeline_once(tiny):
    """A second pass would silently see the first one's hidden states."""

    def twice(policy, batch, _):
        first = sft.loss(policy, batch, _)
        return first + sft.loss(policy, batch, _)

    def elsewhere(policy, batch, _):
        return sft.loss(policy, batch.map(lambda column: column[::-1]), _)

    values = {"model.dtypes": "float32", "strategy": "pp", "mesh.stage": 4, "mesh.data": 2}
    values |= {"data.max_length": LENGTH, "train.accumulation": 2, "train.batch_size": 4}
    config = from_dict(values)
    for loss in (twice, elsewhere):
        evaluator = program_of(tiny, 2).evaluator
        objective = dataclasses.replace(evaluator.objective.objective, loss=loss)
        bound = dataclasses.replace(evaluator.objective, objective=objective)
        evaluator = dataclasses.replace(evaluator, objective=bound)
        with pytest.raises(RuntimeError, match="asked for other rows or a second time"):
            build(config, evaluator, steps=20).lower()


@pytest.mark.slow(seconds=5)
def test_what_a_loss_must_know_of_all_rows_does_not_depend_on_stages(tiny):
    rows = random_rows(8, LENGTH, 64)
    labels = np.where(rows.segments % 2, np.sign(rows.segments), 0).astype(np.float32)
    zeros = np.zeros_like(rows.weights)
    rows = rows.with_columns(labels=labels, units=(rows.segments + 1) // 2, reference=zeros)
    found = []
    for program in (
        program_of(tiny, 2, objective__name="kto"),
        make_program(tiny, max_units=3, objective__name="kto"),
    ):
        evaluator = dataclasses.replace(
            program.evaluator,
            objective=dataclasses.replace(program.evaluator.objective, max_units=3),
        )
        params = jax.device_put(tiny.params, evaluator.shardings)
        batch = put(rows, evaluator.placement.rows)
        found.append(jax.device_get(evaluator.whole_step(params, batch)))
    assert found[0]["kl"][1] == found[1]["kl"][1] > 0
    assert relative_error(*found) < 1e-5
