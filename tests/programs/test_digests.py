"""Digests of an adapter's base: of the numbers in its files, in whatever type they are held."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft.models.adapters import Adaptation
from jaxft.models.config import make_numerics
from jaxft.models.vocabulary import with_rows_for
from jaxft.programs.digests import digest_in_files, digest_of, digest_of_base
from jaxft.programs.weights import load_weights
from jaxft.training.state import TrainState
from jaxft.workdir.checkpoint import Checkpoints, Progress
from jaxft.workdir.source import Source
from tests.tiny_run import write_base

TRAINED = Adaptation(trained="^norm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Source(write_base(tmp_path_factory.mktemp("digests") / "base"))


@functools.cache
def held(base: Source, dtypes: str, quantise: str = "", **more):
    """Returns the weights as a run holds them."""
    plain = base.architecture
    if "tokenizer" in more:
        plain = with_rows_for(plain, more["tokenizer"])
    architecture = dataclasses.replace(plain, quantise=quantise)
    abstract = architecture.abstract(make_numerics(dtypes))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(abstract.params, one)
    return load_weights(base, architecture, abstract, shardings, **more)


def moved(base: Source, folder, name: str, by: float) -> Source:
    """Returns a copy of the base of which one tensor is another."""
    shutil.copytree(base.folder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] + np.float32(by)}, file, {"format": "pt"})
    return Source(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_has_the_same_digest_in_every_type_that_it_is_held_in(base, dtype):
    files = digest_in_files(base, TRAINED, dtype=dtype)
    for dtypes, quantise in (("float32", ""), ("bfloat16", ""), ("bfloat16", "int8")):
        params = held(base, dtypes, quantise)
        assert digest_of_base(base, TRAINED, params, dtype=dtype) == files, (dtypes, quantise)


def test_a_checkpoint_is_read_in_codes_as_the_files_of_its_model_are(base, tmp_path):
    params = held(base, "float32")
    state = TrainState(jnp.int32(1), params, {}, {"count": jnp.int32(1)})
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(state, progress=Progress(data={}), config={})
    run = Source(base.folder, tmp_path / "run" / "checkpoints", 1)
    found, expected = (held(source, "bfloat16", "nf4") for source in (run, base))
    assert found.keys() == expected.keys() and "layers.attn.q.codes" in found
    for path, value in expected.items():
        assert np.asarray(found[path]).tobytes() == np.asarray(value).tobytes(), path
    files = digest_in_files(base, TRAINED, dtype="bfloat16")
    assert digest_of_base(run, TRAINED, found, dtype="bfloat16") == files


def test_of_weights_in_float32_it_is_that_of_all_their_bits(base):
    params = held(base, "float32")
    found = digest_of_base(base, Adaptation(), params, dtype="float32")
    assert found == digest_of(params)
    rounded = {path: x.astype(jnp.bfloat16) for path, x in params.items()}
    narrow = digest_of_base(base, Adaptation(), params, dtype="bfloat16")
    assert narrow == digest_of(rounded) != found


def test_another_number_is_another_digest_unless_it_is_learnt_or_lost(base, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    known = digest_in_files(base, TRAINED, dtype="bfloat16")
    other = moved(base, tmp_path / "other", name, 0.01)
    assert digest_in_files(other, TRAINED, dtype="bfloat16") != known
    params = held(other, "float32")
    assert digest_of_base(other, TRAINED, params, dtype="bfloat16") != known
    norm = moved(base, tmp_path / "norm", "model.norm.weight", 0.01)
    assert digest_in_files(norm, TRAINED, dtype="bfloat16") == known
    near = moved(base, tmp_path / "near", name, 1e-9)
    assert digest_in_files(near, TRAINED, dtype="bfloat16") == known


def test_rows_that_are_made_for_tokens_do_not_count(base):
    tokenizer = base.described.load_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(40)])
    params = held(base, "float32", tokenizer=tokenizer, new_tokens=(42, 43))
    assert params["embed.w"].shape[0] > base.architecture.config.vocab
    tokens = {"dtype": "float32", "new_tokens": (42, 43)}
    files = digest_in_files(base, TRAINED, **tokens)
    assert digest_of_base(base, TRAINED, params, **tokens) == files
    assert files != digest_in_files(base, TRAINED, dtype="float32")
