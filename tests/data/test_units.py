"""Pairs and labelled answers as units: masks, packing, cuts, selection, columns, the report."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxft.config import DataConfig, RunConfig
from jaxft.data import prepare, unit_tokenising
from jaxft.data.chat import Example, prompt_ids
from jaxft.data.documents import Documents, DocumentWriter
from jaxft.data.inspect import inspect
from jaxft.data.packing import PackingStatistics, pack
from jaxft.data.preparation import conversations
from jaxft.data.rows import TokenRows, write_rows
from jaxft.data.template import resolve_template
from jaxft.errors import ConfigError, DataError
from tests.data.test_preparation import make_tokenizer
from tests.data.test_selection import WORDS
from tests.templates import PLAIN, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["User", "Assistant", ":", *WORDS])


@pytest.fixture
def config(tmp_path):
    return DataConfig(cache=str(tmp_path / "cache"), max_length=64)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count):
    return [
        {"prompt": f"w{i} w0", "chosen": f"w{i} w1", "rejected": "w2"} for i in range(3, 3 + count)
    ]


def labelled(count):
    return [
        {"prompt": f"w{i} w0", "completion": f"w{i} w1", "label": i % 3 > 0}
        for i in range(3, 3 + count)
    ]


def run(source, config, tokenizer, units="pairs", *, seed=0, training=True):
    log = []
    rows = prepare(
        source, config, tokenizer, seed=seed, training=training, units=units, on_log=log.append
    )
    return rows, "\n".join(log)


def segments(row):
    """Yields the columns of each document of a row."""
    for number in range(1, int(row.segments.max()) + 1):
        yield row.map(lambda column, number=number: column[row.segments == number])


def test_exactly_the_last_answers_are_trained_with_the_token_that_ends_them(
    tmp_path, config, tokenizer
):
    talk = [
        {"role": "system", "content": "w9"},
        {"role": "user", "content": "w0"},
        {"role": "assistant", "content": "w1"},
        {"role": "user", "content": "w2"},
    ]
    answers = ["w3 w4", "w5"]
    row = {"prompt": talk, "chosen": answers[0], "rejected": answers[1]}
    rows, _ = run(write(tmp_path / "a.jsonl", [row]), config, tokenizer)
    found = list(segments(rows[0]))
    template = resolve_template(tokenizer, config)
    prompt = prompt_ids(tokenizer, talk, template=template)
    assert len(found) == 2
    for document, answer, label in zip(found, answers, (1, -1), strict=True):
        assert document.tokens[: len(prompt)].tolist() == prompt
        trained = tokenizer.convert_tokens_to_ids([*answer.split(), "</s>"])
        assert document.targets[document.weights > 0].tolist() == trained
        assert set(document["labels"]) == {label}
        assert document.positions.tolist() == list(range(len(document.positions)))
        assert not document.weights[: len(prompt) - 1].any()


def test_a_text_begins_once(tmp_path, config):
    """The tokenizer puts BOS before texts; neither answer gets one of its own."""
    from tokenizers import processors

    tokenizer = make_tokenizer(["User", "Assistant", ":", *WORDS])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    rows, _ = run(write(tmp_path / "a.jsonl", pairs(1)), config, tokenizer)
    for document in segments(rows[0]):
        assert document.tokens[0] == tokenizer.bos_token_id
        assert (document.tokens == tokenizer.bos_token_id).sum() == 1
        assert document.targets[document.weights > 0][-1] == tokenizer.eos_token_id


def test_columns_number_the_units_and_label_each_token(tmp_path, config, tokenizer):
    rows, _ = run(write(tmp_path / "a.jsonl", pairs(5)), config, tokenizer)
    assert rows.unit_size == 2
    assert rows.max_units == max(int(row["units"].max()) for row in rows)
    for row in rows:
        assert row["labels"].dtype == np.float32
        assert row["units"].dtype == np.int32
        assert not row["labels"][row.segments == 0].any()
        assert not row["units"][row.segments == 0].any()
        assert row["units"].max() * 2 == row.segments.max()
        for number, document in enumerate(segments(row)):
            assert set(document["units"]) == {number // 2 + 1}
            assert set(document["labels"]) == {1 - number % 2 * 2}
    padding = rows.batch([-1])
    assert not padding["units"].any()
    # Rows of documents alone have no such columns, and none of their cost.
    sft = [{"prompt": "w0", "completion": "w1"}]
    plain, _ = run(write(tmp_path / "b.jsonl", sft), config, tokenizer, "documents")
    assert len(plain[0]) == 5
    assert plain.unit_size == 1


def test_a_column_can_be_attached(tmp_path, config, tokenizer):
    rows, _ = run(write(tmp_path / "a.jsonl", pairs(9)), config, tokenizer)
    digest = rows.digest
    values = np.arange(len(rows) * 64, dtype=np.float32).reshape(len(rows), 64)
    rows.attach("reference", values)
    batch = rows.batch([len(rows) - 1, -1, 0])
    np.testing.assert_array_equal(batch["reference"], [values[-1], 0 * values[0], values[0]])
    assert batch["reference"].dtype == np.float32
    assert rows.digest == digest
    with pytest.raises(ValueError, match=r"'kl' is float64 \[2, 3\]; expected float32 \["):
        rows.attach("kl", np.zeros((2, 3)))


def test_each_labelled_answer_has_one_to_the_next_prompt_beside_it(tmp_path, config, tokenizer):
    data = labelled(4)
    config = dataclasses.replace(config, packing="none")
    source = write(tmp_path / "a.jsonl", data[:3]) + "," + write(tmp_path / "b.jsonl", data[3:])
    rows, log = run(source, config, tokenizer, "labelled")
    assert "4 labelled answers (2 desirable, 2 undesirable)" in log
    for row, item, other in zip(rows, data, [*data[1:], data[0]], strict=True):
        own, mismatched = segments(row)
        assert set(own["labels"]) == {1.0 if item["label"] else -1.0}
        assert set(mismatched["labels"]) == {0}
        for document, text in ((own, item["completion"]), (mismatched, other["completion"])):
            trained = tokenizer.decode(document.targets[document.weights > 0])
            assert trained == f"{text} </s>"
            assert tokenizer.decode(document.tokens).startswith(f"User : {item['prompt']} ")


def test_a_pair_gives_a_desirable_and_an_undesirable_answer(tmp_path, config, tokenizer):
    config = dataclasses.replace(config, packing="none")
    rows, log = run(write(tmp_path / "a.jsonl", pairs(3)), config, tokenizer, "labelled")
    assert "6 labelled answers (3 desirable, 3 undesirable)" in log
    assert [rows.unit_keys(i)[0] for i in range(6)] == [(0, i // 2, i % 2) for i in range(6)]
    own, mismatched = segments(rows[0])
    assert set(own["labels"]) == {1}
    # Not the rejected answer of its own row.
    trained = tokenizer.decode(mismatched.targets[mismatched.weights > 0])
    assert trained == "w4 w1 </s>"
    [_, mismatched] = segments(rows[1])
    assert tokenizer.decode(mismatched.targets[mismatched.weights > 0]) == "w2 </s>"


def mismatched_answers(tmp_path, config, tokenizer, prompts):
    """Returns for rows of these prompts the number of the row that the other answer is from."""
    data = [
        {"prompt": f"w{p}", "completion": f"w{100 + i}", "label": i % 2 == 0}
        for i, p in enumerate(prompts)
    ]
    config = dataclasses.replace(config, packing="none")
    rows, _ = run(write(tmp_path / "a.jsonl", data), config, tokenizer, "labelled")
    found = []
    for row, item in zip(rows, data, strict=True):
        own, other = (tokenizer.decode(d.targets[d.weights > 0]).split() for d in segments(row))
        assert own[0] == item["completion"]
        found.append(int(other[0][1:]) - 100)
    return found


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([0, 0, 0, 1, 1, 2], [3, 3, 3, 5, 5, 0]),
        ([0, 1, 0, 0], [1, 2, 1, 1]),  # the first rows have the prompt of the last ones
        ([0, 0, 1, 2, 0], [2, 2, 3, 4, 2]),
    ],
)
def test_the_other_answer_is_one_to_another_prompt(tmp_path, config, tokenizer, prompts, expected):
    assert mismatched_answers(tmp_path, config, tokenizer, prompts) == expected


def test_prompts_that_differ_in_case_and_white_space_are_one(tmp_path, config, tokenizer):
    config = dataclasses.replace(config, packing="none")
    data = [
        {**row, "prompt": p} for row, p in zip(labelled(3), ("w3 w4", "W3  w4", "w5"), strict=True)
    ]
    rows, _ = run(write(tmp_path / "a.jsonl", data), config, tokenizer, "labelled")
    _, other = segments(rows[0])
    assert tokenizer.decode(other.targets[other.weights > 0]).startswith("w5 ")


def test_rows_of_one_prompt_that_are_too_many_to_wait_take_the_row_before_them(
    tmp_path, config, tokenizer, monkeypatch
):
    monkeypatch.setattr(unit_tokenising, "_HELD_BACK", 2)
    found = mismatched_answers(tmp_path, config, tokenizer, [0, 1, 1, 1, 1, 1, 2])
    assert found == [1, 0, 0, 0, 0, 6, 0]
    with pytest.raises(DataError, match=r"the first 2 rows have one prompt.* in mixed order"):
        mismatched_answers(tmp_path, config, tokenizer, [0, 0, 0, 1])


def test_answers_that_cannot_be_mismatched_are_refused(tmp_path, config, tokenizer):
    same = [{**row, "completion": "w1"} for row in labelled(3)]
    cases = {
        "there is one row": labelled(1),
        "all 3 rows have one answer": same,
        "all 2 rows have one prompt": [{**row, "prompt": "w0"} for row in labelled(2)],
    }
    for number, (message, rows) in enumerate(cases.items()):
        with pytest.raises(DataError, match=f"{message}, but the KL of KTO is estimated from"):
            run(write(tmp_path / f"{number}.jsonl", rows), config, tokenizer, "labelled")
    # Bad rows, which may be why so few are left, are named first.
    source = write(tmp_path / "bad.jsonl", [*labelled(1), {**labelled(1)[0], "completion": ""}])
    with pytest.raises(DataError, match=r"bad.jsonl:2: 'completion' is empty"):
        run(source, config, tokenizer, "labelled")


@pytest.mark.parametrize("units", ["pairs", "labelled"])
def test_prompts_that_become_other_tokens_are_refused(tmp_path, config, units):
    path = tmp_path / "random.jinja"
    path.write_text("{{- '<|system|>' + (range(99999) | random | string) + '<|end|>' -}}" + PLAIN)
    config = dataclasses.replace(config, template=str(path))
    source = write(tmp_path / "a.jsonl", labelled(4) if units == "labelled" else pairs(4))
    with pytest.raises(DataError, match=r"a.jsonl:[1-4]: .*prompts .* are other tokens once"):
        run(source, config, byte_tokenizer(), units)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlength": "split"}, "'split', but pairs stay whole: each of its pieces"),
        ({"packing": "stream"}, "'stream', but pairs stay whole: documents of a stream"),
        ({"train_on": "all"}, "of pairs the last answers alone are compared"),
    ],
)
def test_what_would_tear_pairs_apart_is_refused_before_anything_is_read(
    config, tokenizer, options, message
):
    with pytest.raises(ConfigError, match=message):
        run("/nowhere.jsonl", dataclasses.replace(config, **options), tokenizer)


def test_the_log_counts_pairs(tmp_path, config, tokenizer):
    source = write(tmp_path / "a.jsonl", [*pairs(30), {**pairs(1)[0], "chosen": "w1 " * 20}])
    config.train, config.validation = source, "20%"
    rows, log = run(source, config, tokenizer)
    assert "format preference, columns prompt, chosen, rejected" in log
    assert "25 of 31 pairs, " in log
    assert f"the longest pair: {source}:" in log
    assert "document" not in log.replace("packing 'documents'", "")
    assert rows.statistics.documents == 25
    held_out, _ = run("20%", config, tokenizer, training=False)
    assert held_out.statistics.documents == 6
    origins = [
        set(itertools.chain(*(r.unit_origins(i) for i in range(len(r))))) for r in (rows, held_out)
    ]
    assert len(origins[0] | origins[1]) == 31
    assert not origins[0] & origins[1]


def test_over_length_pairs_are_refused_by_file_and_line(tmp_path, config, tokenizer):
    long = {"prompt": "w0 " * 40, "chosen": "w1", "rejected": "w2"}
    source = write(tmp_path / "a.jsonl", [*pairs(3), long])
    with pytest.raises(DataError) as error:
        run(source, config, tokenizer)
    text = str(error.value)
    assert "1 of 4 pairs (25.0%)" in text
    assert f"{source}:4 with 92 tokens" in text
    assert "--config.data.max_length=92" in text
    assert "split " not in text
    assert "take the same part of the prompt from both" in text


def write_units(folder, units, kind="pairs"):
    """Writes units given as (prompt, answers…), lengths of tokens that are all different."""
    next_id = 1000
    with DocumentWriter(folder, kind) as writer:
        writer.statistics.sources.append("rows.jsonl")
        for line, (prompt, *answers) in enumerate(units, start=1):
            shared = np.arange(next_id, next_id + prompt)
            next_id += prompt
            for label, (answer, tail) in zip((1, -1), answers, strict=True):
                ids = np.concatenate([shared, np.arange(next_id, next_id + answer + tail)])
                next_id += answer + tail
                trained = np.repeat([False, True, False], [prompt, answer, tail])
                example = Example(ids.astype(np.int32), trained)
                writer.add(example, source=0, line=line, content_hash=line, label=label)
    return Documents(folder)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def build_rows(units, *, overlength="error", max_length=24, packing="documents", begin=None):
        documents = write_units(tmp_path_factory.mktemp("documents"), units)
        statistics = PackingStatistics()
        rows = pack(
            documents,
            packing=packing,
            overlength=overlength,
            max_length=max_length,
            order=lambda place: len(units) - 1 - place,
            statistics=statistics,
            begin_token=begin,
        )
        folder = tmp_path_factory.mktemp("rows")
        write_rows(folder, rows, statistics, pad=0)
        return TokenRows(documents, folder)

    return build_rows


answer = st.tuples(st.integers(1, 14), st.integers(0, 2))
units_strategy = st.lists(st.tuples(st.integers(1, 20), answer, answer), min_size=1, max_size=25)


@settings(max_examples=60)
@given(
    units=units_strategy,
    overlength=st.sampled_from(["drop", "truncate", "cut_prompt_start", "cut_prompt_middle"]),
    packing=st.sampled_from(["documents", "none"]),
    begin=st.sampled_from([None, 1000]),
)
def test_packed_units_stay_whole_and_keep_their_prompts_equal(
    build, units, overlength, packing, begin
):
    rows = build(units, overlength=overlength, packing=packing, begin=begin)
    packed = rows.statistics.packed
    seen = []
    for number, row in enumerate(rows):
        found = list(segments(row))
        keys = [(source, row + 1, place) for source, row, place in rows.unit_keys(number)]
        assert len(found) == 2 * len(keys) <= 2 * rows.max_units
        assert rows.unit_origins(number) == [f"rows.jsonl:{key[1]}" for key in keys]
        assert (row.segments > 0).sum() <= 24
        assert packing == "documents" or len(keys) == 1
        for (chosen, rejected), (_, line, _) in zip(itertools.batched(found, 2), keys, strict=True):
            seen.append(line)
            prompt, *answers = units[line - 1]
            assert set(chosen["labels"]) == {1}
            assert set(rejected["labels"]) == {-1}
            assert set(chosen["units"]) == set(rejected["units"])
            kept = [int(np.argmax(side.weights)) + 1 for side in (chosen, rejected)]
            assert kept[0] == kept[1] <= prompt
            assert chosen.tokens[: kept[0]].tolist() == rejected.tokens[: kept[0]].tolist()
            for side, (length, _) in zip((chosen, rejected), answers, strict=True):
                trained = int(side.weights.sum())
                assert 1 <= trained <= length
                assert trained == length or overlength == "truncate"
                assert side.positions.tolist() == list(range(len(side.positions)))
    assert len(seen) == len(set(seen)) == packed.documents - packed.dropped
    assert packed.documents == len(units)
    trained = sum(n for _, *answers in units for n, _ in answers)
    assert packed.trained_tokens + packed.lost_trained_tokens == trained
    assert packed.trained_tokens == sum(row.weights.sum() for row in rows)
    assert packed.over_length == sum(2 * p + sum(map(sum, a)) > 24 for p, *a in units)
    fits = {line for line, (p, *a) in enumerate(units, 1) if 2 * p + sum(map(sum, a)) <= 24}
    assert fits <= set(seen)


@pytest.mark.parametrize(
    ("policy", "begin", "kept"),
    [
        ("cut_prompt_start", None, [4, 5, 6, 7]),
        ("cut_prompt_start", 1000, [0, 5, 6, 7]),
        ("cut_prompt_middle", None, [0, 1, 6, 7]),
    ],
)
def test_both_documents_lose_the_same_part_of_the_prompt(build, policy, begin, kept):
    """8 tokens of prompt, answers of 3 and 5, one token behind the first: 16 hold 4 of each."""
    rows = build([(8, (3, 1), (5, 0))], overlength=policy, max_length=16, begin=begin)
    chosen, rejected = segments(rows[0])
    assert (chosen.tokens[:4] - 1000).tolist() == (rejected.tokens[:4] - 1000).tolist() == kept
    assert (len(chosen.tokens), len(rejected.tokens)) == (7, 9)
    assert (chosen.weights.sum(), rejected.weights.sum()) == (3, 5)


def test_what_follows_the_answers_is_given_up_first(build):
    rows = build([(4, (2, 2), (2, 1))], overlength="cut_prompt_start", max_length=12)
    assert [len(side.tokens) for side in segments(rows[0])] == [6, 6]


def test_truncated_pairs_share_the_room(build):
    rows = build([(2, (3, 0), (20, 0)), (2, (20, 0), (20, 0))], overlength="truncate")
    lengths = [[len(side.tokens) for side in segments(row)] for row in rows]
    assert sorted(lengths) == [[5, 19], [12, 12]]


def test_a_pair_whose_answers_a_cut_makes_equal_is_dropped_and_counted(tmp_path, config, tokenizer):
    same = "w5 " * 30
    long = [{"prompt": "w0", "chosen": f"{same} w1", "rejected": f"{same} w2"}]
    source = write(tmp_path / "a.jsonl", [*pairs(2), *long])
    rows, log = run(source, dataclasses.replace(config, overlength="truncate"), tokenizer)
    assert rows.statistics.dropped == rows.statistics.packed.made_equal == 1
    assert "1 pair is in no row" in log
    assert "a cut made the answers of 1 equal" in log


@pytest.mark.parametrize("units", ["pairs", "labelled"])
def test_units_without_an_answer_after_a_cut_are_dropped(tmp_path, config, tokenizer, units):
    long = {"prompt": "w0 " * 60, "chosen": "w1", "rejected": "w2"}
    source = write(tmp_path / "a.jsonl", [*pairs(2), long])
    for overlength in ("truncate", "drop"):
        options = dataclasses.replace(config, overlength=overlength)
        rows, _ = run(source, options, tokenizer, units)
        size = 1 if units == "pairs" else 2
        assert rows.statistics.dropped == size
        assert rows.statistics.packed.made_equal == 0


def test_answers_that_become_the_same_tokens_are_refused(tmp_path, config, tokenizer):
    answers = [{"role": "assistant", "content": "w1", "reasoning": text} for text in ("w2", "w3")]
    row = {"prompt": "w0", "chosen": answers[0], "rejected": answers[1]}
    source = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"a.jsonl:1: .* are the same tokens once rendered"):
        run(source, dataclasses.replace(config, thinking="drop"), tokenizer)


def test_weights_are_shares_of_pairs(tmp_path, config, tokenizer):
    sources = [write(tmp_path / f"{i}.jsonl", pairs(count)) for i, count in enumerate((10, 40))]
    rows, log = run(f"{sources[0]}:0.5,{sources[1]}:0.5", config, tokenizer)
    assert rows.statistics.documents == 20
    assert f"{sources[1]}: 10 of 40 pairs in a pass, 50.0% of its pairs and" in log


def test_flipped_labels_are_other_rows(tmp_path, config, tokenizer):
    data = labelled(4)
    one, _ = run(write(tmp_path / "a.jsonl", data), config, tokenizer, "labelled")
    flipped = [{**row, "label": not row["label"]} for row in data]
    other, _ = run(write(tmp_path / "b.jsonl", flipped), config, tokenizer, "labelled")
    assert one.digest != other.digest


def test_the_same_rows_are_cached_for_each_objective_by_themselves(tmp_path, config, tokenizer):
    source = write(tmp_path / "a.jsonl", pairs(4))
    first, _ = run(source, config, tokenizer, "pairs")
    second, log = run(source, config, tokenizer, "labelled")
    assert "from the cache" not in log
    assert (first.statistics.documents, second.statistics.documents) == (4, 8)
    again, log = run(source, config, tokenizer, "pairs")
    assert "from the cache" in log
    assert again.digest == first.digest


def test_conversations_to_be_answered_have_the_good_answer(tmp_path, config, tokenizer):
    for data, units, expected in (
        (pairs(2), "pairs", ["w3 w1", "w4 w1"]),
        (labelled(3), "labelled", ["w4 w1", "w5 w1"]),
    ):
        source = write(tmp_path / f"{units}.jsonl", data)
        rows, _ = run(source, config, tokenizer, units)
        found = conversations(source, config, rows=rows, on_log=lambda text: None)
        assert [talk.messages[-1]["content"] for talk in found] == expected


def show(report, **options):
    console = Console(width=100, record=True, file=io.StringIO(), **options)
    console.print(report)
    return console


def test_the_report_shows_pairs_with_their_masks(tmp_path, config, tokenizer):
    data = pairs(6)
    config.train = write(tmp_path / "a.jsonl", [*data, data[0]])
    config.validation = write(tmp_path / "b.jsonl", [data[1], *pairs(9)[7:]])
    report = inspect(RunConfig(data=config), tokenizer, units="pairs")
    train, validation = report.sets
    assert (train.duplicates, validation.overlap.count) == (1, 1)
    assert train.counts.sum() == 7
    text = show(report).export_text()
    for line in (
        "1 of 3 validation pairs (33.3%) are in the training",
        "Tokens in a pair: train",
        "longest pair",
        "The first pairs",
        "a.jsonl:1: chosen",
        "a.jsonl:1: rejected",
        "⟦w3 w1 </s>⟧",
    ):
        assert line in text, line
    assert "document" not in text.replace("packing 'documents'", "")
    styled = show(report, force_terminal=True, color_system="truecolor").export_text(styles=True)
    assert "\x1b[1;32mw3 w1 </s>" in styled


def test_the_report_counts_and_measures_both_sides(tmp_path, config, tokenizer):
    config.train = write(tmp_path / "a.jsonl", [*labelled(5), {**labelled(1)[0], "label": True}])
    report = inspect(RunConfig(data=config), tokenizer, units="labelled")
    [train] = report.sets
    assert train.findings is not None
    assert (train.findings.counts, train.findings.lengths) == ((4, 2), (3.0, 3.0))
    assert (train.duplicates, train.findings.contradictions) == (0, 2)
    text = " ".join(show(report).export_text().split())
    assert "undesirable answers 2 mean tokens, undesirable 3.0" in text
    assert "train: 2 of 6 labelled answers are labelled both ways" in text
    config.train = write(tmp_path / "b.jsonl", [{**row, "label": 1} for row in labelled(3)])
    text = show(inspect(RunConfig(data=config), tokenizer, units="labelled")).export_text()
    assert "train: all answers are desirable" in text
    assert "undesirable answers 0 mean tokens, undesirable –" in " ".join(text.split())


def test_pairs_that_contradict_one_another_and_known_prompts_are_counted(
    tmp_path, config, tokenizer
):
    one, *rest = [{**row, "score_chosen": 2.0, "score_rejected": 1} for row in pairs(4)]
    turned = {**one, "chosen": one["rejected"], "rejected": one["chosen"], "score_chosen": 1}
    config.train = write(tmp_path / "a.jsonl", [one, *rest, turned])
    config.validation = write(tmp_path / "b.jsonl", [{**one, "chosen": "w7 w8 w9"}])
    report = inspect(RunConfig(data=config), tokenizer, units="pairs")
    text = " ".join(show(report).export_text().split())
    for part in (
        "prompts also in training – 1",
        "contradictions 2 0",
        "mean tokens, chosen 2.8 4.0",
        "mean tokens, rejected 2.2 2.0",
        "train: 2 of 5 pairs contradict another",
        "train: 'score_chosen' is not above 'score_rejected' in 1 of 5 rows",
        "validation: the prompts of 1 of 1 pair are in the training data too",
    ):
        assert part in text, (part, text)


def test_rows_of_an_array_on_one_line_are_told_by_their_number(tmp_path, config, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*pairs(3), {**pairs(1)[0], "rejected": []}]))
    with pytest.raises(DataError, match=r"a.json:1 \(row 4\): 'rejected' is \[\]"):
        run(str(path), config, tokenizer)
    path.write_text(json.dumps(pairs(3)))
    rows, _ = run(str(path), dataclasses.replace(config, packing="none"), tokenizer, training=False)
    found = [rows.unit_origins(i)[0] for i in range(3)]
    assert found == [f"{path}:1", f"{path}:1 (row 2)", f"{path}:1 (row 3)"]


def test_pairs_of_one_prompt_are_on_one_side_of_the_held_out_part(tmp_path, config, tokenizer):
    data = [{**row, "rejected": f"w{i}"} for row in pairs(20) for i in (50, 51, 52)]
    # Rows of the same content but for case are one too, whatever their prompts' tokens.
    upper = {**data[0], "prompt": data[0]["prompt"].upper()}
    config.train, config.validation = write(tmp_path / "a.jsonl", [*data, upper]), "20%"
    report = inspect(RunConfig(data=config), tokenizer, units="pairs")
    train, validation = report.sets
    assert (train.rows.statistics.documents, validation.rows.statistics.documents) == (49, 12)
    assert (validation.known_prompts, validation.overlap.count) == (0, 0)


def test_what_is_retained_is_measured_on_documents(tmp_path, config, tokenizer):
    config.train = write(tmp_path / "a.jsonl", pairs(6))
    kept = write(tmp_path / "b.jsonl", [{"prompt": "w0", "completion": "w1"}])
    sources = {"retention": kept}
    report = inspect(RunConfig(data=config), tokenizer, sources=sources, units="pairs")
    assert [item.rows.documents.units for item in report.sets] == ["pairs", "documents"]
    text = show(report).export_text()
    assert "Tokens in a document: retention" in text
    assert "pairs or documents" in text


def test_context_counts_for_each_document_by_itself(tmp_path, config, tokenizer):
    config.train = write(tmp_path / "a.jsonl", pairs(6))
    report = inspect(RunConfig(data=config), tokenizer, context=10, units="pairs")
    rows = report.sets[0].rows
    assert rows.longest_document <= 10 < rows.statistics.packed.longest
    assert "no document is longer than that" in " ".join(show(report).export_text().split())


def test_pairs_that_training_refuses_are_shown_with_the_refusal(tmp_path, config, tokenizer):
    config.max_length = 8
    config.train = write(tmp_path / "a.jsonl", pairs(6))
    report = inspect(RunConfig(data=config), tokenizer, units="pairs")
    text = show(report).export_text()
    assert "6 of 6 pairs (100.0%) are longer" in text
    assert "a.jsonl:1: chosen" in text
