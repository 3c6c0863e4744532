"""The order of batches: complete, shuffled anew each epoch, and the same from any start or host."""

import json

import numpy as np
import pytest

from jaxft.data.chat import Example
from jaxft.data.documents import Documents, DocumentWriter
from jaxft.data.loader import batches, eval_batches, is_over, sample_numbers, shuffled
from jaxft.data.packing import PackingStatistics, pack
from jaxft.data.rows import TokenRows, write_rows
from jaxft.errors import ConfigError, DataError

COUNT = 23


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows whose first token is their number plus one."""
    return make_rows(tmp_path_factory, COUNT)


def make_rows(tmp_path_factory, count, filler=7):
    folder = tmp_path_factory.mktemp("documents")
    with DocumentWriter(folder) as writer:
        writer.statistics.sources.append("x")
        for number in range(count):
            example = Example(np.array([number + 1, filler, filler], np.int32), np.ones(3, bool))
            writer.add(example, source=0, line=number + 1, content_hash=number)
    documents, statistics = Documents(folder), PackingStatistics()
    packed = pack(
        documents,
        packing="none",
        overlength="error",
        max_length=4,
        order=lambda place: place,
        statistics=statistics,
    )
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, packed, statistics, pad=0)
    return TokenRows(documents, folder)


def read(rows, **options):
    iterator = batches(rows, **options)
    result = list(iterator)
    iterator.close()
    return result


def numbers(batch):
    return (batch.tokens[..., 0] - 1).ravel().tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_row_once_and_ends_with_rows_of_weight_zero(rows, shuffle):
    result = read(rows, batch_size=6, epochs=1.0, shuffle=shuffle)
    seen = [number for batch in result for number in numbers(batch)]
    assert len(seen) == 24
    assert sorted(seen) == [-1, *range(COUNT)]
    assert result[-1].weights[0, -1].sum() == 0
    assert (seen[:COUNT] == list(range(COUNT))) is not shuffle


def test_each_epoch_and_each_seed_has_its_own_order(rows):
    def order(seed):
        result = read(rows, batch_size=1, epochs=2.0, seed=seed)
        seen = [numbers(batch)[0] for batch in result]
        return seen[:COUNT], seen[COUNT:]

    first, second = order(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert order(1)[0] != first
    assert order(0) == (first, second)


def test_batches_have_micro_batches_first(rows):
    batch = read(rows, batch_size=6, accumulation=3, steps=1)[0]
    assert {array.shape for array in batch.values()} == {(3, 2, 4)}


def test_accumulation_does_not_change_what_a_step_holds(rows):
    whole = read(rows, batch_size=6, epochs=1.5)
    split = read(rows, batch_size=6, accumulation=3, epochs=1.5)
    assert [numbers(batch) for batch in whole] == [numbers(batch) for batch in split]


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_a_resumed_iterator_continues_exactly(rows, start):
    options = {"batch_size": 4, "accumulation": 2, "epochs": 2.0, "seed": 3}
    whole = read(rows, **options)
    iterator = batches(rows, **options)
    for _ in range(start):
        next(iterator)
    state = json.loads(json.dumps(iterator.state()))
    iterator.close()
    rest = read(rows, **options, start_step=state["step"])
    assert len(rest) == len(whole) - start
    for resumed, expected in zip(rest, whole[start:], strict=True):
        for array, other in zip(resumed, expected, strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("batch_size", [4, 6, 30])
@pytest.mark.parametrize("parts", [(1.0, 2.0), (0.5, 1.0, 1.5, 3.0), (0.3, 2.0)])
def test_a_run_made_longer_reads_each_row_as_often_as_one_that_was_long(rows, batch_size, parts):
    state = {"step": 0, "position": 0}
    seen, steps = [], 0
    for epochs in parts:
        iterator = batches(
            rows,
            batch_size=batch_size,
            epochs=epochs,
            start_step=state["step"],
            start_position=state["position"],
        )
        seen += [n for batch in iterator for n in numbers(batch) if n >= 0]
        state, steps = json.loads(json.dumps(iterator.state())), iterator.steps
        assert state["step"] == steps and is_over(state, epochs=epochs, steps=0)
        assert not is_over(state, epochs=epochs + 1, steps=0)
        assert not is_over(state, epochs=0, steps=steps + 1)
    whole = read(rows, batch_size=batch_size, epochs=parts[-1])
    assert seen == [n for batch in whole for n in numbers(batch) if n >= 0]


def test_steps_after_a_run_of_epochs_are_full(rows):
    iterator = batches(rows, batch_size=6, epochs=1.0)
    list(iterator)
    state = iterator.state()
    assert (state["step"], state["position"]) == (4, COUNT)
    longer = batches(
        rows,
        batch_size=6,
        steps=8,
        start_step=state["step"],
        start_position=state["position"],
    )
    seen = [n for batch in longer for n in numbers(batch)]
    second = [shuffled(place, COUNT, seed=0, epoch=1) for place in range(COUNT)]
    assert seen[:COUNT] == second and len(seen) == 24 and min(seen) >= 0
    assert longer.steps == 8 and longer.position(8) == COUNT + 24


@pytest.mark.parametrize("places", [[0, 1], [0, 2], [3]])
def test_a_host_reads_its_places_of_the_same_batches(rows, places):
    options = {"batch_size": 8, "accumulation": 2, "epochs": 1.5}
    whole, part = read(rows, **options), read(rows, **options, places=places)
    for expected, found in zip(whole, part, strict=True):
        for array, other in zip(expected.values(), found.values(), strict=True):
            np.testing.assert_array_equal(array[:, places], other)


def test_row_numbers_name_what_a_step_held(rows):
    iterator = batches(rows, batch_size=6, accumulation=2, epochs=1.0)
    for step, batch in enumerate(iterator):
        held = [number for number in numbers(batch) if number >= 0]
        assert iterator.row_numbers(step) == held
    assert len(held) == 5


def test_steps_run_over_as_many_epochs_as_they_need(rows):
    result = read(rows, batch_size=6, steps=9)
    assert len(result) == 9
    assert all((batch.segments[..., 0] == 1).all() for batch in result)


def test_a_finished_run_has_nothing_left(rows):
    iterator = batches(rows, batch_size=6, epochs=1.0, start_step=4)
    assert iterator.steps == 4
    assert list(iterator) == []


def test_the_state_tells_other_data_and_another_order(rows, tmp_path_factory):
    def state(rows, **options):
        iterator = batches(rows, **{"batch_size": 4, "steps": 1, **options})
        iterator.close()
        return iterator.state()

    same = state(make_rows(tmp_path_factory, COUNT), accumulation=2)
    assert state(rows) == same
    others = [{"batch_size": 2}, {"seed": 1}, {"shuffle": False}, {"start_step": 1}]
    assert all(state(rows, **options) != same for options in others)
    assert state(make_rows(tmp_path_factory, COUNT, filler=8)) != same


def test_no_rows_and_sizes_that_do_not_divide_are_refused(rows, tmp_path_factory):
    with pytest.raises(ConfigError, match="multiple of 3"):
        batches(rows, batch_size=8, accumulation=3, steps=1)
    with pytest.raises(DataError, match="no rows"):
        batches(make_rows(tmp_path_factory, 0), batch_size=1, steps=1)


@pytest.mark.parametrize("hosts", [[None], [[0, 1], [2, 3]]])
@pytest.mark.parametrize("maximum", [0, 9])
def test_evaluation_reads_each_row_once_in_order(rows, hosts, maximum):
    chosen = sample_numbers(COUNT, maximum, seed=3)
    parts = [
        list(eval_batches(rows, batch_size=4, places=places, numbers=chosen)) for places in hosts
    ]
    assert len({len(part) for part in parts}) == 1
    seen = [
        number for step in zip(*parts, strict=True) for batch in step for number in numbers(batch)
    ]
    assert seen == [*chosen, *[-1] * (-len(chosen) % 4)]
    assert len(chosen) == (maximum or COUNT)


def test_a_sample_is_spread_over_all_rows_and_depends_on_the_seed_alone():
    samples = [list(sample_numbers(1000, 100, seed=seed)) for seed in range(20)]
    assert samples[3] == list(sample_numbers(1000, 100, seed=3))
    assert len({tuple(sample) for sample in samples}) == 20
    for sample in samples:
        assert sample == sorted(set(sample)) and len(sample) == 100
        # Of 100 drawn from 1000, those below 500 have a standard deviation of 4.7.
        assert 30 < sum(number < 500 for number in sample) < 70
    assert list(sample_numbers(5, 9, seed=0)) == list(sample_numbers(5, 0, seed=0)) == [*range(5)]


@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_a_shuffle_is_a_permutation(count):
    places = [shuffled(place, count, seed=1, epoch=2) for place in range(count)]
    assert sorted(places) == list(range(count))
