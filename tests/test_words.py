"""What jaxft says: advice can be pasted, links of the documents lead somewhere."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxft.config import RunConfig, walk
from tests.test_setup import ROOT, sources

KEYS = "|".join(re.escape(item.path) for item in walk(RunConfig()) if "." in item.path)
BARE = rf"(?<![\w.])(?P<key>{KEYS})"
# `data.format=text` as something to write, and sentences that tell to set a key.
ADVICE = re.compile(
    rf"{BARE}=|"
    rf"\b(?i:set|unset|lower|lowering|raise|raising|increase|choose|change|use|try|with)\s+"
    rf"(?:a\s+|another\s+|smaller\s+|larger\s+|higher\s+|lower\s+)*{BARE.replace('key', 'other')}"
)


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the texts of a module that are no docstrings; gaps of f-strings are `…`."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            inside.update(part for part in ast.walk(node) if part is not node)
            parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.lineno, node.value


def test_advice_names_keys_as_flags_that_can_be_pasted():
    bare = [
        f"{path}:{line}: …{text[max(0, found.start() - 30) : found.end() + 20]}…"
        for path, tree in sources()
        for line, text in texts(tree)
        if (found := ADVICE.search(text))
    ]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write data.format=text.", True),
        ("Set data.template to one", True),
        ("after lowering optim.learning_rate", True),
        ("Choose another train.workdir.", True),
        ("write --config.data.format=text.", False),
        ("data.format is 'columns'", False),
        ("set --config.data.template=FILE", False),
    ],
)
def test_advice_is_told_from_naming_a_key(text, found):
    assert bool(ADVICE.search(text)) is found


def test_links_of_the_documents_lead_somewhere():
    broken = []
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
            if "://" not in link and not (file.parent / link).exists():
                broken.append(f"{file.relative_to(ROOT)}: {link}")
    assert not broken


def test_pictures_are_small():
    pictures = list(Path(ROOT / "docs/images").glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
