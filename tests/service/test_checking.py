"""What a job is checked for before it is queued: on a tiny model, with the data checks of a run."""

import importlib.util
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxft.config import from_dict
from jaxft.service.checking import (
    BASE_RATES,
    Refusal,
    Request,
    check,
    default_batch,
    default_epochs,
)
from jaxft.service.jsonl import require_json_lines
from jaxft.service.target import Target
from tests.tiny_run import write_base, write_chats

AUTO = dict.fromkeys(
    "n_epochs batch_size learning_rate_multiplier beta lora_rank max_length".split(), "auto"
) | {"config": {}}
CPU = Target("cpu", "cpu", 1, 8 << 30, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jax.devices()  # jax starts with the tests' eight, of which each check takes what it needs
    found = tmp_path_factory.mktemp("checking")
    write_base(found / "base")
    write_chats(found / "file-train", 40)
    write_chats(found / "file-valid", 12, seed=1)
    return found


def request(folder: Path, **changes: Any) -> Request:
    asked = AUTO | changes.pop("asked", {})
    values = {
        "path": str(folder / "base"),
        "step": "best",
        "method": "supervised",
        "seed": 3,
        "training": str(folder / "file-train"),
        "training_name": "mine.jsonl",
        "validation": str(folder / "file-valid"),
        "validation_name": "held out.jsonl",
        "workdir": str(folder / "run"),
        "cache": str(folder / "cache"),
        "wandb": "",
    }
    return Request(asked=asked, **values | changes)


def test_settings_that_are_auto_get_numbers_and_become_a_config_that_runs(folder: Path):
    found = check(request(folder, shown=True, name="ft:base:lab::1a"), CPU)
    assert found["hyperparameters"] == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
        "lora_rank": 16,
        "max_length": 64,
    }
    config = from_dict(found["config"])
    config.validate(training=True)
    assert (
        config.adapter.rank == 16 and config.optim.learning_rate == BASE_RATES["supervised", False]
    )
    assert config.data.max_length == 64 and config.train.save_epochs
    assert config.train.name == "ft:base:lab::1a"
    # A step has 4 examples, about: rows hold two or three.
    assert found["rows"] < 20 and config.train.batch_size == 2
    assert found["steps"] == -(-3 * found["rows"] // 2)
    report = found["data"]
    assert [s["name"] for s in report["sets"]] == ["train", "validation"]
    assert report["samples"][0]["origin"] == "mine.jsonl:1"
    runs = report["samples"][0]["runs"]
    assert [run["trained"] for run in runs] == [False, True] and "<end>" in runs[1]["text"]
    json.dumps(found, allow_nan=False)


def test_asked_settings_are_taken(folder: Path):
    asked = {
        "n_epochs": 2,
        "batch_size": 1,
        "learning_rate_multiplier": 0.5,
        "lora_rank": 0,
        "max_length": 40,
        "config": {"optim.weight_decay": 0.1, "train.steps": 5},
    }
    found = check(request(folder, asked=asked), CPU)
    config = from_dict(found["config"])
    assert config.adapter.rank == 0 and config.optim.learning_rate == pytest.approx(5e-6)
    assert config.data.packing == "none" and config.train.batch_size == 1
    assert config.data.max_length == 40 and config.optim.weight_decay == 0.1
    assert found["steps"] == 5 and found["rows"] == 40


@pytest.mark.parametrize(
    ("rows", "code", "match"),
    [
        (['{"messages": [{"role": "user", "content": "hi"}]}'] * 12, "invalid_file_format", ":1"),
        (['{"question": "a"}'] * 12, "invalid_file_format", "mine.jsonl:1"),
        (['{"mesages": []}'] * 12, "invalid_file_format",
         r"mine\.jsonl:1: .* Did you mean 'messages'\?"),
        (['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
          '{"mesages": []}'] * 9, "invalid_file_format",
         r"mine\.jsonl:2: .* Did you mean 'messages'\?"),
        (["{broken"] * 12, "invalid_file_format", "mine.jsonl:1"),
        (['{"prompt": "a", "completion": "b"}'] * 9, "invalid_n_examples", "has 9 examples"),
        (['{"prompt": "a", "completion": "b"}'] * 12 + ['{"prompt": 3}'], "invalid_file_format",
         "mine.jsonl:13"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_the_file_that_users_know(
    folder: Path, tmp_path: Path, rows: list[str], code: str, match: str
):
    path = tmp_path / "file-bad"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(Refusal, match=match) as error:
        check(request(folder, training=str(path)), CPU)
    assert error.value.code == code and error.value.param == "training_file"
    assert "file-bad" not in error.value.message and str(tmp_path) not in error.value.message


def test_keys_of_the_config_decide_how_data_is_read(folder: Path, tmp_path: Path):
    path = tmp_path / "file-bad"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 12 + '{"prompt": 3}\n')
    with pytest.raises(Refusal, match=r"hyperparameters\.config\['data\.bad_rows'\]=skip"):
        check(request(folder, training=str(path)), CPU)
    keys = {"data.bad_rows": "skip", "data.bad_share": 0.5}
    assert check(request(folder, training=str(path), asked={"config": keys}), CPU)["examples"] == 12


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\xfe{\x00", "is UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'[{"messages": []}]', "JSON array"),
        (b"prompt,completion\na,b\n", "prompt,completion"),
        (b"{'messages': []}\n", "no JSON object"),
        (b"\xe9t\xe9\n", "no UTF-8"),
    ],
)
def test_files_of_other_kinds_are_called_by_their_name(
    folder: Path, tmp_path: Path, content: bytes, match: str
):
    (tmp_path / "file-x").write_bytes(content)
    with pytest.raises(Refusal, match=match) as error:
        check(request(folder, training=str(tmp_path / "file-x")), CPU)
    assert error.value.code == "invalid_file_format" and "mine.jsonl" in error.value.message


def test_a_row_that_is_too_large_is_named_before_it_is_tokenised(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxft.service.jsonl._MOST_ROW", 1 << 10)
    path, row = tmp_path / "file-large", '{"prompt": "a", "completion": "%s"}\n'
    exact = 1024 - len(row % "")
    path.write_text(row % "b" * 12 + row % ("b" * exact))
    with pytest.raises(Refusal, match="longer than data"):  # tokenised
        check(request(folder, training=str(path)), CPU)
    path.write_text(row % "b" * 12 + row % ("b" * (exact + 1)))
    with pytest.raises(Refusal, match=r"^mine\.jsonl:13: the row is larger than 1 KiB") as error:
        check(request(folder, training=str(path)), CPU)
    assert error.value.code == "invalid_file_format" and error.value.param == "training_file"


@pytest.mark.parametrize(
    ("start", "words"), [(b'{"prompt": "', "^mine:1: the row is larger"), (b"[", "is a JSON array")]
)
def test_a_file_of_one_large_line_is_not_read_whole(tmp_path: Path, start: bytes, words: str):
    path = tmp_path / "file-large"
    path.write_bytes(start + b"a" * (64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match=words):
            require_json_lines(str(path), "mine", "training_file")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_advice_is_in_the_words_of_a_request(folder: Path, tmp_path: Path):
    pairs = tmp_path / "file-pairs"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 12)
    with pytest.raises(Refusal, match=r"method\.type='dpo'"):
        check(request(folder, training=str(pairs)), CPU)
    long = tmp_path / "file-long"
    long.write_text(json.dumps({"prompt": "a" * 500, "completion": "b"}) + "\n")
    long.write_text(long.read_text() * 12)
    with pytest.raises(Refusal, match="context is 128 tokens") as error:
        check(request(folder, training=str(long)), CPU)
    assert "max_length=" not in error.value.message and "--config" not in error.value.message
    asked = {"config": {"data.overlength": "drop"}}
    mixed = tmp_path / "file-mixed"
    answer = {"role": "assistant", "content": "b"}
    row = {"messages": [{"role": "user", "content": "a" * 500}, answer]}
    mixed.write_text((json.dumps(row) + "\n") * 12 + (folder / "file-train").read_text())
    assert check(request(folder, training=str(mixed), asked=asked), CPU)["left_out"] == 12


def test_bad_validation_rows_name_the_validation_file(folder: Path, tmp_path: Path):
    path = tmp_path / "file-bad"
    path.write_text('{"messages": [{"role": "user", "content": 3}]}\n' * 3)
    with pytest.raises(Refusal, match=r"held out\.jsonl:1") as error:
        check(request(folder, validation=str(path)), CPU)
    assert error.value.param == "validation_file"


def test_keys_take_part_in_what_is_derived_and_none_is_taken_in_silence(folder: Path):
    asked = {"n_epochs": 50, "batch_size": 1, "config": {"train.steps": 5}}
    found = check(request(folder, asked=asked), CPU)
    assert found["steps"] == 5 and found["config"]["optim.warmup_steps"] <= 5
    with pytest.raises(Refusal, match="context has") as error:
        check(request(folder, asked={"max_length": 1 << 20}), CPU)
    assert error.value.param == "hyperparameters.max_length"
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(Refusal, match="wandb is not installed"):
            check(request(folder, wandb="project"), CPU)


def test_examples_beyond_max_length_are_refused(folder: Path):
    with pytest.raises(Refusal, match=r"mine\.jsonl"):
        check(request(folder, asked={"max_length": 16}), CPU)


def test_a_wrong_key_of_the_config_is_refused(folder: Path):
    with pytest.raises(Refusal, match=r"optim\.weight_decay"):
        check(request(folder, asked={"config": {"optim.weight_decay": -1}}), CPU)


def test_preferences_are_read_for_dpo(folder: Path, tmp_path: Path):
    row = {
        "input": {"messages": [{"role": "user", "content": "say a"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    }
    path = tmp_path / "file-pairs"
    path.write_text("".join(json.dumps(row | {"input": {"messages": [
        {"role": "user", "content": f"say a {i}"}]}}) + "\n" for i in range(20)))  # fmt: skip
    values = {"training": str(path), "validation": "", "validation_name": "", "method": "dpo"}
    found = check(request(folder, **values, asked={"beta": 0.3}), CPU)
    assert found["hyperparameters"]["beta"] == 0.3
    assert found["config"]["objective.dpo.beta"] == 0.3
    with pytest.raises(Refusal):  # conversations are no pairs
        check(request(folder, method="dpo", validation="", validation_name=""), CPU)


def test_what_cannot_fit_is_refused_with_the_smallest_change(folder: Path):
    """The devices are as many CPU ones as the tests have, each with little memory."""
    asked = {"lora_rank": 0, "batch_size": 40, "config": {"train.accumulation": 1}}
    with pytest.raises(Refusal, match="does not fit") as error:
        check(request(folder, asked=asked), Target("gpu", "a card", 1, int(51.5 * 2**20), ""))
    assert error.value.code == "does_not_fit"
    assert "train.accumulation" in error.value.message
    assert "--config" not in error.value.message  # in the words of a request
    with pytest.raises(Refusal, match="None of the settings"):
        check(request(folder), Target("gpu", "a card", 1, 1 << 20, ""))


def test_time_is_planned_for_a_slice_that_is_known(folder: Path):
    found = check(request(folder), Target("", "", 0, 0, "h100:2"))
    assert found["step_seconds"] > 0 and "h100" in found["takes"]
    assert found["config"]["train.batch_size"] % 2 == 0


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"),
    [
        (10, 10, 1),
        (33, 3, 3),
        (34, 3, 3),
        (500, 3, 8),
        (8000, 3, 16),
        (25_000, 1, 50),
        (500_000, 1, 256),
    ],
)
def test_auto_by_the_number_of_examples(examples: int, epochs: int, batch: int):
    assert default_epochs(examples) == epochs and default_batch(examples) == batch
