"""PEFT's format both ways: what other readers rely on, what comes back, and what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.errors import ModelError
from jaxft.hf.peft.adapter import Adapter
from jaxft.hf.peft.fields import understand
from jaxft.hf.peft.read import read_adapter
from jaxft.hf.peft.write import taken_for_experts, write_adapter
from tests.adapters import add_rest, bare_model, linear_sites, merged, random_adapter, shapes_of
from tests.oracle.adapter_cases import load_made
from tests.oracle.cases import FAMILY_CASES
from tests.tiny import Tiny

CASE = {family: names[0] for family, names in FAMILY_CASES.items()}
PREFIX = "base_model.model."


def written(tiny: Tiny, adapter: Adapter, folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Writes an adapter; returns the content of both files."""
    write_adapter(folder, adapter, tiny.architecture.naming, shapes_of(tiny))
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def read(tiny: Tiny, folder: Path) -> Adapter:
    return read_adapter(folder, tiny.architecture.naming, shapes_of(tiny))


def refusal(tiny: Tiny, adapter: Adapter, folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        write_adapter(folder, adapter, tiny.architecture.naming, shapes_of(tiny))
    assert not list(folder.iterdir())
    return str(error.value)


def assert_equal(found: Adapter, expected: Adapter) -> None:
    assert found.arrays.keys() == expected.arrays.keys()
    for path, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[path], array, err_msg=path)
    assert {s: found.scale(s) for s in found.alphas} == {
        s: pytest.approx(expected.scale(s), rel=1e-15) for s in expected.alphas
    }
    for name in ("tokens", "dropout", "base", "revision"):
        assert getattr(found, name) == getattr(expected, name)


def different_ranks(tiny: Tiny) -> dict[str, int]:
    return {site: 1 + number % 3 for number, site in enumerate(linear_sites(tiny))}


# Adapters of their experts have the names of parameters that hold all experts.
IN_ONE_TENSOR = ("gpt_oss", "qwen3_5_moe_text")


@pytest.mark.parametrize("family", CASE)
def test_what_is_written_is_read_again_as_it_was(family, tmp_path):
    tiny = bare_model(CASE[family])
    adapter = random_adapter(
        tiny,
        different_ranks(tiny),
        dora=family not in IN_ONE_TENSOR,
        dropout=0.1,
        base="someone/model",
        revision="main",
    )
    config, _ = written(tiny, adapter, tmp_path)
    found = read(tiny, tmp_path)
    if tiny.architecture.config.experts:  # PEFT refuses to load experts with dropout
        assert config["lora_dropout"] == 0
        adapter = dataclasses.replace(adapter, dropout=0.0)
    assert_equal(found, adapter)
    assert found.alphas == adapter.alphas


def test_what_peft_takes_for_experts_is_known():
    def taken(family: str) -> set[str]:
        tiny = bare_model(CASE[family])
        return set(taken_for_experts(linear_sites(tiny), tiny.architecture.naming))

    assert taken("llama") == taken("qwen3_moe") == taken("qwen3_5_moe_text") == set()
    assert {site.rpartition(".mlp.")[2] for site in taken("qwen3_next")} == {
        "shared.gate",
        "shared.up",
        "shared.down",
    }


