"""Every family against transformers, through the files that a user would bring and take away."""

import gc
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.config import OptimConfig, RunConfig
from jaxft.data.batch import STANDARD, Batch
from jaxft.errors import ConfigError, ModelError
from jaxft.hf.load import load_params
from jaxft.hf.save import save_params
from jaxft.hf.stored import tensor_dtypes
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.experts import balance_loss
from jaxft.models.families import FAMILIES, Architecture, architecture_from_hf
from jaxft.models.module import AbstractModel, Params, merge
from jaxft.models.refused import REFUSED
from jaxft.models.towers import TOWERS
from jaxft.programs.engine import Engine
from jaxft.programs.generate import generate_tokens
from jaxft.programs.texts import Request
from jaxft.training.objectives.token_scores import cross_entropy
from jaxft.training.optim import make_optimizer
from jaxft.training.program import make_placement
from jaxft.training.state import abstract_state
from tests.oracle.cases import (
    CASES,
    FAMILY_CASES,
    load_case,
    load_published_sizes,
    published_configs,
    write_folder,
)
from tests.oracle.shared import YARN
from tests.strategies import COMPOSED

# Those that compile longest and differ least from others.
IN_LONG = set(
    "gpt_oss_default_rope gpt_oss_truncate_mha qwen3_moe_unnormalised_mha mistral_mha_tied "
    "qwen2_mha_tied qwen3_mha olmo2_tied gemma2_mha_uncapped gemma3_text_linear_published".split()
)
ONE_STEP = [
    pytest.param(name, marks=[pytest.mark.slow(seconds=5)] * (name in IN_LONG))
    for names in FAMILY_CASES.values()
    for name in names
]


def load_folder(folder: Path) -> tuple[Architecture, AbstractModel, Params]:
    """Returns a model as a user's run reads it, in float32."""
    architecture = architecture_from_hf(json.loads((folder / "config.json").read_text()))
    abstract = architecture.abstract(Numerics())
    params = load_params(
        folder,
        architecture.naming,
        abstract.params,
    )
    return architecture, abstract, params


def in_their_names(folder: Path, architecture: Architecture, params: Params) -> dict:
    """Returns `{Hugging Face name: array}` of parameters or gradients, by way of a file."""
    target = folder / "in_their_names"
    target.mkdir()
    save_params(target, architecture.naming, params, dtypes="float32")
    return load_file(target / "model.safetensors")


def test_a_family_of_parts_that_others_have_is_a_short_file():
    """Apertus has one of its own, which is a function."""
    for family in {*COMPOSED, "apertus"}:
        file = importlib.import_module(FAMILIES[family]).__file__
        assert len(Path(file or "").read_text().splitlines()) < 60, family


def test_every_family_has_cases():
    assert FAMILY_CASES.keys() == FAMILIES.keys()
    assert all(len(names) > 2 for names in FAMILY_CASES.values())


@pytest.mark.slow(
    seconds=3,
    but=r"^(mqa_tied|qwen2_packed|qwen3_packed|mixtral_packed|gemma2_packed|olmo2_packed|gpt2_packed|gpt_oss_gqa|qwen3_5_packed)$",
)
@pytest.mark.parametrize("name", ONE_STEP)
def test_logits_loss_and_gradients_equal_the_reference_implementation(tmp_path, name):
    case = load_case(name)
    architecture, abstract, params = load_folder(write_folder(name, tmp_path))
    batch = Batch(**{name: case.arrays[name] for name in STANDARD})

    def forward(params):
        model = merge(abstract.graphdef, params)
        hidden, routing = model.hidden(batch.tokens, batch.positions, batch.segments)
        terms = cross_entropy(model, hidden, batch.targets, batch.weights, chunk=0)
        balance = None if routing is None else balance_loss(routing)
        right, _ = terms.figures["token_accuracy"]
        return terms.total, (model.logits(hidden), right, balance)

    step = jax.jit(jax.value_and_grad(forward, has_aux=True))
    (total, (logits, right, balance)), gradients = step(params)
    real = (case.segments > 0)[..., None]
    np.testing.assert_allclose(np.where(real, logits, 0), case.logits, atol=1e-4)
    np.testing.assert_allclose(total, case.loss_sum, rtol=1e-4)
    guessed = case.logits.argmax(axis=-1) == case.targets
    assert right == np.sum(guessed * case.weights)
    weight = case.weights.sum()
    np.testing.assert_allclose(total / weight, case.loss_mean, rtol=1e-4)
    theirs = in_their_names(tmp_path, architecture, gradients)
    assert theirs.keys() == case.shapes.keys()
    norms = [np.linalg.norm(theirs[tensor]) / weight for tensor in case.tensors]
    np.testing.assert_allclose(norms, case.grad_norms, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(norms), case.grad_norm, rtol=1e-4)
    assert (balance is None) == ("aux_loss" not in case.arrays)
    if balance is not None:
        np.testing.assert_allclose(balance, case.aux_loss, rtol=1e-5)


