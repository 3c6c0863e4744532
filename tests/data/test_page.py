"""The page on data: every file in it is written, every command is run, every line is found."""

import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxft import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = {name: text for _, name, text in BLOCKS if name}


@dataclass
class Example:
    """Commands of the page, and lines that their output has."""

    commands: list[str]
    expected: list[str] = field(default_factory=list)


def examples() -> list[Example]:
    found: list[Example] = []
    for kind, name, text in BLOCKS:
        if kind == "sh":
            found.append(Example(text.splitlines()))
        elif kind == "text" and not name:
            found[-1].expected = text.splitlines()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("page")
    shutil.copytree(ROOT / "jaxft" / "demo" / "base", path / "base")
    for name, text in FILES.items():
        (path / name).write_text(text, "utf-8")
    hub = path / "org" / "support"
    hub.mkdir(parents=True)
    for split in ("train", "test"):
        (hub / f"{split}.jsonl").write_text(FILES["pairs.jsonl"])
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: test\n    path: test.jsonl\n---\n"
    )
    return path


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.commands[0][11:70])
def test_an_example_runs_as_it_stands(folder, example, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    assert example.expected
    for command in example.commands:
        jaxft, *arguments = shlex.split(command)
        assert jaxft == "jaxft"
        assert cli.main([*arguments, f"--data.cache={tmp_path}"]) == 0, capsys.readouterr().err
    shown = " ".join("".join(capsys.readouterr()).split())
    for line in example.expected:
        assert " ".join(line.split()) in shown, shown


def test_every_key_of_data_is_on_the_page():
    from jaxft.config import DataConfig, walk

    keys = {item.path for item in walk(DataConfig())} - {"shuffle", "streaming", "cache"}
    assert {key for key in keys if f"data.{key}" not in PAGE} == set()
