"""What jaxft exports, read by transformers and PyTorch."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import jaxft
from jaxft.generate import generate_tokens
from tests.tiny_run import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def oracle() -> str:
    """A Python with torch and transformers; .ci/run makes one."""
    python = os.environ.get("JAXFT_ORACLE_PYTHON", "")
    if not Path(python).is_file():
        pytest.skip("JAXFT_ORACLE_PYTHON names no Python with torch and transformers")
    return python


def check(oracle: str, model: jaxft.Model, folder: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(5, model.architecture.config.vocab, (2, 24))
    np.save(tmp_path / "tokens.npy", tokens)
    script = Path(__file__).parent / "oracle/read_export.py"
    arguments = [oracle, script, folder, tmp_path / "tokens.npy", tmp_path / "out.npz"]
    subprocess.run(arguments, check=True)
    theirs = np.load(tmp_path / "out.npz")
    assert np.max(np.abs(theirs["logits"] - np.asarray(model(tokens)))) < 1e-4
    ours = generate_tokens(
        model.abstract.graphdef,
        model.params,
        tokens[:1].tolist(),
        max_new_tokens=32,
        stop_ids=model.stop_ids,
    )[0]
    continuation = theirs["continuation"].tolist()
    stop = next((i for i, token in enumerate(continuation) if token in model.stop_ids), None)
    assert ours == continuation[:stop]


def test_a_fine_tuned_model_gives_the_same_logits_and_text_in_transformers(oracle, tmp_path):
    result = jaxft.train(tiny_config(tmp_path, train__steps=10, optim__learning_rate=1e-2))
    folder = jaxft.export(result.checkpoint, tmp_path / "out")
    check(oracle, jaxft.load(result.checkpoint), folder, tmp_path)


def test_a_model_with_added_tokens_gives_the_same_logits_and_text_in_transformers(oracle, tmp_path):
    tokens = ",".join(f"<new{i}>" for i in range(30))
    config = tiny_config(tmp_path, train__steps=4, model__add_tokens=tokens)
    result = jaxft.train(config)
    model = jaxft.load(result.checkpoint)
    assert model.architecture.config.vocab == 128
    folder = jaxft.export(result.checkpoint, tmp_path / "out")
    check(oracle, model, folder, tmp_path)


def test_a_real_model_gives_the_same_logits_and_text_in_transformers(oracle, shared, tmp_path):
    source = shared / "models/stories260K"
    folder = jaxft.export(source, tmp_path / "out")
    check(oracle, jaxft.load(source), folder, tmp_path)
