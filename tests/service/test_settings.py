"""What a service is started with, and the command that starts it."""

import dataclasses
from pathlib import Path

import pytest

from jaxft.cli import main
from jaxft.errors import ConfigError
from jaxft.service.server import devices_of
from jaxft.service.settings import Settings, name_models
from jaxft.service.target import variables_of


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_models_are_called_by_their_folders_ids_or_as_asked(tmp_path: Path):
    one = model(tmp_path / "many" / "one")
    two = model(tmp_path / "many" / "two")
    (tmp_path / "many" / "notes").mkdir()
    assert name_models([str(one)]) == {"one": str(one)}
    assert name_models([str(tmp_path / "many")]) == {"one": str(one), "two": str(two)}
    assert name_models([f"base={two}", "org/name", "short=org/name"]) == {
        "base": str(two),
        "org/name": "org/name",
        "short": "org/name",
    }


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        (["/nowhere/model"], "no folder"),
        (["name"], "no folder"),
        (["{}"], "no config.json"),
        (["x={}"], "one name cannot stand"),
        (["a:b=org/name"], "must not hold"),
        (["x=org/one", "x=org/two"], "Two models are called x"),
    ],
)
def test_models_that_are_not_there_are_refused(tmp_path: Path, paths: list[str], match: str):
    with pytest.raises(ConfigError, match=match):
        name_models([path.format(tmp_path) for path in paths])


def test_settings_reach_other_processes_unchanged(tmp_path: Path):
    settings = Settings(
        workdir=tmp_path,
        models={"a": "b"},
        device_sets=("0,1", "2,3"),
        webhooks=("http://x",),
        generation={"dtypes": "bfloat16"},
    )
    assert Settings.read(settings.write()) == settings


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"models": {}}, "at least one base model"),
        ({"organization": "a:b"}, "between colons"),
        ({"workdir": Path("/tmp/a,b")}, "told apart"),
        ({"executor_options": ("a=b",)}, "local has none"),
        ({"executor": "slurm", "device_sets": ("0",)}, "this machine"),
        ({"device_sets": ("0,1", "1,2")}, "twice"),
        ({"device_sets": ("0,1", "2")}, "as many devices"),
        ({"device_sets": ("cpu",)}, "no devices"),
        ({"device_sets": ("cpu",), "generate_on": "cpu"}, "no devices"),
        ({"device_sets": ("",)}, "no devices"),
        ({"device_sets": ("0", "1"), "generate_on": "1"}, "of a --device_set"),
        ({"webhooks": ("nonsense",)}, "expected http"),
        ({"webhook_secret": "/nowhere"}, "whsec_"),
        ({"webhook_secret": __file__}, "whsec_"),
        ({"device_sets": ("a",)}, "no devices"),
        ({"generate_on": "0;1"}, "no devices"),
    ],
)
def test_settings_that_could_not_work_are_refused(tmp_path: Path, values: dict, match: str):
    settings = Settings(workdir=tmp_path, models={"a": "b"})
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(settings, **values).check()


def test_a_process_of_a_tpu_host_is_told_how_its_chips_lie():
    found = variables_of("tpu", "2,3")
    assert found["TPU_VISIBLE_CHIPS"] == "2,3"
    assert found["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    assert found["TPU_PROCESS_PORT"] != variables_of("tpu", "0,1")["TPU_PROCESS_PORT"]
    assert variables_of("gpu", "2,3") == {"CUDA_VISIBLE_DEVICES": "2,3"}
    assert variables_of("cpu", "2,3") == variables_of("tpu", "") == {}
    with pytest.raises(ConfigError, match="1, 2, 4 or 8"):
        variables_of("tpu", "0,1,2")
    assert devices_of("cpu") == {"JAX_PLATFORMS": "cpu"}


def test_the_command_makes_and_drops_tokens(tmp_path: Path, capsys: pytest.CaptureFixture):
    workdir = f"--workdir={tmp_path / 'service'}"
    assert main(["serve", workdir, "--new_token=ci"]) == 0
    token = capsys.readouterr().out.strip()
    assert token.startswith("sk-jaxft-") and len(token) > 40
    assert token not in (tmp_path / "service" / "service.db").read_bytes().decode(errors="replace")
    assert main(["serve", workdir, "--new_token=ci"]) == 2
    assert "called 'ci' already" in capsys.readouterr().err
    assert main(["serve", workdir, "--drop_token=ci"]) == 0
    assert main(["serve", workdir, "--drop_token=ci"]) == 2
    assert main(["serve", workdir]) == 2
    assert "--models" in capsys.readouterr().err
    assert (tmp_path / "service").stat().st_mode & 0o077 == 0