@pytest.mark.parametrize("family", CASE)
def test_readers_that_know_no_patterns_see_one_rank_and_one_scale(family, tmp_path):
    """As vLLM (alpha / r of the config) and llama.cpp (alpha over the tensor's rank) read them."""
    tiny = bare_model(CASE[family])
    adapter = random_adapter(tiny, different_ranks(tiny), pissa=True, rslora=True)
    config, tensors = written(tiny, adapter, tmp_path)
    assert not config.keys() & {"rank_pattern", "alpha_pattern"}
    assert (config["use_rslora"], config["bias"], config["modules_to_save"]) == (
        False,
        "none",
        None,
    )
    assert config["r"] > 0 and config["lora_alpha"] > 0
    before = tiny.to_theirs(tiny.params)
    after = tiny.to_theirs(merged(tiny, adapter))
    modules = set()
    for name, b in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert found and b.dtype == np.float32
        modules.add(found[1])
        weight = f"{found[1]}.weight"
        if found[2] == "A" or (".experts" in name and weight not in before):
            continue
        a = tensors[name.replace("lora_B", "lora_A")]
        assert a.shape[0] == b.shape[1] == config["r"]
        change = config["lora_alpha"] / config["r"] * b @ a
        if config["fan_in_fan_out"]:
            change = change.T
        np.testing.assert_allclose(before[weight] + change, after[weight], atol=1e-5)
    changed = {name for name in before if np.any(before[name] != after[name])}
    in_one = {m for m in modules if family in IN_ONE_TENSOR and ".experts" in m}
    of_experts = {name for name in changed if in_one and ".experts." in name}
    assert {f"{module}.weight" for module in modules - in_one} == changed - of_experts
    if family in IN_ONE_TENSOR:
        owners = {re.sub(r"(\.experts)\..*", r"\1", name) for name in of_experts}
        assert {module.removesuffix(".base_layer") for module in in_one} == owners
        assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    "name", ["llama_dora", "qwen2", "phi3", "gpt2", "gpt_oss", "qwen3_moe_by_expert"]
)
def test_names_are_those_that_peft_writes(name, tmp_path):
    made = load_made(name)
    tiny = bare_model(made.case)
    ranks = dict.fromkeys(linear_sites(tiny), 3)
    adapter = random_adapter(tiny, ranks, dora="dora" in name)
    config, tensors = written(tiny, adapter, tmp_path)
    assert tensors.keys() == made.shapes.keys()
    if name in ("llama_dora", "qwen2", "qwen3_moe_by_expert"):  # of those no module is fused
        assert {key: value.shape for key, value in tensors.items()} == made.shapes
        assert config["r"] == made.config["r"]
    targets = made.config["target_modules"]
    assert set(config["target_modules"]) == set(targets)


def test_a_target_that_ends_like_another_module_is_named_with_its_owner(tmp_path):
    tiny = bare_model(CASE["gpt2"])
    config, _ = written(tiny, random_adapter(tiny, {"layers.attn.o": 2}), tmp_path)
    assert config["target_modules"] == ["attn.c_proj"]


def test_a_fused_module_of_which_a_part_is_adapted_changes_that_part_alone(tmp_path):
    tiny = bare_model(CASE["phi3"])
    adapter = random_adapter(tiny, {"layers.attn.k": 2, "layers.mlp.up": 1})
    config, tensors = written(tiny, adapter, tmp_path)
    assert config["target_modules"] == ["gate_up_proj", "qkv_proj"]
    b = tensors[f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    keys = np.any(b != 0, axis=1)
    assert keys.sum() == 32 and not keys[:32].any() and not keys[64:].any()
    assert_equal(read(tiny, tmp_path), adapter)


def test_experts_are_adapted_all_or_none_as_peft_needs_it_for_fused_ones(tmp_path):
    tiny = bare_model(CASE["mixtral"])
    adapter = random_adapter(tiny, {"layers.mlp.up": 2})
    config, tensors = written(tiny, adapter, tmp_path)
    assert config["target_modules"] == ["w1", "w2", "w3"]
    start = f"{PREFIX}model.layers.1.block_sparse_moe.experts.3."
    for name in ("w1", "w2"):
        assert not tensors[f"{start}{name}.lora_A.weight"].any()
        assert not tensors[f"{start}{name}.lora_B.weight"].any()
    assert_equal(read(tiny, tmp_path), adapter)


def test_scales_that_differ_are_multiplied_into_b(tmp_path):
    tiny = bare_model(CASE["llama"])
    ranks = {"layers.attn.k": 2, "layers.attn.q": 2, "layers.attn.v": 2}
    adapter = random_adapter(tiny, ranks)
    adapter = dataclasses.replace(adapter, alphas=adapter.alphas | {"layers.attn.q": 12.0})
    config, _ = written(tiny, adapter, tmp_path)
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    found = read(tiny, tmp_path)
    for path, array in adapter.arrays.items():
        factor = 3 if path == "layers.attn.q.lora_b" else 1
        np.testing.assert_allclose(found.arrays[path], factor * array, rtol=1e-6)


def test_pissa_is_written_as_one_pair_of_twice_the_rank(tmp_path):
    tiny = bare_model(CASE["qwen3"])
    adapter = random_adapter(tiny, {"layers.attn.o": 2}, pissa=True)
    config, _ = written(tiny, adapter, tmp_path)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    found, arrays = read(tiny, tmp_path), adapter.arrays
    for leaf, axis, sign in (("a", 1, 1), ("b", -1, -1)):
        pair = arrays[f"layers.attn.o.lora_{leaf}"], sign * arrays[f"layers.attn.o.start_{leaf}"]
        joined = np.concatenate(pair, axis)
        np.testing.assert_array_equal(found.arrays[f"layers.attn.o.lora_{leaf}"], joined)


def test_whole_modules_and_rows_of_tokens_have_the_names_of_peft(tmp_path):
    tiny = bare_model(CASE["llama"])
    made = load_made("llama_rows")
    adapter = add_rest(tiny, ["embed", "head"], ["norm.scale"], tokens=(9, 3, 5))
    config, tensors = written(tiny, adapter, tmp_path)
    assert config["modules_to_save"] == ["model.norm"]
    assert config["trainable_token_indices"] == {
        "lm_head": [9, 3, 5],
        "model.embed_tokens": [9, 3, 5],
    }
    assert tensors.keys() == made.shapes.keys() | {f"{PREFIX}model.norm.weight"}
    assert_equal(read(tiny, tmp_path), adapter)


def test_a_tied_table_is_written_twice_and_says_so(tmp_path):
    tiny = bare_model(CASE["gemma2"])
    adapter = add_rest(tiny, [], ["embed.w", "layers.attn_norm.scale"])
    config, tensors = written(tiny, adapter, tmp_path)
    assert config["ensure_weight_tying"]
    assert config["modules_to_save"][-1] == "model.layers.2.input_layernorm"
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}lm_head.weight"], tensors[f"{PREFIX}model.embed_tokens.weight"]
    )
    assert_equal(read(tiny, tmp_path), adapter)
    alter(tmp_path, ensure_weight_tying=False)
    assert "ensure_weight_tying is not true" in problem(tiny, tmp_path)


