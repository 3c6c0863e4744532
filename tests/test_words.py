"""What jaxft says: advice can be pasted, links of the documents lead somewhere."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxft.config import RunConfig, walk
from tests.test_setup import PACKAGE, ROOT, sources

KEYS = "|".join(re.escape(item.path) for item in walk(RunConfig()) if "." in item.path)
BARE = rf"(?<![\w.…])(?P<key>{KEYS})"
# `data.format=text` as something to write, and sentences that tell to set a key.
ADVICE = re.compile(
    rf"{BARE}=|"
    rf"\b(?i:set|unset|lower|lowering|raise|raising|increase|choose|change|use|try|with)\s+"
    rf"(?:a\s+|another\s+|smaller\s+|larger\s+|higher\s+|lower\s+)*{BARE.replace('key', 'other')}"
)


# A summary is an imperative or a sentence with a subject, and what an attribute means is a noun
# phrase: neither leans on a name that stands somewhere else ("Of the whole array", "As `k`").
LEANING = re.compile(
    r"(?:Of|That|As|What|Whose|How|Where|Which|Those|Their|Its|Why|If|By|With|From|To|In|When|Inside"
    r"|On|For)\b"
)
QUAINT = re.compile(r"\bmend(?:s|ed|ing)?\b|\bcan(?:not)? be had\b")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yields line, name and docstring of a module and of all that it defines."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, getattr(node, "name", "the module"), text


def attributes(docstring: str) -> Iterator[tuple[str, str]]:
    """Yields the names under `Attributes:` and the lines behind them."""
    section = re.search(r"^Attributes:\n((?:  .*\n?|\n)+)", docstring, re.MULTILINE)
    yield from re.findall(r"^  (\w+): (.*)", section[1], re.MULTILINE) if section else []


def leaning(tree: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module that are no sentence and no noun phrase."""
    for line, name, text in docstrings(tree):
        summary = text.splitlines()[0]
        if LEANING.match(summary) or not summary.endswith("."):
            yield f"{line}: {name}: {summary}"
        for attribute, meaning in attributes(text):
            if LEANING.match(meaning):
                yield f"{line}: {name}.{attribute}: {meaning}"


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


def test_docstrings_are_sentences_and_attributes_noun_phrases():
    found = [f"{path}:{one}" for path, tree in sources() for one in leaning(tree)]
    assert not found, "\n".join(found)


def test_a_docstring_that_leans_on_a_name_is_found():
    tree = ast.parse(
        '''
class Price:
    """Of one chip.

    Attributes:
      currency: Of both.
      date: Day on which it was looked up.
    """

    def total(self):
        """Returns the sum"""
'''
    )
    assert list(leaning(tree)) == [
        "3: Price: Of one chip.",
        "3: Price.currency: Of both.",
        "11: total: Returns the sum",
    ]


def test_nothing_is_mended_or_had():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    modules = [PACKAGE / path for path, _ in sources()]
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in [*pages, *modules]
        for match in QUAINT.finditer(file.read_text())
    ]
    assert not found


def test_links_of_the_documents_lead_somewhere():
    broken = []
    for file in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", file.read_text()):
            if "://" not in link and not (file.parent / link).exists():
                broken.append(f"{file.relative_to(ROOT)}: {link}")
    assert not broken


@pytest.mark.parametrize(
    "name", ["sft", "dpo", "simpo", "orpo", "kto", "lora", "rslora", "dora", "qlora"]
)
def test_a_configuration_states_its_command_and_what_came_of_it(name):
    scope = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))
    assert f"jaxft train --config=configs/{name}.py" in scope["__doc__"]
    assert "\nResult with MODEL" in scope["__doc__"]
    config = scope["get_config"]()
    config.model.path, config.data.train = "org/model", "rows.jsonl"
    config.validate(training=True)
    assert name == config.objective.name or config.adapter.rank


# Files, and folders within folders.
PATH = re.compile(r"`([\w.-]+/(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|md|toml|sh)|[\w.-]+/))`")


def test_files_that_documents_name_exist():
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for path in PATH.findall(page.read_text())
        if not any((folder / path).exists() for folder in (ROOT, PACKAGE))
    ]
    assert not missing


def test_pictures_are_small():
    pictures = list(Path(ROOT / "docs/images").glob("*.png"))
    assert pictures
    assert all(picture.stat().st_size < 150_000 for picture in pictures)
