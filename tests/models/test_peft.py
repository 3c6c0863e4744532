"""Adapters that PEFT made, read into our layout, against the logits that PEFT computes."""

import numpy as np
import pytest

from jaxft.hf.peft.read import read_adapter
from jaxft.models.families import FAMILIES
from tests.adapters import bare_model, logits_of, merged, shapes_of
from tests.oracle.adapter_cases import MAKINGS, load_made
from tests.oracle.cases import CASES

# A model is compiled once for all of its adapters.
IN_SHORT = ("llama", "phi3", "gpt2")
BY_PEFT = [
    pytest.param(name, marks=[pytest.mark.slow(seconds=3)] * (not name.startswith(IN_SHORT)))
    for name in MAKINGS
]


def test_peft_made_an_adapter_of_every_family():
    assert {CASES[making.case]["model_type"] for making in MAKINGS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", BY_PEFT)
def test_an_adapter_made_by_peft_gives_its_logits(name, tmp_path):
    made = load_made(name)
    tiny = bare_model(made.case)
    adapter = read_adapter(made.write(tmp_path), tiny.architecture.naming, shapes_of(tiny))
    logits = logits_of(made.case)(merged(tiny, adapter), made.tokens)
    np.testing.assert_allclose(logits, made.logits, atol=1e-4)
