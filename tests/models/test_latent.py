"""Attention to latents: what is kept of a token, and what never trains of its families' routers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft.config import AdapterConfig
from jaxft.errors import ModelError
from jaxft.hf.load import load_params
from jaxft.models.adapters import _attach_site
from jaxft.models.config import Numerics, make_numerics
from jaxft.models.families import architecture_from_hf
from jaxft.models.layers import Linear
from jaxft.models.module import merge
from jaxft.models.rope import YarnScaling
from jaxft.models.weights import Site
from jaxft.training.adaptation import adapted
from jaxft.training.state import partition
from tests.oracle.cases import CASES, write_folder
from tests.oracle.published import PUBLISHED


def test_a_cache_holds_one_latent_and_one_key_of_a_token():
    architecture = architecture_from_hf(CASES["deepseek_v3_published"])
    abstract, config = architecture.abstract(make_numerics("bfloat16")), architecture.config
    cache = jax.eval_shape(
        lambda params: merge(abstract.graphdef, params).init_cache(5, 7), abstract.params
    )
    assert {x.shape for x in jax.tree.leaves(cache)} == {(5, 1, 7, 16 + 16)}
    assert sum(x.size for x in jax.tree.leaves(cache)) == 5 * 7 * config.cached
    assert cache.slots == 7


@pytest.mark.parametrize("start", [False, True])
def test_a_weight_with_its_adapter_as_one_matrix_multiplies_as_both_do(start):
    kwargs = {"dtype": jnp.float32, "scale": 1.0, "rngs": nnx.Rngs(0)}
    linear = Linear((2, 3), (4,), axes=("heads", "head_dim", "latent"), **kwargs)
    _attach_site(linear, Site(2, 3.0, magnitude=True, start=start), "x")
    random = np.random.RandomState(0)
    leaves = ("lora_a", "lora_b", "magnitude", *(("start_a", "start_b") if start else ()))
    for leaf in leaves:
        param = getattr(linear, leaf)
        param[...] = jnp.asarray(random.normal(size=param.shape), jnp.float32)
    whole = linear(jnp.eye(4)[None])[0]  # [in, 2, 3]
    found = linear.adapted(jnp.float32)
    np.testing.assert_allclose(found, jnp.moveaxis(whole, 0, -1), atol=1e-5)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2, train=".")])
def test_what_experts_are_chosen_by_neither_trains_nor_is_rounded(adapter):
    architecture = architecture_from_hf(CASES["deepseek_v3_published"])
    if adapter is not None:
        architecture = adapted(architecture, adapter)
    params = architecture.abstract(make_numerics("bfloat16")).params
    path = "layers.1.mlp.routed.correction"
    assert params[path].dtype == jnp.float32
    assert params["layers.1.mlp.routed.router.w"].dtype == jnp.bfloat16
    parts = partition(params, "", architecture.adaptation)
    assert path not in parts.trainable and "layers.1.mlp.routed.router.w" in parts.trainable
    assert path in parts.frozen | parts.base


def test_factors_of_layers_do_not_train():
    params = architecture_from_hf(CASES["gemma4_text_gqa"]).abstract(make_numerics("mixed")).params
    parts = partition(params, "")
    factors = {path for path in params if path.endswith(".factor")}
    assert factors and factors <= set(parts.frozen | parts.base)
    assert not factors & set(parts.trainable)


def test_layers_that_guess_further_tokens_are_beside_a_model_that_names_them(
    tmp_path,
):
    file = write_folder("deepseek_v3_published", tmp_path) / "model.safetensors"
    more = {
        f"model.layers.{number}.eh_proj.weight": np.zeros((2, 4), np.float32) for number in (2, 3)
    }
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    config = CASES["deepseek_v3_published"]
    for guessing, complaint in ((2, ""), (1, "layers.3.eh_proj"), (0, "layers.{2-3}.eh_proj")):
        architecture = architecture_from_hf(config | {"num_nextn_predict_layers": guessing})
        abstract = architecture.abstract(Numerics()).params
        if not complaint:
            assert load_params(tmp_path, architecture.naming, abstract).keys() == abstract.keys()
            continue
        with pytest.raises(ModelError) as error:
            load_params(tmp_path, architecture.naming, abstract)
        assert f"Unexpected: model.{complaint}.weight." in error.value.problems[1]


def test_scores_are_scaled_by_what_yarn_says_of_all_dimensions():
    config = CASES["deepseek_v3_published"]
    found = architecture_from_hf(config).config
    assert found.attention_scale == pytest.approx((0.07 * np.log(32) + 1) ** 2 / np.sqrt(24))
    plain = {name: x for name, x in config.items() if name != "rope_scaling"}
    assert architecture_from_hf(plain).config.attention_scale == pytest.approx(24**-0.5)
    assert dataclasses.replace(found, latent=None).value_dim == 24 != found.value_dim


def test_kimi_k2_is_deepseek_v3_by_another_name():
    """As its authors say, and transformers has it of the text of Kimi-K2.5."""
    config = PUBLISHED["moonshotai--Kimi-K2-Instruct"]
    found = architecture_from_hf(config | {"model_type": "kimi_k2"})
    assert found == architecture_from_hf(config)
    # Both borders of YaRN's ramp are at one turn in 4,096 positions, pair 19.2 of 32.
    [rope] = {kind.rope for kind in found.config.kinds}
    assert rope is not None and rope.scaling == YarnScaling(32.0, 19.0, 20.0, 1.0)
    assert found.config.attention_scale == pytest.approx((0.1 * np.log(32) + 1) ** 2 / 192**0.5)
