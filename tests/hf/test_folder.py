"""The small files of a folder: what they say, what is wrong with them; each is read once."""

import json

import pytest

from jaxft.errors import ModelError
from jaxft.hf.folder import ModelFolder, read_config
from tests.oracle.cases import CASES


def test_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["gqa"]))
    assert read_config(tmp_path) == CASES["gqa"]


def test_weights_that_are_decoded_are_not_refused(tmp_path):
    for method in (
        {"quant_method": "mxfp4", "modules_to_not_convert": []},
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ):
        config = {"quantization_config": method}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is empty"),
        ("{", "cannot be read"),
        ("[]", "holds a JSON list"),
        ('{"quantization_config": {"quant_method": "fp8"}}', "by 'fp8' .* only MXFP4 and FP8 in b"),
        (
            '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}',
            "quantised by 'fp8'",
        ),
        ('{"quantization_config": {"quant_method": "awq"}}', "quantised by 'awq'"),
        ('{"quantization_config": {"bits": 4}}', "quantised by 'unknown'"),
        ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_config_that_cannot_be_used_is_explained(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=complaint):
        read_config(tmp_path)


def test_each_file_is_read_when_asked_for_and_once(tmp_path):
    folder = ModelFolder(tmp_path)  # nothing is there yet, and nothing is read
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert folder.config == {"eos_token_id": 7} and folder.generation == {}
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert folder.stop_ids(None) == (7,)
    assert ModelFolder(tmp_path).stop_ids(None) == (5, 6, 8)
    assert not folder.has_tokenizer and folder.load_tokenizer() is None


def test_a_generation_config_that_is_broken_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        _ = ModelFolder(tmp_path).generation