def test_values_are_saved_as_a_whole_where_some_layers_have_none(tmp_path):
    tiny = bare_model("gemma4_text_gqa")
    values = [path for path in tiny.params if path.endswith("attn.v.w")]
    config, tensors = written(tiny, add_rest(tiny, [], values), tmp_path)
    saved = {name for name in tensors if "v_proj" in name}
    assert len(saved) == sum(len(tiny.params[path]) for path in values) == 4
    assert config["modules_to_save"]
    assert_equal(read(tiny, tmp_path), add_rest(tiny, [], values))


def test_an_adapted_head_that_is_there_as_a_whole_is_its_base(tmp_path):
    tiny = bare_model(CASE["llama"])
    pair = random_adapter(tiny, {"head": 2})
    arrays = {**pair.arrays, "head.w": np.ones((64, 32), np.float32)}
    adapter = dataclasses.replace(pair, arrays=arrays)
    config, tensors = written(tiny, adapter, tmp_path)
    assert tensors.keys() == load_made("llama_head").shapes.keys() - {
        name for name in load_made("llama_head").shapes if "v_proj" in name
    }
    assert config["modules_to_save"] is None
    assert_equal(read(tiny, tmp_path), adapter)


@pytest.mark.parametrize(
    "family, ranks, dora, whole, text",
    [
        ("llama", {}, False, [], "There is no adapter to write"),
        ("llama", {"embed": 1}, False, [], "no place for the adapter of embed"),
        ("qwen2", {}, False, ["layers.attn.q.b"], "not layers.attn.q.w"),
        ("gpt2", {}, False, ["norm.scale"], "not norm.b"),
        ("gpt_oss", {}, False, ["layers.attn.sinks"], "self_attn only layers.attn.sinks"),
        (
            "gpt_oss",
            {"layers.mlp.down": 1},
            True,
            [],
            "no DoRA of parameters that hold all experts",
        ),
        ("phi3", {"layers.attn.q": 1}, True, [], "layers.attn.k, layers.attn.v have no magnitude"),
    ],
)
def test_what_has_no_place_in_the_format_is_refused(family, ranks, dora, whole, text, tmp_path):
    tiny = bare_model(CASE[family])
    adapter = random_adapter(tiny, ranks, dora=dora)
    rest = {path: np.zeros(tiny.abstract.params[path].shape, np.float32) for path in whole}
    adapter = dataclasses.replace(adapter, arrays={**adapter.arrays, **rest})
    message = refusal(tiny, adapter, tmp_path)
    assert text in message and "--merge" in message


