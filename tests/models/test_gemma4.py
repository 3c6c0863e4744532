"""What Gemma 4 E2B and E4B have beside other families: inputs of layers, and keys read again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.module import apart, merge
from jaxft.programs.conversion import check
from jaxft.programs.description import hf_config
from jaxft.programs.generate import generate_tokens
from jaxft.training.adaptation import adapted, quantised
from jaxft.training.objectives.token_scores import cross_entropy
from jaxft.workdir.source import Source
from tests.oracle.cases import CASES, load_published_sizes, write_folder
from tests.oracle.published import PUBLISHED
from tests.oracle.towers import load_logits, tokens, write_tower
from tests.tiny import load_tiny, make_documents, pack, relative_error

E2B = "gemma4_text_e2b"


@pytest.mark.parametrize(
    "case",
    [
        E2B,
        *(
            pytest.param(f"gemma4_text_{c}", marks=pytest.mark.slow(seconds=6))
            for c in ("e4b_packed", "reading", "inputs_and_experts")
        ),
    ],
)
def test_a_cache_without_keys_of_layers_that_make_none_gives_what_whole_passes_give(case):
    """Also beyond the window, and with the weights of each layer apart."""
    tiny, new = load_tiny(case), 9
    config, graphdef = tiny.architecture.config, tiny.abstract.graphdef
    cache = tiny.merge().init_cache(1, 16)
    assert len(cache.layers) == config.layers - len(config.sources)
    assert sum(x[0, :, 0].size for x in jax.tree.leaves(cache)) == config.cached
    prompt = [5, 9, 3, 7, 11, 2, 8, 40, 12]
    (found,) = generate_tokens(
        config, graphdef, tiny.params, [prompt], max_new_tokens=new, stop_ids=()
    )
    logits = merge(graphdef, tiny.params)(np.asarray([prompt + found], np.int32))[0]
    assert np.argmax(logits[len(prompt) - 1 : -1], axis=-1).tolist() == found
    assert len(apart(tiny.params, config.parts)) == config.layers


@pytest.mark.slow(seconds=20)
def test_what_is_kept_of_layers_changes_no_gradient():
    """Of what layers read of others, too."""
    tiny = load_tiny(E2B)
    batch = pack([make_documents([9, 13], 64), make_documents([20], 64, seed=1)], 24)

    def gradients(remat: str) -> dict:
        graphdef = tiny.architecture.abstract(Numerics(remat=remat)).graphdef

        def loss(params):
            model = merge(graphdef, params)
            hidden, _ = model.hidden(batch.tokens, batch.positions, batch.segments)
            return cross_entropy(model, hidden, batch.targets, batch.weights, chunk=0).total

        return jax.jit(jax.grad(loss))(tiny.params)

    expected = gradients("none")
    for remat in ("full", "dots", "qkv+mlp"):
        assert relative_error(gradients(remat), expected) < 1e-5


def test_keys_and_values_that_files_hold_of_layers_that_make_none_go_with_the_model(tmp_path):
    """Published files hold them, and nothing reads them."""
    folder = write_tower("gemma4_e2b", tmp_path)
    file = folder / "model.safetensors"
    start = "model.language_model.layers.{}.self_attn.{}.weight"
    unread = {
        start.format(layer, part): np.full(shape, layer, np.float32)
        for layer, size in ((2, 8), (3, 16))
        for part, shape in (
            ("k_proj", (2 * size, 32)),
            ("v_proj", (2 * size, 32)),
            ("k_norm", (size,)),
        )
    }
    save_file(load_file(file) | unread, file, metadata={"format": "pt"})
    np.testing.assert_allclose(jaxft.load(folder)(tokens()), load_logits("gemma4_e2b"), atol=1e-4)
    found = check(folder)
    assert found.fits
    passed = {line.theirs for line in found.lines if line.state == "passed through"}
    assert unread.keys() <= passed
    target = jaxft.export(folder, tmp_path / "out", on_log=lambda text: None)
    before, after = load_file(file), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    save_file(before | {start.format(1, "k_bias"): np.ones(3, np.float32)}, file)
    with pytest.raises(ModelError, match=r"Unexpected: .*layers\.1\.self_attn\.k_bias"):
        jaxft.load(folder)


@pytest.mark.parametrize(
    ("name", "table", "effective"),
    # https://ai.google.dev/gemma/docs/core says 2.3B and 4.5B of effective parameters.
    [("E2B", 2_348_810_240, 2_279_759_139), ("E4B", 2_818_572_288, 4_644_441_130)],
)
def test_published_models_have_their_sizes_with_and_without_the_table_of_inputs(
    name, table, effective
):
    name = f"google--gemma-4-{name}-it"
    abstract = architecture_from_hf(PUBLISHED[name]).abstract(make_numerics("mixed"))
    sizes = {path: spec.size for path, spec in abstract.params.items()}
    assert sizes["per_layer.table.w"] == table
    assert sum(sizes.values()) == load_published_sizes()[name] == table + effective


def test_the_table_of_inputs_is_looked_up_in_and_never_in_codes():
    architecture = architecture_from_hf(CASES[E2B])
    assert not architecture.is_multiplied("per_layer.table.w")
    assert architecture.is_multiplied("per_layer.projection.w")
    coded = quantised(architecture, "int8").abstract(make_numerics("float32")).params
    dense = {path for path in coded if path.endswith(".w")}
    assert dense == {"embed.w", "per_layer.table.w", "per_layer.projection.w"}
    assert "layers.4.per_layer.gate.codes" in coded or "layers.0.per_layer.gate.codes" in coded


def test_adapters_are_on_what_layers_multiply_and_where_else_they_are_asked_for():
    architecture = architecture_from_hf(CASES[E2B])
    sites = adapted(architecture, AdapterConfig(rank=2)).adaptation.sites
    names = {path.partition(".")[2].partition(".")[2] for path in sites}
    assert {"per_layer.gate", "per_layer.out", "attn.q", "attn.k", "mlp.up"} <= names
    assert all(path.startswith("layers.") for path in sites)
    asked = AdapterConfig(rank=2, targets="per_layer_model_projection")
    assert adapted(architecture, asked).adaptation.sites.keys() == {"per_layer.projection"}


def test_rows_of_new_tokens_are_in_both_tables():
    architecture = architecture_from_hf(CASES[E2B])
    found = adapted(architecture, AdapterConfig(rank=2, added_rows=True), added=(60, 61))
    params = found.abstract(make_numerics("float32")).params
    assert params["embed.rows"].shape == (2, 24)
    assert params["per_layer.table.rows"].shape == (2, 8 * 16)


@pytest.mark.parametrize("is_whole", [False, True])
def test_rows_of_new_tokens_are_in_both_sizes_of_config_json(is_whole, tmp_path):
    source = Source(
        write_tower("gemma4_e2b", tmp_path) if is_whole else write_folder(E2B, tmp_path)
    )
    config = dataclasses.replace(source.architecture.config, vocab=128)
    grown = hf_config(source, dataclasses.replace(source.architecture, config=config))
    text = grown["text_config"] if is_whole else grown
    assert text["vocab_size"] == text["vocab_size_per_layer_input"] == 128
    assert architecture_from_hf(grown).config == config


def test_an_adapter_before_the_layers_has_its_dropout():
    architecture = architecture_from_hf(CASES[E2B])
    asked = AdapterConfig(rank=2, targets="per_layer_model_projection", dropout=0.5)
    abstract = adapted(architecture, asked).abstract(make_numerics("float32"))
    params = {
        path: jax.random.normal(jax.random.key(i), spec.shape) / 4
        for i, (path, spec) in enumerate(abstract.params.items())
    }
    batch = pack([make_documents([9, 13], 64)], 24)

    def hidden(seed: int) -> np.ndarray:
        seeds = jax.random.bits(jax.random.key(seed), batch.tokens.shape, jnp.uint32)
        model = merge(abstract.graphdef, params)
        return model.hidden(batch.tokens, batch.positions, batch.segments, seeds)[0]

    assert np.abs(hidden(0) - hidden(1)).max() > 1e-3
    np.testing.assert_array_equal(hidden(0), hidden(0))
