"""result.json: what it says of runs that ended, failed, were stopped or killed."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxft.config import RunConfig
from jaxft.errors import CheckpointError, DataError
from jaxft.workdir.result import TrainResult, recorded
from jaxft.workdir.workdir import Workdir


def ended(path: Path, reason: str = "end", best_loss: float = 0.5) -> TrainResult:
    return TrainResult(path, path / "checkpoints/7", 7, reason, best_loss, 90, 30)


def config() -> RunConfig:
    found = RunConfig()
    found.model.path, found.data.train = "org/model", "rows.jsonl"
    return found


def read(path: Path) -> dict[str, Any]:
    return json.loads((path / "result.json").read_text())


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [("end", "succeeded", 0), ("patience", "succeeded", 0), ("SIGTERM", "stopped", 143)],
)
def test_a_run_that_ends_says_how(tmp_path: Path, reason: str, status: str, code: int):
    with recorded(Workdir(path=tmp_path), writes=True, existed=True) as note:
        assert not (tmp_path / "result.json").exists()
        note(ended(tmp_path, reason))
    found = read(tmp_path)
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["step"] == 7 and found["checkpoint"] == "checkpoints/7"
    assert found["tokens"] == 90 and found["trained_tokens"] == 30 and found["problems"] == []
    assert ended(tmp_path, reason).exit_code == code


def test_a_loss_that_was_never_evaluated_is_null(tmp_path: Path):
    with recorded(Workdir(path=tmp_path), writes=True, existed=True) as note:
        note(ended(tmp_path, best_loss=float("inf")))
    assert read(tmp_path)["best_loss"] is None


def test_an_error_says_all_problems(tmp_path: Path):
    (tmp_path / "result.json").write_text("{}")  # of an earlier part of the run
    with (
        pytest.raises(DataError),
        recorded(Workdir(path=tmp_path), writes=True, existed=True),
    ):
        raise DataError(["a.jsonl:1: one", "a.jsonl:2: two"])
    found = read(tmp_path)
    assert (found["status"], found["reason"]) == ("failed", "DataError")
    assert found["problems"] == ["a.jsonl:1: one", "a.jsonl:2: two"] and found["step"] is None


def test_a_killed_run_leaves_none(tmp_path: Path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(SystemExit), recorded(Workdir(path=tmp_path), writes=True, existed=True):
        raise SystemExit
    assert not (tmp_path / "result.json").exists()


def test_one_process_of_several_writes(tmp_path: Path):
    with recorded(Workdir(path=tmp_path), writes=False, existed=True) as note:
        note(ended(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_refused_start_leaves_nothing_in_a_folder_that_it_made(tmp_path: Path):
    for existed in (False, True):
        with (
            pytest.raises(DataError),
            recorded(Workdir(path=tmp_path), writes=True, existed=existed),
        ):
            raise DataError("no")
        assert (tmp_path / "result.json").exists() == existed
    # And is no reason against the next one.
    assert not Workdir.check(tmp_path, config(), resume=False, overwrite=False).resumed


def test_a_file_of_that_name_by_others_is_kept(tmp_path: Path):
    (tmp_path / "result.json").write_text('{"score": 3}')
    with pytest.raises(CheckpointError, match=r"result\.json"):
        Workdir.check(tmp_path, config(), resume=False, overwrite=False)
