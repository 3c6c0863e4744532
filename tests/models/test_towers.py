"""Text towers of multimodal folders: their names, fields, maths, and what lies beside them."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

import jaxft
from jaxft.errors import ModelError
from jaxft.hf.rules import expand
from jaxft.models.config import make_numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.towers import ABSENT, TOWERS
from jaxft.programs.conversion import check
from tests.oracle.cases import published_wholes
from tests.oracle.published import WHOLES
from tests.oracle.towers import (
    CONFIGS,
    counted_tensors,
    load_logits,
    load_wholes,
    tokens,
    write_tower,
)

SLOW = pytest.mark.slow(seconds=4)
CASES = [pytest.param(n, marks=() if n in ("gemma3", "qwen3_vl") else SLOW) for n in CONFIGS]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_text_equal_those_of_the_whole(tmp_path, case):
    model = jaxft.load(write_tower(case, tmp_path))
    np.testing.assert_allclose(model(tokens()), load_logits(case), atol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_of_a_folder_is_the_text_or_known(tmp_path, case):
    found = check(write_tower(case, tmp_path))
    assert found.fits
    names = [line.theirs for line in found.lines if not line.ours]
    assert names and not any("language_model" in name for name in names)


def test_a_tensor_of_an_unknown_part_is_refused(tmp_path):
    folder = write_tower("llava", tmp_path)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"audio_tower.w": np.ones(3, np.float32)}, file)
    with pytest.raises(ModelError, match=r"Unexpected: audio_tower\.w"):
        jaxft.load(folder)


def test_experts_that_files_hold_in_one_tensor_go_in_and_out(tmp_path):
    """As those of published Qwen3.5-MoE do; transformers writes one for each expert."""
    folder = write_tower("qwen3_5_moe", tmp_path)
    file = folder / "model.safetensors"
    tensors, expected = load_file(file), load_logits("qwen3_5_moe")
    for layer in range(2):
        start = f"model.language_model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([tensors.pop(f"{start}{e}.{part}_proj.weight") for e in range(4)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{start}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{start}down_proj"] = down
    save_file(tensors, file, metadata={"format": "pt"})
    np.testing.assert_allclose(jaxft.load(folder)(tokens()), expected, atol=1e-4)
    assert check(folder).fits
    target = jaxft.export(folder, tmp_path / "out", on_log=lambda text: None)
    written = load_file(target / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)


GEMMA_12B = WHOLES["google--gemma-3-12b-it"]
GEMMA4_12B = WHOLES["google--gemma-4-12B-it"]


def test_fields_that_files_of_multimodal_models_leave_out_have_their_classes_values():
    for kind, fields in ABSENT.items():
        theirs = AutoConfig.for_model(kind).to_dict()
        assert fields == {name: theirs[name] for name in fields}
    abstract = architecture_from_hf(GEMMA_12B).abstract(make_numerics("mixed"))
    # As https://arxiv.org/abs/2503.19786 has it, table 1: 1,012M of the embedding, 10,759M beside.
    assert sum(spec.size for spec in abstract.params.values()) == 11_766_034_176


def test_the_published_model_without_towers_is_read_with_all_its_fields():
    abstract = architecture_from_hf(GEMMA4_12B).abstract(make_numerics("mixed"))
    # As transformers counts; https://ai.google.dev/gemma/docs/core says 12B with what is beside.
    assert sum(spec.size for spec in abstract.params.values()) == 11_907_350_320
    experts = GEMMA4_12B["text_config"] | {"enable_moe_block": True}
    with pytest.raises(ModelError, match="enable_moe_block is True; only False"):
        architecture_from_hf(GEMMA4_12B | {"text_config": experts})


def test_the_published_model_whose_fields_are_nested_is_that_of_its_text(shared):
    file = shared / "configs" / "Qwen--Qwen3.5-27B" / "config.json"
    config = json.loads(file.read_text())
    whole = architecture_from_hf(config)
    assert whole.config == architecture_from_hf(config["text_config"]).config
    names = {rule.theirs for rule in whole.naming.rules}
    assert "lm_head.weight" in names
    assert all(name.startswith("model.language_model.") for name in names - {"lm_head.weight"})


# Of text, and with the towers: as the hub counts where no layers guess further tokens.
SIZES = {
    "Qwen--Qwen3-VL-4B-Instruct": (4_022_468_096, 4_437_815_808),
    "Qwen--Qwen3.5-27B": (26_895_998_464, 27_356_728_560),
    "Qwen--Qwen3.5-35B-A3B": (34_660_610_688, 35_107_181_936),
    "google--gemma-3-12b-it": (11_766_034_176, 12_187_325_040),
    "google--gemma-4-12B-it": (11_907_350_320, 11_959_730_224),
    "google--gemma-4-26B-A4B-it": (25_233_141_790, 25_805_936_206),
    "google--gemma-4-31B-it": (30_697_345_340, 31_273_088_876),
    # The hub counts what these two hold of keys and values that no layer reads as well.
    "google--gemma-4-E2B-it": (4_628_569_379, 5_104_298_467),
    "google--gemma-4-E4B-it": (7_463_013_418, 7_941_101_802),
    "llava-hf--llava-1.5-7b-hf": (6_738_939_904, 7_063_427_072),
    "llava-hf--llava-v1.6-mistral-7b-hf": (7_242_256_384, 7_566_747_648),
    "mistralai--Mistral-Small-3.1-24B-Instruct-2503": (23_572_403_200, 24_011_361_280),
}


def test_all_tensors_of_published_wholes_are_of_the_text_or_passed_through(shared):
    """By the names and shapes of transformers, which leaves layers out that guess tokens."""
    configs, sizes, counted = published_wholes(shared / "configs"), {}, set()
    assert configs.keys() == load_wholes().keys()
    for name, theirs in load_wholes().items():
        architecture = architecture_from_hf(configs[name])
        params = architecture.abstract(make_numerics("mixed")).params
        shapes = {path: spec.shape for path, spec in params.items()}
        naming, layers = architecture.naming, range(architecture.config.layers)
        names = {t[0].replace("layers.0.", f"layers.{n}.") for t in theirs for n in layers}
        ours = [(t.name, t.shape) for t in expand(naming.rules_for(names), shapes)]
        assert counted_tensors(ours) == [one for one in theirs if not naming.is_other(one[0])]
        whole = sum(math.prod(shape) * count for _, shape, count in theirs)
        sizes[name] = sum(spec.size for spec in params.values()), whole
        counted.add(configs[name]["model_type"])
    assert counted == TOWERS.keys()
    assert sizes == SIZES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_scale": 3.0}, "'query_scale' .* not understood for model_type 'gemma3'"),
        ({"text_config": None}, "'text_config' describes; there is none"),
        ({"text_config": {"model_type": "gemma2"}}, "'gemma2' is not supported inside .*'gemma3'"),
        ({"tie_word_embeddings": False}, "is False, and True in text_config"),
        ({"text_config": {"model_type": "gemma3_text", "top_gain": 2}}, "'top_gain' .* not under"),
        (
            {"text_config": {"final_logit_softcapping": 30.0}},
            r"final_logit_softcapping is 30\.0 in text_config, which models of type 'gemma3' in",
        ),
    ],
)
def test_what_might_change_the_maths_is_refused(changes, message):
    inner = {"tie_word_embeddings": True} if "tie_word_embeddings" in changes else {}
    config = {**GEMMA_12B, "text_config": GEMMA_12B["text_config"] | inner} | changes
    with pytest.raises(ModelError, match=message):
        architecture_from_hf(config)
