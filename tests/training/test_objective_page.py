"""The page on objectives: its modules are written out, its commands run, its lines found."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from jaxft import cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-an-objective.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
FILES = {name: text for _, name, text in BLOCKS if name}
COMMANDS = [text.strip() for kind, _, text in BLOCKS if kind == "sh"]
EXPECTED = [text.splitlines() for kind, name, text in BLOCKS if kind == "text" and not name]
# One device, and what compiles fast.
SMALL = [
    "--strategy=ddp",
    "--mesh.data=1",
    "--model.dtypes=float32",
    "--model.remat=none",
    "--eval.samples=0",
]


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize(
    ("command", "expected"),
    list(zip(COMMANDS, EXPECTED, strict=True)),
    ids=["tokens", "pairs"],
)
def test_an_objective_of_ones_own_trains_and_is_evaluated(
    command, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(ROOT / "jaxft" / "demo" / "base", tmp_path / "base")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, "utf-8")
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    jaxft, *arguments = shlex.split(command)
    assert jaxft == "jaxft"
    assert cli.main([*arguments, f"--data.cache={tmp_path}", *SMALL]) == 0, capsys.readouterr().err
    shown = "".join(capsys.readouterr())
    records = "".join(file.read_text() for file in tmp_path.glob("*/*.jsonl"))
    for line in expected:
        assert line in shown or line in records, (shown, records)
