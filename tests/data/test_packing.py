"""Rows hold every token once, keep documents whole and apart, and lose only what is reported."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.chat import Example
from jaxft.data.cutting import group_length
from jaxft.data.documents import Documents, DocumentWriter
from jaxft.data.packing import PackingStatistics, best_fit, pack
from jaxft.data.rows import TokenRows, write_rows
from jaxft.errors import DataError


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Writes documents, given as lists of trained flags, and packs them."""

    def build_rows(
        masks,
        *,
        packing="documents",
        overlength="error",
        max_length=8,
        order=None,
        begin_token=None,
    ):
        folder = tmp_path_factory.mktemp("documents")
        next_id = 1
        with DocumentWriter(folder) as writer:
            writer.statistics.sources.append("rows.jsonl")
            for line, mask in enumerate(masks, start=1):
                ids = np.arange(next_id, next_id + len(mask), dtype=np.int32)
                next_id += len(mask)
                example = Example(ids, np.array(mask, bool))
                writer.add(example, source=0, line=line, content_hash=line)
        documents = Documents(folder)
        statistics = PackingStatistics()
        rows = pack(
            documents,
            packing=packing,
            overlength=overlength,
            max_length=max_length,
            order=order or (lambda place: place),
            statistics=statistics,
            begin_token=begin_token,
        )
        folder = tmp_path_factory.mktemp("rows")
        write_rows(folder, rows, statistics, pad=0)
        return TokenRows(documents, folder)

    return build_rows


def lengths_to_masks(*lengths):
    return [[True] * length for length in lengths]


def test_a_piece_goes_where_the_least_space_is_left():
    rows = best_fit([((0, 6),), ((6, 11),), ((11, 13),)], 8)
    assert list(rows) == [[((0, 6),), ((11, 13),)], [((6, 11),)]]


def test_rows_stand_where_their_longest_pieces_stood():
    groups = [((0, 2),), ((2, 7),), ((7, 9),), ((9, 15),), ((15, 23),)]
    assert [max(row, key=group_length) for row in best_fit(groups, 8)] == [
        ((2, 7),),
        ((9, 15),),
        ((15, 23),),
    ]


