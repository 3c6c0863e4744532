"""Damaged rows of preferences: each is compared as it reads, or refused with its file and line."""

import itertools
import json
import re

import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data import prepare
from jaxft.data.preparation import skipped_rows
from tests.data.test_fuzz import Writer, markers
from tests.templates import HARMONY, PLAIN, SPECIAL, TOOLS, byte_tokenizer

ROWS = 24
TEMPLATES = {"tools": TOOLS, "plain": PLAIN, "harmony": HARMONY}
ANSWERS = {
    "texts": ("chosen", "rejected"),
    "messages": ("chosen", "rejected"),
    "prompt": ("chosen", "rejected"),
    "openai": ("preferred_output", "non_preferred_output"),
    "sharegpt": ("chosen", "rejected"),
    "alpaca": ("output", "rejected"),
    "labelled": ("completion",),
}


class PreferenceWriter(Writer):
    """Makes rows of preferences, in each layout, and damages them."""

    def row(self, row_format):
        good, bad = self.message("assistant"), self.message("assistant")
        asked = self.messages()[:-1]
        match row_format:
            case "texts":
                row = {"prompt": self.text(), "chosen": good["content"], "rejected": bad["content"]}
            case "messages":
                row = {"chosen": [*asked, good], "rejected": [*asked, bad]}
            case "prompt":
                row = {"prompt": asked, "chosen": [good], "rejected": [bad]}
            case "openai":
                row = {"input": {"messages": asked}}
                row |= {"preferred_output": [good], "non_preferred_output": [bad]}
            case "sharegpt":
                turns = [{"from": "human", "value": self.text()}]
                row = {"conversations": turns}
                answers = [{"from": "gpt", "value": m["content"]} for m in (good, bad)]
                row |= {"chosen": answers[0], "rejected": answers[1]}
            case "alpaca":
                row = {"instruction": self.text(), "input": self.text()}
                row |= {"output": good["content"], "rejected": bad["content"]}
            case _:
                row = {"prompt": self.text(), "completion": good["content"]}
                row["label"] = self.random.random() < 0.5
        return row

    def keys(self):
        return [*super().keys(), "rejected", "prompt", "kto_tag", "input", "completion"]


def last_turn(answer):
    """What an answer says at its end, in whichever form it is."""
    if isinstance(answer, str) and answer.lstrip().startswith("[{"):
        answer = json.loads(answer)
    return answer[-1] if isinstance(answer, list) else answer


def content_of(turn):
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return str(content or "").rpartition("</think>")[2]


CASES = [(layout, template) for layout in ANSWERS for template in TEMPLATES]


@pytest.mark.parametrize(("layout", "template"), CASES)
def test_damaged_preferences_are_compared_as_they_read_or_refused(tmp_path, layout, template):
    tokenizer = byte_tokenizer()
    (tmp_path / "template.jinja").write_text(TEMPLATES[template])
    writer = PreferenceWriter(f"{layout} {template}", SPECIAL)
    # The first row, which is sound, tells the layout.
    lines = [json.dumps(writer.row(layout)), *(writer.damaged(layout) for _ in range(ROWS))]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line.encode("utf-8", "surrogatepass") + b"\n" for line in lines))
    units = "labelled" if layout == "labelled" else "pairs"
    config = DataConfig(
        template=str(tmp_path / "template.jinja"),
        cache=str(tmp_path / "cache"),
        max_length=1 << 16,
        bad_rows="skip",
        bad_share=1.0,
        packing="none",
    )
    rows = prepare(
        str(path), config, tokenizer, seed=0, training=False, units=units, on_log=lambda _: None
    )
    problems = {}
    for skipped in skipped_rows(rows):
        origin, line = skipped["origin"].rsplit(":", 1)
        assert origin.endswith("rows.jsonl")
        assert not re.search(r"Traceback|Error:|recursion", skipped["problem"])
        problems[int(line)] = skipped["problem"]
    found = {}
    for number in range(len(rows)):
        [origin] = rows.unit_origins(number)
        found[int(origin.rsplit(":", 1)[1])] = rows[number]
    assert not found.keys() & problems.keys()
    assert found.keys() | problems.keys() == set(range(1, len(lines) + 1))
    assert found and problems
    for number, unit in found.items():
        check(unit, json.loads(lines[number - 1]), ANSWERS[layout], tokenizer)


def check(unit, row, names, tokenizer):
    """Compares the documents of an accepted row with what the row says."""
    documents = [
        unit.map(lambda column, n=n: column[unit.segments == n])
        for n in range(1, int(unit.segments.max()) + 1)
    ]
    assert len(documents) == 2
    first = [int(np.argmax(document.weights)) + 1 for document in documents]
    assert first[0] == first[1]
    prompts = [document.tokens[: first[0]].tolist() for document in documents]
    assert prompts[0] == prompts[1]
    if isinstance(row.get("output"), list):
        row = {**row, "output": row["output"][0]}
    for document, name in itertools.zip_longest(documents, names):
        # One run is trained, up to the token that ends it.
        runs = np.flatnonzero(np.diff(np.r_[0, document.weights, 0])).reshape(-1, 2)
        assert len(runs) == 1
        trained = document.targets[document.weights > 0]
        assert int(trained[-1]) in tokenizer.all_special_ids
        if name is None:  # an answer to another prompt
            continue
        turn = last_turn(row[name])
        text = tokenizer.decode(trained)
        assert set(markers(content_of(turn))) <= set(markers(text)), (turn, text)
        assert set(markers(text)) <= set(markers(json.dumps(turn)))
    if len(names) == 2:
        assert [set(d["labels"]) for d in documents] == [{1}, {-1}]
    else:
        label = str(row["label"]).lower() in ("true", "1", "1.0")
        assert [set(d["labels"]) for d in documents] == [{1 if label else -1}, {0}]
