import contextlib
import json
import os
import subprocess

import pytest

from jaxft.config import RunConfig, to_dict
from jaxft.errors import CheckpointError, ConfigError
from jaxft.files import append_jsonl, read_jsonl
from jaxft.workdir.environment import environment
from jaxft.workdir.workdir import Workdir, absolute, claimed, explained_files


@pytest.fixture
def config():
    config = RunConfig()
    config.model.path = "org/model"
    config.data.train = "train.jsonl"
    return config


def _open(path, config, *, resume=False, overwrite=False):
    workdir = Workdir.check(path, config, resume=resume, overwrite=overwrite)
    workdir.begin(config)
    return workdir


def _run(path, config):
    """Leaves a folder as a run leaves it."""
    workdir = _open(path, config)
    append_jsonl(workdir.metrics, {"step": 1})
    (workdir.checkpoints / "1").mkdir(parents=True)
    workdir.events.mkdir()
    return workdir


def test_new_folder_gets_config_and_environment(tmp_path, config):
    workdir = _open(tmp_path / "a" / "b", config)
    assert json.loads(workdir.config.read_text()) == to_dict(config)
    assert json.loads(workdir.environment.read_text())["packages"]["jax"]
    assert not workdir.resumed


def test_folder_of_another_run_is_refused_naming_both_flags(tmp_path, config):
    _run(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"--resume.*--overwrite"):
        _open(tmp_path, config)


def test_folder_of_a_start_that_failed_before_its_first_record_is_reused(tmp_path, config):
    _open(tmp_path, config)
    config.data.train = "other.jsonl"
    assert not _open(tmp_path, config).resumed


def test_resume_keeps_the_run(tmp_path, config):
    _run(tmp_path, config)
    workdir = _open(tmp_path, config, resume=True)
    assert workdir.resumed
    assert workdir.changes == ()
    assert list(read_jsonl(workdir.metrics)) == [{"step": 1}]
    assert (workdir.checkpoints / "1").is_dir()


def test_resume_where_no_run_is_starts_one(tmp_path, config):
    assert not _open(tmp_path / "new", config, resume=True).resumed


def test_a_folder_is_named_without_dots_and_a_link_keeps_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for path, name in {".": "", "a/..": "", "a/../b": "b", "link": "link", "./c": "c"}.items():
        assert absolute(path) == tmp_path / name


def test_resume_refuses_changes_that_break_the_continuation_all_at_once(tmp_path, config):
    _run(tmp_path, config)
    config.model.path, config.train.seed, config.data.max_length = "org/other", 7, 64
    config.model.matmul = "int8"
    with pytest.raises(CheckpointError) as error:
        _open(tmp_path, config, resume=True)
    text = str(error.value)
    assert "model.path was 'org/model' and is now 'org/other'." in text
    assert "train.seed was 0 and is now 7." in text
    assert "model.matmul was '' and is now 'int8'." in text
    assert "data.max_length was 1024 and is now 64." in text
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model.path"] == "org/model"


def test_the_share_of_an_average_in_the_parameters_stays(tmp_path, config):
    config.optim.name, config.optim.schedule = "schedule_free", "constant"
    _run(tmp_path, config)
    config.optim.beta1 = 0.5
    with pytest.raises(CheckpointError, match=r"optim\.beta1 was 0\.9 and is now 0\.5"):
        _open(tmp_path, config, resume=True)


def test_a_model_that_only_an_adapter_is_made_for_may_be_elsewhere(tmp_path, config):
    config.adapter.rank = 2
    _run(tmp_path, config)
    config.model.path = "elsewhere"
    assert _open(tmp_path, config, resume=True).changes


def test_resume_reports_changes_that_do_not_break_the_continuation(tmp_path, config):
    _run(tmp_path, config)
    config.train.steps, config.model.remat, config.train.workdir = 99, "none", "elsewhere"
    workdir = _open(tmp_path, config, resume=True)
    assert workdir.changes == (
        "model.remat was 'full' and is now 'none'.",
        "train.steps was 0 and is now 99.",
    )
    assert json.loads(workdir.config.read_text())["train.steps"] == 99


def test_what_layers_keep_may_be_left_open_and_is_what_was_recorded(tmp_path, config):
    config.model.remat = "qkv"
    _run(tmp_path, config)
    config.model.remat = "auto"
    workdir = Workdir.check(tmp_path, config, resume=True, overwrite=False)
    assert workdir.changes == ()
    assert workdir.recorded("model.remat") == "qkv"
    workdir.config.write_text("{}")  # as of a version that had no such key
    assert workdir.recorded("model.remat") == "full"


@pytest.mark.parametrize(
    ("before", "after", "is_fixed"),
    [
        ("a.jsonl", "b.jsonl", False),
        ("5%", "10%", True),
        ("5%", "b.jsonl", True),
        ("", "5%", True),
    ],
)
def test_what_is_held_out_of_the_training_data_stays(tmp_path, config, before, after, is_fixed):
    config.data.train, config.data.validation = "t.jsonl", before
    _run(tmp_path, config)
    config.data.validation, config.data.bad_share = after, 0.5
    if is_fixed:
        with pytest.raises(CheckpointError, match=f"data.validation was '{before}' and is now"):
            _open(tmp_path, config, resume=True)
    else:
        assert len(_open(tmp_path, config, resume=True).changes) == 2