def alter(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def problem(tiny: Tiny, folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        read(tiny, folder)
    return str(error.value)


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("bias", "all", "biases that are trained"),
        ("lora_bias", True, "a bias of its own"),
        ("layer_replication", [[0, 2], [1, 2]], "several times"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("use_qalora", True, "QA-LoRA"),
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("kasa_config", {"a": 1}, "KaSA"),
        ("monteclora_config", {"a": 1}, "MonteCLoRA"),
        ("velora_config", {"a": 1}, "VeLoRA"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "a base that was changed"),
        ("something_new", 1, "a field of PEFT 9.9 that jaxft does not know"),
        ("r", 0, "expected a whole number above 0"),
        ("lora_alpha", "8", "expected a number"),
        ("rank_pattern", {"(": 1}, "expected ranks by pattern"),
        ("modules_to_save", "norm", "expected a list of names"),
        ("trainable_token_indices", [-1], "expected ids of tokens"),
    ],
)
def test_fields_that_are_not_understood_are_refused_by_name(field, value, text):
    config = load_made("llama").config | {"peft_version": "9.9"}
    assert understand(config).rank == 3
    with pytest.raises(ModelError) as error:
        understand(config | {field: value})
    [found] = error.value.problems
    assert f"adapter_config.json: {field}" in found and text in found


def test_a_config_of_an_early_version_has_the_defaults_of_then():
    early = understand({"peft_type": "LORA", "lora_alpha": 16, "target_modules": ["q_proj"]})
    assert (early.rank_of("a.q_proj"), early.alpha_of("a.q_proj")) == (8, 16)
    assert not any((early.rslora, early.dora, early.dropout, early.base, early.saved))


def test_a_pattern_matches_whole_components_at_the_end_of_a_name():
    config = understand({"peft_type": "LORA", "rank_pattern": {"q": 2, r".*\.1\.mlp\.up": 3}})
    names = ["layers.0.q", "q", "layers.0.aq", "layers.1.mlp.up", "layers.1.mlp.up.x"]
    assert [config.rank_of(name) for name in names] == [2, 2, 8, 3, 8]


def test_numbers_that_are_not_finite_are_named(tmp_path):
    tiny = bare_model(CASE["llama"])
    adapter = random_adapter(tiny, {"layers.attn.q": 2, "layers.attn.v": 2})
    adapter.arrays["layers.attn.v.lora_b"][1, 0, 0] = np.nan
    written(tiny, adapter, tmp_path)
    found = problem(tiny, tmp_path)
    assert "adapter_model.safetensors holds numbers that are not finite" in found
    assert "layers.attn.v.lora_b. " in found and "layers.attn.q" not in found


def test_modules_that_the_config_names_and_the_file_lacks_are_named(tmp_path):
    tiny = bare_model(CASE["llama"])
    load_made("llama").write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    kept = {
        name: x for name, x in whole.items() if "v_proj" not in name and "layers.1." not in name
    }
    save_file(kept, file)
    found = problem(tiny, tmp_path)
    assert "v_proj.lora_A.weight is missing, though adapter_config.json names its module" in found
    assert "layers.1.mlp.up_proj.lora_A.weight" in found
    alter(tmp_path, layers_to_transform=0, exclude_modules=r".*\.v_proj")
    assert read(tiny, tmp_path).arrays["layers.mlp.up.lora_b"][0].any()
    alter(tmp_path, modules_to_save=["norm"], trainable_token_indices=[3])
    found = problem(tiny, tmp_path)
    assert "model.norm.weight is missing" in found and "has no rows of the tokens" in found


def test_targets_are_those_of_peft():
    """Its rules: `check_target_module_exists` in peft/tuners/tuners_utils.py."""
    layers = "model.layers.{}.self_attn.q_proj"
    fields = {"target_modules": ["q_proj", layers.format(2)], "layers_to_transform": [0]}
    found = understand({"peft_type": "LORA", **fields}).targets
    assert [number for number in range(3) if layers.format(number) in found] == [0, 2]
    assert "model.layers.0.self_attn.aq_proj" not in found
    blocks = understand({"peft_type": "LORA", **fields, "layers_pattern": "blocks"}).targets
    assert layers.format(0) not in blocks and layers.format(2) in blocks
    regex = understand({"peft_type": "LORA", "target_modules": r".*\.(q|v)_proj"}).targets
    assert layers.format(1) in regex and "model.q_proj.x" not in regex
    with pytest.raises(ModelError, match="target_modules is '\\('; expected a regular"):
        understand({"peft_type": "LORA", "target_modules": "("})


def test_what_does_not_fit_the_model_is_named_before_anything_is_read(tmp_path):
    tiny = bare_model(CASE["llama"])
    load_made("llama").write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    layer = f"{PREFIX}model.layers.0."
    del tensors[f"{layer}self_attn.q_proj.lora_A.weight"]
    tensors[f"{layer}self_attn.k_proj.lora_A.weight"] = np.zeros((3, 31), np.float32)
    tensors[f"{layer}self_attn.v_proj.lora_B.weight"] = np.zeros((16, 3), np.int32)
    tensors[f"{layer}self_attn.x_proj.lora_B.weight"] = np.zeros((16, 3), np.float32)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = np.zeros((3, 64), np.float32)
    tensors[f"{layer}input_layernorm.weight"] = np.zeros(32, np.float32)
    save_file(tensors, file)
    found = problem(tiny, tmp_path).splitlines()
    assert len(found) == 6 and all(line.startswith(f"{tmp_path}: adapter_mod") for line in found)
    for text in (
        "layers.0.self_attn.q_proj.lora_A.weight is missing",
        "k_proj.lora_A.weight has shape [3, 31]; the model and rank 3 of adapter_config.json ask "
        "for [3, 32]",
        "v_proj.lora_B.weight is stored as I32",
        "x_proj.lora_B.weight is nothing that an adapter of this model has",
        "embed_tokens.lora_embedding_A adapts a table that is looked up",
        "layers.1.input_layernorm.weight is missing",
    ):
        assert sum(text in line for line in found) == 1, text


def test_a_dora_adapter_needs_magnitudes_in_every_layer(tmp_path):
    tiny = bare_model(CASE["llama"])
    load_made("llama_dora").write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: x for n, x in tensors.items() if "layers.1.mlp.up_proj" not in n}, file)
    assert "has no magnitudes of layers.mlp.up in some layers" in problem(tiny, tmp_path)
    alter(tmp_path, use_dora=False)
    assert "lora_magnitude_vector is nothing" in problem(tiny, tmp_path)