def test_the_first_rows_are_a_fair_sample_of_all():
    """Without order by length: neither long documents lead nor rows of many short ones."""
    lengths, counts = [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        ends = np.cumsum(random.lognormal(4, 1, 1500).astype(int).clip(2, 512)).tolist()
        rows = list(best_fit([(piece,) for piece in itertools.pairwise([0, *ends])], 512))
        first = rows[: len(rows) // 5]

        def mean_length(rows):
            return np.mean([group_length(group) for row in rows for group in row])

        lengths.append(mean_length(first) / mean_length(rows))
        counts.append(np.mean([len(row) for row in first]) / np.mean([len(row) for row in rows]))
    for shares in (lengths, counts):
        assert abs(np.mean(shares) - 1) < 0.15, shares


masks_strategy = st.lists(st.lists(st.booleans(), min_size=1, max_size=20), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_uses_every_piece_once_and_never_overfills(lengths):
    ends = np.cumsum([0, *lengths]).tolist()
    groups = [(piece,) for piece in itertools.pairwise(ends)]
    rows = list(best_fit(groups, 16))
    assert sorted(group for row in rows for group in row) == groups
    assert all(sum(map(group_length, row)) <= 16 for row in rows)
    # No two rows could be merged: the defining property of a fit that opens rows only when needed.
    spaces = sorted(sum(map(group_length, row)) for row in rows)
    assert len(spaces) < 2 or spaces[0] + spaces[1] > 16


@settings(deadline=None, max_examples=30)
@given(masks=masks_strategy)
@pytest.mark.parametrize("packing", ["documents", "none", "stream"])
def test_targets_are_the_next_token_of_the_same_document(build, packing, masks):
    rows = build(masks, packing=packing, overlength="split")
    flags = [flag for mask in masks for flag in mask]
    for row in rows:
        for place in np.flatnonzero(row.weights):
            assert row.targets[place] == row.tokens[place + 1] == row.tokens[place] + 1
            assert row.segments[place] == row.segments[place + 1] > 0
            assert flags[row.targets[place] - 1]
    assert max((row.segments.max() for row in rows), default=1) == rows.max_segments
    assert sum(row.weights.sum() for row in rows) == rows.statistics.trained_tokens
    assert sum((row.segments > 0).sum() for row in rows) == rows.statistics.tokens


def test_documents_of_a_row_are_numbered_and_positions_restart(build):
    [row] = build(lengths_to_masks(3, 2))
    assert row.tokens.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert row.targets.tolist()[:2] == [2, 3]
    assert row.weights.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    dtypes = [array.dtype.name for array in row.values()]
    assert dtypes == ["int32", "int32", "float32", "int32", "int32"]


def test_a_stream_is_cut_into_blocks_across_documents(build):
    first, last = build(lengths_to_masks(5, 6), packing="stream")
    assert first.tokens.tolist() == list(range(1, 9))
    assert first.weights.tolist() == [1] * 7 + [0]
    assert first.segments.tolist() == [1] * 8
    assert first.positions.tolist() == list(range(8))
    assert last.tokens.tolist() == [9, 10, 11, 0, 0, 0, 0, 0]
    assert last.weights.sum() == 2


@settings(deadline=None, max_examples=30)
@given(masks=masks_strategy, seed=st.integers(0, 5))
def test_every_token_is_in_one_row_when_documents_are_split(build, masks, seed):
    masks = [[True, True, *mask] for mask in masks]  # something to train in each piece but stubs
    permutation = np.random.default_rng(seed).permutation(len(masks))
    rows = build(masks, overlength="split", order=lambda place: int(permutation[place]))
    seen = sorted(int(token) for row in rows for token in row.tokens[row.segments > 0])
    assert len(seen) == len(set(seen))
    trained = sum(sum(mask[1:]) for mask in masks)
    lost = rows.statistics.packed.lost_trained_tokens
    assert rows.statistics.trained_tokens + lost == trained


def test_over_length_documents_are_refused_with_counts_and_choices(build):
    with pytest.raises(DataError) as error:
        build(lengths_to_masks(4, 20, 9, 4), max_length=8)
    text = str(error.value)
    assert "2 of 4 documents (50.0%)" in text
    assert "rows.jsonl:2 with 20, rows.jsonl:3 with 9" in text
    assert "--config.data.max_length=20" in text
    # Trained: 3 + 19 + 8 + 3 = 33. Dropped 27; truncated 12 + 1; split 2 + 1 first tokens. All of
    # these documents is trained, so that there is no prompt to cut and they are split.
    for choice in ("drop 81.8%", "truncate 39.4%", "split 9.1%", "cut_prompt_middle 9.1%"):
        assert choice in text


@pytest.mark.parametrize(
    ("overlength", "lost", "dropped"), [("drop", 27, 2), ("truncate", 13, 0), ("split", 3, 0)]
)
def test_the_losses_foretold_are_those_that_occur(build, overlength, lost, dropped):
    rows = build(lengths_to_masks(4, 20, 9, 4), overlength=overlength)
    assert rows.statistics.packed.over_length == 2
    assert rows.statistics.packed.lost_trained_tokens == lost
    assert rows.statistics.lost_share == pytest.approx(lost / 33)
    assert rows.statistics.dropped == dropped


def chat(*lengths):
    """Returns a mask of turns that are masked and trained by turns, the first one masked."""
    return [place % 2 == 1 for place, length in enumerate(lengths) for _ in range(length)]


@pytest.mark.parametrize(
    ("mask", "policy", "kept"),
    [
        # 12 tokens of prompt, 3 of answer, 1 after it; rows of 8 leave 5 for the prompt.
        (chat(12, 3, 1), "cut_prompt_start", [8, 9, 10, 11, 12, 13, 14, 15]),
        (chat(12, 3, 1), "cut_prompt_middle", [1, 2, 10, 11, 12, 13, 14, 15]),
        # Two answers: of what is before the last one, some of the first is left.
        (chat(2, 4, 3, 4), "cut_prompt_start", [6, 7, 8, 9, 10, 11, 12, 13]),
        (chat(2, 4, 3, 4), "cut_prompt_middle", [1, 2, 8, 9, 10, 11, 12, 13]),
        # What comes after the answer is given up first.
        (chat(4, 3, 3), "cut_prompt_middle", [1, 2, 3, 4, 5, 6, 7]),
        # One token is left of the prompt, which predicts the first one of the answer.
        (chat(12, 7), "cut_prompt_start", [12, 13, 14, 15, 16, 17, 18, 19]),
        (chat(12, 7), "cut_prompt_middle", [12, 13, 14, 15, 16, 17, 18, 19]),
        (chat(12, 8), "cut_prompt_start", None),
        (chat(12, 8), "cut_prompt_middle", None),
        (chat(5, 2), "cut_prompt_start", [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_prompts_are_cut_so_that_the_last_answer_stays(build, mask, policy, kept):
    rows = build([mask, chat(1, 2)], overlength=policy, packing="none")
    found = [row.tokens[row.segments > 0].tolist() for row in rows]
    assert found[: 1 if kept else 0] == ([kept] if kept else [])
    assert rows.statistics.dropped == (0 if kept else 1)
    if not kept:
        return
    row = rows[0]
    answer = max(place for place, is_trained in enumerate(mask, start=1) if is_trained)
    first = max((p for p in range(1, answer) if not mask[p - 1]), default=0) + 1
    trained = row.targets[row.weights > 0].tolist()
    assert set(range(first, answer + 1)) <= set(trained)
    assert all(mask[token - 1] for token in trained)
    count = len(kept)
    assert row.targets[: count - 1].tolist() == kept[1:]
    assert row.positions[:count].tolist() == list(range(count))
    assert set(row.segments[:count]) == {1}
    assert rows.max_segments == 1


def test_the_token_that_begins_a_text_stays_at_the_beginning(build):
    rows = build([chat(12, 3)], overlength="cut_prompt_start", begin_token=1)
    assert rows[0].tokens.tolist() == [1, 9, 10, 11, 12, 13, 14, 15]
    assert rows[0].weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    rows = build([chat(12, 7)], overlength="cut_prompt_start", begin_token=1)
    assert rows[0].tokens.tolist() == [12, 13, 14, 15, 16, 17, 18, 19]  # no place for it


@pytest.mark.parametrize("policy", ["cut_prompt_start", "cut_prompt_middle"])
def test_plain_text_has_no_prompt_to_cut_and_is_split(build, policy):
    rows = build(lengths_to_masks(20), overlength=policy, packing="none")
    assert [row.tokens[row.segments > 0].tolist() for row in rows] == [
        list(range(1, 9)),
        list(range(9, 17)),
        list(range(17, 21)),
    ]


@settings(deadline=None, max_examples=40)
@given(
    turns=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=6), min_size=1, max_size=8),
    policy=st.sampled_from(["cut_prompt_start", "cut_prompt_middle"]),
    begin_token=st.sampled_from([None, 1]),
)
def test_cut_documents_share_rows_like_others_and_lose_what_is_said(
    build, turns, policy, begin_token
):
    masks = [chat(*lengths) for lengths in turns]
    rows = build(masks, overlength=policy, begin_token=begin_token)
    weights = sum(row.weights.sum() for row in rows)
    assert weights == rows.statistics.trained_tokens
    lost = rows.statistics.packed.lost_trained_tokens
    assert weights + lost == sum(sum(mask[1:]) for mask in masks)
    flags = [flag for mask in masks for flag in mask]
    for row in rows:
        assert (row.segments > 0).sum() <= 8
        for place in np.flatnonzero(row.weights):
            assert row.tokens[place] + 1 == row.targets[place] == row.tokens[place + 1]
            assert flags[row.targets[place] - 1]
    assert max((row.segments.max() for row in rows), default=1) == rows.max_segments
    if any(len(mask) > 8 for mask in masks):
        with pytest.raises(DataError) as error:
            build(masks)
        share = lost / max(sum(sum(mask[1:]) for mask in masks), 1)
        if begin_token is None:
            assert f"{policy} {share:.1%}" in str(error.value)


def test_documents_with_nothing_to_train_are_left_out_and_counted(build):
    rows = build([[True] * 4, [False] * 4, [True, False, False]])
    assert rows.statistics.dropped == 2
    assert rows.statistics.tokens == 4


def test_one_document_a_row_without_packing(build):
    rows = build(lengths_to_masks(2, 3, 2), packing="none")
    assert [int(row.segments.max()) for row in rows] == [1, 1, 1]


def test_rows_know_where_their_documents_came_from(build):
    rows = build(lengths_to_masks(7, 3, 5))
    assert sorted(rows.origins(0) + rows.origins(1)) == [f"rows.jsonl:{i}" for i in (1, 2, 3)]


def test_the_digest_is_that_of_the_rows_alone(build):
    masks = lengths_to_masks(7, 3, 5)
    assert build(masks).digest == build(masks).digest
    others = [
        build(masks, packing="none"),
        build(masks, max_length=16),
        build(lengths_to_masks(7, 3, 4)),
        build([[True, False, *mask[2:]] for mask in masks]),
    ]
    assert len({rows.digest for rows in (build(masks), *others)}) == 5


def test_negative_row_numbers_are_rows_of_padding(build):
    rows = build(lengths_to_masks(7))
    batch = rows.batch([0, -1])
    assert batch.weights[1].sum() == batch.segments[1].sum() == 0
    np.testing.assert_array_equal(batch.tokens[0], rows[0].tokens)
    with pytest.raises(IndexError):
        rows[1]


def test_statistics_are_json(build, tmp_path):
    rows = build(lengths_to_masks(3))
    assert json.dumps(rows.statistics.packed.__dict__)