def stored(folder: Path) -> dict[str, tuple]:
    tensors = load_file(folder / "model.safetensors")
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_CASES)
def test_import_then_export_gives_the_same_bytes(tmp_path, family, dtype):
    target = tmp_path / "target"
    target.mkdir()
    write_folder(FAMILY_CASES[family][0], tmp_path)
    file = tmp_path / "model.safetensors"
    # One tensor of another type, as files have for routers and norms.
    other = next(iter(load_file(file)))
    save_file(
        {
            name: value.astype("float32" if name == other else jnp.dtype(dtype))
            for name, value in load_file(file).items()
        },
        file,
        metadata={"format": "pt"},
    )
    architecture, _, params = load_folder(tmp_path)
    save_params(target, architecture.naming, params, dtypes=tensor_dtypes(tmp_path))
    assert stored(target) == stored(tmp_path)


@pytest.mark.slow(seconds=2)
def test_gpt2_files_without_the_name_of_the_body_go_in_and_out(shared, tmp_path):
    """As the published ones are, which hold the causal mask, too."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_folder("gpt2_tied", folder)
    bare = {
        name.removeprefix("transformer."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for layer in range(2)}
    save_file(bare | masks, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (shared / "models" / "stories260K").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = CASES["gpt2_tied"] | {"vocab_size": 512}
    random = np.random.RandomState(0)
    bare["wte.weight"] = random.randn(512, config["n_embd"]).astype(np.float32)
    save_file(bare | masks, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    model = jaxft.load(folder)
    logits = model(np.arange(12)[None])
    target = jaxft.export(folder, tmp_path / "target", on_log=lambda text: None)
    kept = load_file(target / "model.safetensors")
    assert kept.keys() == bare.keys()
    assert all(np.array_equal(kept[name], bare[name]) for name in bare)
    np.testing.assert_array_equal(jaxft.load(target)(np.arange(12)[None]), logits)
    with pytest.raises(ConfigError, match="a table of 48 positions and knows none beyond"):
        model(np.zeros((1, 129), int))


# Chosen so that windows are shorter than what is generated.
GENERATED = {name: names[0] for name, names in FAMILY_CASES.items()} | {
    "phi3": "phi3_window_mha",
    "mixtral": "mixtral_window_mha",
    "qwen2": "qwen2_window",
    "qwen3": "qwen3_window",
    "smollm3": "smollm3_packed",
}


# Of composed families those that have what no other has beside a cache: layers with and without
# positions, queries that grow, parts beside each other, norms of token vectors, heads of two sizes.
DECODED = {"smollm3", "ministral3", "cohere2", "nanochat", "gemma4_text"}


@pytest.mark.slow(seconds=3, but=r"^(llama|mixtral|qwen3_5_text)$")
@pytest.mark.parametrize("family", [f for f in FAMILY_CASES if f not in COMPOSED or f in DECODED])
def test_decoding_with_a_cache_equals_whole_forward_passes(tmp_path, family):
    name, new = GENERATED[family], 9
    architecture, abstract, params = load_folder(write_folder(name, tmp_path))
    config = architecture.config
    prompts = [[5, 9, 3, 7, 11, 2, 8, 40, 12], [21, 6]]
    tokens = np.zeros((2, len(prompts[0]) + new), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    forward = jax.jit(lambda params, tokens: merge(abstract.graphdef, params)(tokens))
    for step in range(new):
        logits = np.asarray(forward(params, tokens))  # what follows a token does not matter to it
        for row, prompt in enumerate(prompts):
            place = len(prompt) + step
            tokens[row, place] = logits[row, place - 1].argmax()
    expected = [tokens[row, len(p) : len(p) + new].tolist() for row, p in enumerate(prompts)]
    found = generate_tokens(
        config, abstract.graphdef, params, prompts, max_new_tokens=new, stop_ids=()
    )
    assert found == expected


def test_a_text_goes_on_in_a_row_whose_state_is_of_its_beginning_alone(tmp_path):
    """A state cannot be cut: rows are taken up whole, or read anew."""
    architecture, abstract, params = load_folder(write_folder("qwen3_5_gqa", tmp_path))

    def engine() -> Engine:
        return Engine(architecture.config, abstract.graphdef, params, rows=1)

    def write(engine: Engine, prompt: list[int]) -> list[int]:
        engine.submit(Request(prompt, 4, frozenset()))
        found = []
        while not engine.idle:
            found += [token for piece in engine.step() for token in piece.tokens]
        return found

    used, first = engine(), [5, 9, 3, 7, 11]
    begun = write(used, first)
    for prompt in (first + begun + [2, 8], [*first[:3], 40, 1]):
        assert write(used, prompt) == write(engine(), prompt)


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize("new", [6, 14])
def test_decoding_takes_long_or_short_divisors_by_the_length_a_text_may_reach(tmp_path, new):
    """As a forward pass over the finished text does, from the first token on."""
    folder = write_folder("phi3_longrope_long", tmp_path)
    architecture, abstract, params = load_folder(folder)
    rope: Any = architecture.config.kinds[0].rope
    scaling = rope.scaling
    prompt = list(range(3, 3 + scaling.original_length - 10))
    assert (len(prompt) + new > scaling.original_length) == (new == 14)
    (found,) = generate_tokens(
        architecture.config, abstract.graphdef, params, [prompt], max_new_tokens=new, stop_ids=()
    )
    tokens = np.asarray([prompt + found], np.int32)
    logits = merge(abstract.graphdef, params)(tokens)[0]
    assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == found


def test_published_settings_that_files_leave_out_mean_what_transformers_means():
    config = {k: v for k, v in CASES["gpt_oss_gqa"].items() if k != "rope_parameters"}
    rope: Any = architecture_from_hf(config | {"rope_scaling": None}).config.kinds[0].rope
    assert rope.theta == 150000.0
    np.testing.assert_allclose(rope.scaling.magnitude, 0.1 * np.log(32) + 1)
    moe = CASES["qwen3_moe_gqa_published"] | {"use_sliding_window": True, "sliding_window": 5}
    moe["max_window_layers"] = 1
    assert [kind.window for kind in architecture_from_hf(moe).config.kinds] == [5]
    with pytest.raises(ModelError, match=r"attn_logit_softcapping is 50\.0; only None"):
        architecture_from_hf(CASES["gemma3_text_gqa"] | {"attn_logit_softcapping": 50.0})


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral_tied", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_local_e"),
        ("phi3_partial_gqa", {"partial_rotary_factor": 0.2}, "expected an even number"),
        (
            "mistral_window",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layers without the sliding_window, which this family's model .* does not heed",
        ),
        (
            "gemma2_gqa",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "some of kind 'chunked_attention'; expected 3",
        ),
        (
            "gemma3_text_gqa",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            r"rope_parameters has \['factor', 'rope_type'\]; expected 'full_attention' and",
        ),
        ("gemma3_text_gqa", {"sliding_window": None}, "has no 'sliding_window'"),
        (
            "gemma4_text_e2b",
            {"vocab_size_per_layer_input": 60},
            "vocab_size_per_layer_input is 60 and vocab_size 64; expected the same",
        ),
        (
            "gemma4_text_gqa",
            {"num_kv_shared_layers": 4},
            "last 4 of 6 layers read keys and values .* before them is none of full_attention",
        ),
        (
            "gemma4_text_packed",
            {"num_kv_shared_layers": 3, "use_double_wide_mlp": True},
            "use_double_wide_mlp is True with num_kv_shared_layers and experts",
        ),
        (
            "gemma4_text_gqa",
            {"use_double_wide_mlp": "false"},
            "use_double_wide_mlp is 'false'; expected true or false",
        ),
        (
            "gemma4_text_gqa",
            {"per_layer_config": {"05": {"head_dim": 16}}},
            r"expected the layers without a window \(2, 5\), all with the same head_dim",
        ),
        (
            "gemma4_text_gqa",
            {"per_layer_config": [1]},
            r"per_layer_config is \[1\]; expected an obj",
        ),
        ("gemma4_text_gqa", {"layer_types": []}, "layer_types"),
        (
            "gemma4_text_gqa",
            {"num_global_key_value_heads": 3},
            "4 is not a multiple of the 3 heads of keys in layers without a window",
        ),
        ("gemma4_text_gqa", {"use_bidirectional_attention": "all"}, "is 'all'; only 'vision'"),
        (
            "gemma4_text_gqa",
            {"layer_types": ["sliding_attention"] * 6},
            "ends with 'sliding_attention', in the place of which transformers takes",
        ),
        ("qwen3_moe_tied", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; only \[\]"),
        ("qwen2_gqa", {"use_mrope": True}, "use_mrope is True; only False"),
        ("gpt2_tied", {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ("olmo3_gqa", {"rope_theta": 1e4}, r"rope_theta is 10000\.0; only 500000\.0"),
        (
            "olmo3_gqa",
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {}}},
            "'truncate' is false in rotary settings of kinds of layer",
        ),
        ("smollm3_gqa", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries; expected 2"),
        ("seed_oss_gqa", {"attention_out_bias": True}, "attention_out_bias is True; only False"),
        ("granite_gqa", {"logits_scaling": 0}, "logits_scaling is 0; expected a positive number"),
        ("exaone4_gqa", {"layer_types": None}, "sliding_window_pattern is 'LG' and there are no"),
        ("cohere2_gqa", {"use_parallel_block": False}, "use_parallel_block is False; only True"),
        ("ministral_gqa", {"head_dim": None}, "has no 'head_dim'"),
        (
            "ministral3_gqa",
            {"rope_parameters": {"rope_type": "default"}},
            "llama_4_scaling_beta None and original_max_position_embeddings None; expected",
        ),
        (
            "hunyuan_v1_dense_gqa",
            {"rope_parameters": {"rope_type": "dynamic", "alpha": 9.0, "other": 1}},
            "'dynamic' has .* for heads of 12; expected a positive alpha and at most alpha,",
        ),
        ("deepseek_v3_packed", {"topk_method": "greedy"}, "topk_method is 'greedy'; only 'noaux_"),
        (
            "deepseek_v3_packed",
            {"n_group": 3},
            "8 experts in n_group 3 groups, of which topk_gr",
        ),
        ("deepseek_v3_packed", {"n_group": 8, "topk_group": 8}, "groups of 1 experts"),
        ("deepseek_v3_packed", {"first_k_dense_replace": 3}, "3 of 3 layers are without experts"),
        ("deepseek_v3_packed", {"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4"),
        ("deepseek_v2_packed", {"norm_topk_prob": True}, "norm_topk_prob is True; only False"),
        ("deepseek_v2_packed", {"topk_method": "noaux_tc"}, "'noaux_tc'; expected 'greedy' or"),
        (
            "glm4_moe_lite_packed",
            {"mlp_layer_types": ["dense", "sparse", "dense"]},
            "mlp_layer_types is .* expected 3 entries, 'dense' for the first layers",
        ),
        (
            "nanochat_gqa",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope scaling of nanochat is not supported",
        ),
    ],
)
def test_what_would_change_the_maths_is_refused(case, changes, message):
    config = dict(CASES[case])
    if "partial_rotary_factor" in changes:
        config.pop("rope_parameters", None)
    with pytest.raises(ModelError, match=message):
        architecture_from_hf(config | changes)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen2_gqa", {"use_mrope": False, "_attn_implementation_autoset": True}),
        ("qwen3_moe_tied", {"qkv_bias": False, "use_qk_norm": True, "quantization_config": None}),
        ("gpt2_tied", {"n_special": 0, "predict_special_tokens": True, "id2label": {"0": "A"}}),
        ("gqa", {"max_sequence_length": 2048, "some_new_field": None}),
    ],
)
def test_fields_of_published_files_that_change_nothing_are_accepted(case, changes):
    assert architecture_from_hf(CASES[case] | changes) == architecture_from_hf(CASES[case])


# Families of which there is no config here from a source that can be named.
NOT_COUNTED = {"cohere2", "ministral", "nanochat"}


@pytest.mark.slow(seconds=12)
def test_published_models_build_their_state_with_their_size_and_allocate_nothing(shared):
    placement = make_placement(RunConfig(strategy="fsdp"))
    sizes = load_published_sizes()
    configs = {n: c for n, c in published_configs(shared / "configs").items() if n in sizes}
    counted = {config["model_type"] for config in configs.values()}
    assert counted | NOT_COUNTED == FAMILIES.keys() and not counted & NOT_COUNTED
    gc.collect()  # arrays of other tests would go meanwhile
    before = len(jax.live_arrays())
    found = {}
    for name, config in configs.items():
        abstract = architecture_from_hf(config).abstract(make_numerics("mixed"))
        assert all(isinstance(spec, jax.ShapeDtypeStruct) for spec in abstract.params.values())
        found[name] = sum(spec.size for spec in abstract.params.values())
        optimizer = make_optimizer(OptimConfig(), lambda step: 1e-5, abstract)
        shardings = placement.shardings(abstract.params, abstract.axes)
        state = abstract_state(abstract.params, shardings, optimizer, "", placement=placement)
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.shape)
        assert moments == 2 * sum(spec.size for spec in state.trainable.values())
        assert found[name] == sum(spec.size for spec in state.params.values())
    assert len(jax.live_arrays()) == before
    assert found == sizes


def test_other_families_are_refused_with_the_list_of_supported_ones(shared):
    refused = set()
    for name, config in published_configs(shared / "configs").items():
        if name in load_published_sizes():
            continue
        with pytest.raises(ModelError) as error:
            architecture_from_hf(config)
        (problem,) = error.value.problems
        assert f"model_type {config['model_type']!r} is " in problem and "supported" in problem
        assert f"supported are {', '.join(sorted(FAMILIES))}." in problem
        refused.add(config["model_type"])
    assert refused == {"bert"}
    with pytest.raises(ModelError, match=r"'llama3' is not supported; .*mean 'llama'"):
        architecture_from_hf({"model_type": "llama3"})
    whole = {"model_type": "idefics3", "text_config": {"model_type": "llama"}, "vision_config": {}}
    with pytest.raises(ModelError, match=r"'idefics3' is a multimodal model: .* \(llama\) inside"):
        architecture_from_hf(whole)


def test_strange_models_are_refused_by_what_they_have():
    assert not REFUSED.keys() & (FAMILIES.keys() | TOWERS.keys())
    for kind, reason in REFUSED.items():
        for name in (kind, f"{kind}_text"):
            whole = {"text_config": {"model_type": name}, "vision_config": {}}
            for config in ({"model_type": name}, {"model_type": "some_vl"} | whole):
                with pytest.raises(ModelError) as error:
                    architecture_from_hf(config)
                assert f"is refused: models of this type {reason}, which is not" in str(error.value)