def test_rows_need_different_ids_of_the_vocabulary(tmp_path):
    tiny = bare_model(CASE["llama"])
    load_made("llama_rows").write(tmp_path)
    for ids in ([3, 3], [3, 64]):
        alter(tmp_path, trainable_token_indices=ids)
        assert "expected different ids below 64" in problem(tiny, tmp_path)
    alter(tmp_path, trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [2, 1]})
    assert "names 2 lists of tokens" in problem(tiny, tmp_path)


def test_names_of_two_versions_of_transformers_do_not_mix(tmp_path):
    fused, apart = load_made("mixtral"), load_made("mixtral_by_expert")
    tiny = bare_model(fused.case)
    apart.write(tmp_path)
    config = {name: fused.config[name] for name in ("target_parameters", "rank_pattern")}
    alter(tmp_path, **config)
    tensors = {name: x for name, x in fused.tensors.items() if "experts" in name}
    save_file(tensors | apart.tensors, tmp_path / "adapter_model.safetensors")
    assert "layers.mlp.gate under the names of two versions" in problem(tiny, tmp_path)


def test_a_pickled_adapter_is_refused_with_the_way_out(tmp_path):
    tiny = bare_model(CASE["llama"])
    load_made("llama").write(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.rename(tmp_path / "adapter_model.bin")
    assert "Load the adapter with PEFT and save it again" in problem(tiny, tmp_path)
