"""Adapters that PEFT made, read into our layout, against the logits that PEFT computes."""

import numpy as np
import pytest

from jaxft.hf.peft.read import read_adapter
from jaxft.models.families import FAMILIES
from tests.adapters import adapted, bare_model, logits_of, merged, shapes_of
from tests.oracle.adapter_cases import MAKINGS, load_made
from tests.oracle.cases import CASES
from tests.strategies import UNLIKE


def marked(short: tuple[str, ...]) -> list:
    """Returns the names of all adapters; those that do not begin so take long."""
    long = pytest.mark.slow(seconds=4)
    return [pytest.param(name, marks=[] if name.startswith(short) else [long]) for name in MAKINGS]


# Others' sites are made of the same parts as sites of these are.
BESIDE = [
    param
    for param in marked(("llama_dora", "llama_head"))
    if param.values[0].startswith((*UNLIKE, "mixtral", "qwen3_moe", "phi3"))
]


def test_peft_made_an_adapter_of_every_family():
    assert {CASES[making.case]["model_type"] for making in MAKINGS.values()} == FAMILIES.keys()


# A model is compiled once for all adapters that are merged into it.
@pytest.mark.parametrize("name", marked(("llama", "phi3", "gpt2")))
def test_an_adapter_made_by_peft_gives_its_logits_when_it_is_merged(name, tmp_path):
    made = load_made(name)
    tiny = bare_model(made.case)
    adapter = read_adapter(made.write(tmp_path), tiny.architecture.naming, shapes_of(tiny))
    logits = logits_of(tiny.abstract.graphdef)(merged(tiny, adapter), made.tokens)
    np.testing.assert_allclose(logits, made.logits, atol=1e-4)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", BESIDE)
def test_an_adapter_made_by_peft_gives_its_logits_beside_the_model(name, tmp_path):
    made = load_made(name)
    tiny = bare_model(made.case)
    adapter = read_adapter(made.write(tmp_path), tiny.architecture.naming, shapes_of(tiny))
    abstract, params = adapted(tiny, adapter)
    logits = logits_of(abstract.graphdef)(params, made.tokens)
    np.testing.assert_allclose(logits, made.logits, atol=1e-4)