def test_resume_takes_the_default_for_keys_the_old_run_did_not_know(tmp_path, config):
    workdir = _run(tmp_path, config)
    old = json.loads(workdir.config.read_text())
    del old["train.seed"]
    workdir.config.write_text(json.dumps(old | {"train.gone": 1}))
    assert _open(tmp_path, config, resume=True).changes == ()


def test_resume_with_an_unreadable_config_says_so(tmp_path, config):
    _run(tmp_path, config).config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        _open(tmp_path, config, resume=True)


def test_overwrite_deletes_the_old_run(tmp_path, config):
    _run(tmp_path, config)
    workdir = _open(tmp_path, config, overwrite=True)
    assert sorted(p.name for p in workdir.path.iterdir()) == ["config.json", "environment.json"]


def test_overwrite_with_a_wrong_config_deletes_nothing(tmp_path, config):
    workdir = _run(tmp_path, config)
    config.train.accumulation = 3
    with pytest.raises(ConfigError):
        _open(tmp_path, config, overwrite=True)
    assert workdir.metrics.exists()


def test_overwrite_does_not_delete_a_folder_with_foreign_files(tmp_path, config):
    workdir = _run(tmp_path, config)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        _open(tmp_path, config, overwrite=True)
    assert workdir.metrics.exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path, config):
    with pytest.raises(ConfigError, match="give one"):
        _open(tmp_path, config, resume=True, overwrite=True)


def test_a_file_is_no_workdir(tmp_path, config):
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        _open(tmp_path / "f", config)
    with pytest.raises(CheckpointError, match="no run's folder"):
        Workdir.read(tmp_path)


@contextlib.contextmanager
def without_rights():
    """Lets root be nobody, whom permissions hold for."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
    else:
        yield


def use(folder, config):
    """Uses a folder as a run does."""
    with claimed(absolute(folder)):
        _open(folder, config)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file/run", r"/file is a file"),
        ("file/run/deeper", r"/file is a file"),
        ("dangling", r"/dangling is a link to .*nowhere, where there is nothing"),
        ("dangling/run", r"/dangling is a link to .*nowhere, where there is nothing"),
        ("circle/run", r"/circle is a link to .*circle, where there is nothing"),
        ("x" * 300, r"File name too long"),
        ("nul\0byte", r"null byte"),
        ("own/run", r"Permission denied"),
    ],
)
def test_a_folder_that_no_run_can_have_is_refused_in_words(tmp_path, config, name, why):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "own").mkdir(mode=0o500)
    rights = without_rights() if name == "own/run" else contextlib.nullcontext()
    with pytest.raises(CheckpointError, match=why) as error, rights:
        use(tmp_path / name, config)
    assert "--config.train.workdir=" in str(error.value)
    with pytest.raises(CheckpointError, match=f"{why}|is no run's folder"):
        Workdir.read(tmp_path / name)


def test_a_folder_on_storage_that_cannot_be_written_is_refused_in_words(tmp_path, config):
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=8k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        for name in ("run", "."):
            with pytest.raises(CheckpointError, match="Read-only file system"):
                use(tmp_path / name, config)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_the_home_of_nobody_is_refused_in_words(config):
    with pytest.raises(ConfigError, match=r"train\.workdir is '~nobody-has-this/run'"):
        Workdir.check("~nobody-has-this/run", config, resume=False, overwrite=False)


def test_files_of_a_run_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    said = pytest.raises(CheckpointError, match=r"metrics\.jsonl: Is a directory")
    with said, explained_files(tmp_path):
        (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileNotFoundError), explained_files(tmp_path / "run"):
        (tmp_path / "data.jsonl").read_text()


def test_a_claimed_folder_that_stays_empty_is_not_left(tmp_path, config):
    with claimed(tmp_path / "a/b"):
        assert (tmp_path / "a/b/run.lock").is_file()
    assert not (tmp_path / "a").exists()
    use(tmp_path / "a/b", config)
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
        "config.json",
        "environment.json",
    ]


def test_a_claimed_folder_is_no_folder_of_others(tmp_path, config):
    with claimed(tmp_path):
        assert not _open(tmp_path, config).resumed
        append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})
        workdir = _open(tmp_path, config, overwrite=True)
        assert not workdir.metrics.exists() and (tmp_path / "run.lock").is_file()


def test_environment_has_versions_and_devices_but_no_host_name():
    import platform

    found = environment()
    assert found["devices"] == 8
    assert found["backend"] == "cpu"
    assert found["packages"].keys() >= {"jax", "flax", "orbax-checkpoint"}
    assert platform.node() not in json.dumps(found)


def test_files_of_others_are_not_touched_by_a_start(tmp_path, config):
    folder = tmp_path / "project"
    (folder / "model").mkdir(parents=True)
    (folder / "model/model.safetensors").write_text("weights")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json, model, which no run"):
        Workdir.check(folder, config, resume=False, overwrite=False)
    assert (folder / "model/model.safetensors").read_text() == "weights"


def test_files_beside_a_run_do_not_hinder_it(tmp_path, config):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}")
    _open(folder, config)
    assert (folder / "train.jsonl").read_text() == "{}"


def test_checking_changes_nothing_before_the_run_begins(tmp_path, config):
    folder = _run(tmp_path / "run", config).path
    before = sorted(path.name for path in folder.iterdir())
    for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        Workdir.check(folder, config, **flags)
        assert sorted(path.name for path in folder.iterdir()) == before
    workdir = Workdir.check(folder, config, resume=False, overwrite=True)
    workdir.begin(config)
    assert not workdir.metrics.exists() and not workdir.checkpoints.exists()
