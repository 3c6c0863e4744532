"""Files are replaced at once, and what is JSON can be read by every reader of JSON."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxft.errors import TrainingError
from jaxft.files import append_jsonl, read_jsonl, write_json, write_text


def test_readers_see_the_old_text_or_the_new_one(tmp_path):
    path = tmp_path / "page"
    texts = {"a" * 300_000, "b" * 300_000}
    write_text(path, "a" * 300_000)
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for text in sorted(texts) * 10:
        write_text(path, text)
    stop.set()
    reader.join()
    assert seen <= texts
    assert [p.name for p in tmp_path.iterdir()] == ["page"]


def test_lines_are_valid_json_whatever_the_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    record = {"a": math.nan, "b": [np.float32("inf"), np.int64(3)], "c": {"d": np.float32(0.5)}}
    append_jsonl(path, record)
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 3],
        "c": {"d": 0.5},
    }


def test_torn_lines_are_skipped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n7\n{"step": 2}\n{"step": 3}')
    assert list(read_jsonl(path)) == [{"step": 1}, {"step": 2}]


def test_full_disk_is_a_clear_error():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    with pytest.raises(TrainingError, match=r"No space left.*--resume"):
        append_jsonl(Path("/dev/full"), {"step": 1})


def test_json_files_are_valid_and_as_people_read_them(tmp_path):
    write_json(tmp_path / "x.json", {"größe": (1, math.inf), "b": np.float32(0.5)})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "größe": [\n    1,\n    null\n  ],\n  "b": 0.5\n}\n'
