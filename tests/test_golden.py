"""Where each strategy puts the arrays of two real models, and what the compiled step exchanges.

A difference is for the reader of a change to judge; `python -m tests.write_golden` then writes the
new files.
"""

import difflib

import pytest

from tests.strategies import BUILT_IN, MESHES
from tests.write_golden import EXPECTED, GOLDEN, JAX


def compare(name: str) -> None:
    text, *arguments = EXPECTED[name]
    file = GOLDEN / f"{name}.txt"
    found, golden = text(*arguments), file.read_text()
    if found != golden:
        lines = difflib.unified_diff(
            golden.splitlines(), found.splitlines(), f"golden/{file.name}", "found", lineterm=""
        )
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("shardings")])
def test_arrays_live_where_the_golden_file_says(name):
    compare(name)


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("collectives")])
def test_the_compiled_step_exchanges_what_the_golden_file_says(name):
    written_by = (GOLDEN / f"{name}.txt").read_text().partition(",")[0]
    if written_by != f"jax {JAX}":
        pytest.skip(f"the file is of {written_by}; jax {JAX} may compile to other collectives")
    compare(name)


def test_every_strategy_has_a_mesh_and_every_golden_file_a_strategy():
    assert set(MESHES) == set(BUILT_IN)
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(EXPECTED)
