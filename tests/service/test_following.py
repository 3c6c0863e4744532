"""What is read of a run's folder while it grows."""

import tracemalloc
from pathlib import Path

import pytest

from jaxft.files import append_jsonl
from jaxft.service import following
from jaxft.service.following import RunFolder


def test_a_file_is_read_again_once_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, reads = following.read_jsonl, []
    monkeypatch.setattr(following, "read_jsonl", lambda path: (reads.append(path), read(path))[1])
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    for step in (1, 2):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step})
        for _ in range(3):
            assert [record["step"] for record in folder.metrics()] == [1, 2][:step]
    assert len(reads) == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert folder.metrics() == []


def test_no_earlier_version_of_a_file_is_kept(tmp_path: Path):
    path, folder = tmp_path / "metrics.jsonl", RunFolder(tmp_path)
    for step in range(1, 2001):
        append_jsonl(path, {"step": step, "loss": 1 / step, "accuracy": 1 / step})
    tracemalloc.start()
    try:
        folder.metrics()
        once = tracemalloc.get_traced_memory()[0]
        for step in range(2001, 2009):
            append_jsonl(path, {"step": step})
            folder.metrics()
        assert tracemalloc.get_traced_memory()[0] < 2 * once
    finally:
        tracemalloc.stop()
