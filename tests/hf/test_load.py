"""Reading safetensors: values against the safetensors library, and every way a folder is broken."""

import json
import os
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxft.errors import ModelError
from jaxft.hf import decoded, load, read
from jaxft.hf.folder import read_config
from jaxft.hf.load import load_params
from jaxft.hf.rules import Naming, Rule
from jaxft.hf.stored import tensor_dtypes
from jaxft.models import quantised
from tests.oracle.cases import CASES, MXFP4, tensors_of, write_folder

BLOCK = "model.layers.{layer}."
RULES = (
    Rule("embed.w", "model.embed_tokens.weight", "v d -> v d"),
    Rule("layers.attn_norm.scale", BLOCK + "input_layernorm.weight", "d -> d"),
    Rule("layers.attn.q.w", BLOCK + "self_attn.q_proj.weight", "(n h) d -> d n h"),
    Rule("layers.attn.k.w", BLOCK + "self_attn.k_proj.weight", "(k h) d -> d k h"),
    Rule("layers.attn.v.w", BLOCK + "self_attn.v_proj.weight", "(k h) d -> d k h"),
    Rule("layers.attn.o.w", BLOCK + "self_attn.o_proj.weight", "d (n h) -> n h d"),
    Rule("layers.mlp_norm.scale", BLOCK + "post_attention_layernorm.weight", "d -> d"),
    Rule("layers.mlp.gate.w", BLOCK + "mlp.gate_proj.weight", "f d -> d f"),
    Rule("layers.mlp.up.w", BLOCK + "mlp.up_proj.weight", "f d -> d f"),
    Rule("layers.mlp.down.w", BLOCK + "mlp.down_proj.weight", "d f -> f d"),
    Rule("norm.scale", "model.norm.weight", "d -> d"),
    Rule("head.w", "lm_head.weight", "v d -> d v"),
)
CASE = "gqa"


def abstract_params(
    config: dict, dtype=jnp.float32, spec: dict[str, PartitionSpec] | None = None, mesh=None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a Llama of this config asks `load_params` for."""
    layers, embed, heads, kv_heads, head, mlp, vocab = (
        config[name]
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
        )
    )
    shapes = {
        "embed.w": (vocab, embed),
        "layers.attn_norm.scale": (layers, embed),
        "layers.attn.q.w": (layers, embed, heads, head),
        "layers.attn.k.w": (layers, embed, kv_heads, head),
        "layers.attn.v.w": (layers, embed, kv_heads, head),
        "layers.attn.o.w": (layers, heads, head, embed),
        "layers.mlp_norm.scale": (layers, embed),
        "layers.mlp.gate.w": (layers, embed, mlp),
        "layers.mlp.up.w": (layers, embed, mlp),
        "layers.mlp.down.w": (layers, mlp, embed),
        "norm.scale": (embed,),
    }
    if not config["tie_word_embeddings"]:
        shapes["head.w"] = (embed, vocab)
    return {
        path: jax.ShapeDtypeStruct(
            shape,
            dtype,
            sharding=mesh and NamedSharding(mesh, (spec or {}).get(path, PartitionSpec())),
        )
        for path, shape in shapes.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(CASE, tmp_path)


ABSTRACT = abstract_params(CASES[CASE])


def rewrite(folder: Path, change) -> dict[str, np.ndarray]:
    """Passes the tensors of a folder through `change` and writes them back."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def split_into_shards(folder: Path, count: int = 3) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(sorted(tensors.items())[number::count])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def problems_of(folder: Path, abstract=ABSTRACT, **options) -> list[str]:
    with pytest.raises(ModelError) as error:
        load_params(folder, Naming(RULES, **options), abstract)
    return error.value.problems


def assert_values(params: dict[str, jax.Array], tensors: dict[str, np.ndarray]) -> None:
    """Compares with their layouts written out by hand."""
    config = CASES[CASE]
    heads, head = config["num_attention_heads"], config["head_dim"]
    for layer in range(config["num_hidden_layers"]):
        theirs = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        ours = theirs.reshape(heads, head, -1).transpose(2, 0, 1)
        np.testing.assert_array_equal(params["layers.attn.q.w"][layer], ours)
        theirs = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
        ours = theirs.T.reshape(heads, head, -1)
        np.testing.assert_array_equal(params["layers.attn.o.w"][layer], ours)
        theirs = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(params["layers.mlp.down.w"][layer], theirs.T)
    np.testing.assert_array_equal(params["embed.w"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head.w"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["norm.scale"], tensors["model.norm.weight"])


def test_a_single_file_gives_the_values_in_our_layout(folder):
    params = load_params(folder, Naming(RULES), ABSTRACT)
    assert params.keys() == ABSTRACT.keys()
    assert_values(params, tensors_of(CASE))


def test_shards_give_the_same_as_a_single_file(folder):
    split_into_shards(folder)
    assert_values(load_params(folder, Naming(RULES), ABSTRACT), tensors_of(CASE))


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_values_are_cast_to_what_is_asked_for(folder, stored, wanted):
    def cast(tensors):
        tensors.update({name: value.astype(stored) for name, value in tensors.items()})

    tensors = rewrite(folder, cast)
    params = load_params(folder, Naming(RULES), abstract_params(CASES[CASE], wanted))
    assert {param.dtype for param in params.values()} == {jnp.dtype(wanted)}
    assert_values(params, {name: value.astype(wanted) for name, value in tensors.items()})


SPECS = {
    "embed.w": PartitionSpec("tensor", "fsdp"),
    "layers.attn.q.w": PartitionSpec(None, "fsdp", "tensor"),
    "layers.attn.o.w": PartitionSpec(None, None, "tensor", "fsdp"),
    "layers.mlp.down.w": PartitionSpec("tensor", ("fsdp",)),
    "head.w": PartitionSpec("fsdp", "tensor"),
    "norm.scale": PartitionSpec(("fsdp", "tensor")),
}


def test_every_device_holds_its_own_slice(folder):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    abstract = abstract_params(CASES[CASE], spec=SPECS, mesh=mesh)
    params = load_params(folder, Naming(RULES), abstract)
    assert_values(params, tensors_of(CASE))
    whole = load_params(folder, Naming(RULES), ABSTRACT)
    for path, param in params.items():
        assert param.sharding == abstract[path].sharding
        assert len(param.addressable_shards) == 8
        for shard in param.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])


def count_bytes(monkeypatch) -> list[int]:
    """Returns a list that grows by the size of each read from a file."""
    counts = []
    plain = read.Reader.read

    def counted(self, file, start, target):
        counts.append(len(target))
        plain(self, file, start, target)

    monkeypatch.setattr(read.Reader, "read", counted)
    return counts


def test_a_slice_is_read_once_however_many_devices_hold_it(folder, monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    abstract = abstract_params(CASES[CASE], spec=SPECS, mesh=mesh)
    counts = count_bytes(monkeypatch)
    params = load_params(folder, Naming(RULES), abstract)
    assert sum(counts) == sum(param.nbytes for param in params.values())


def test_copies_on_devices_do_not_share_memory_that_a_donation_overwrites(folder):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    params = load_params(folder, Naming(RULES), abstract_params(CASES[CASE], mesh=mesh))
    before = np.array(params["embed.w"])
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(params["embed.w"])
    for shard in after.addressable_shards:
        np.testing.assert_array_equal(shard.data, before + 1)


def test_a_stored_tensor_is_never_held_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_BLOCK", 2**15)
    monkeypatch.setattr(load, "_STAGED", 2**15)
    stored = np.ones((1024, 512), np.float64)
    save_file({"layers.0.weight": stored}, tmp_path / "model.safetensors")
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    abstract = {"w": jax.ShapeDtypeStruct((1, 1024, 512), jnp.bfloat16, sharding=sharding)}
    rules = [Rule("w", "layers.{layer}.weight", "f d -> f d")]
    load_params(tmp_path, Naming(tuple(rules)), abstract)
    tracemalloc.start()
    params = load_params(tmp_path, Naming(tuple(rules)), abstract)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The slices of the result may be the memory that they were read into.
    assert peak < params["w"].nbytes + stored.nbytes // 8


@pytest.fixture
def small(monkeypatch):
    """Cuts everything so small that tiny tensors go through all paths."""
    monkeypatch.setattr(read, "_BLOCK", 64)
    monkeypatch.setattr(decoded, "_VALUES", 8)
    monkeypatch.setattr(read, "_STRAIGHT", 96)
    monkeypatch.setattr(read, "_PAGE", 16)
    monkeypatch.setattr(load, "_STAGED", 400)


SHARED_RULES = (
    Rule("kept", "layers.{layer}.kept", "(n h) d -> n h d"),
    Rule("turned", "layers.{layer}.turned", "d f -> f d"),
    Rule("first", "layers.{layer}.joined", "(+ f) d -> f d"),
    Rule("second", "layers.{layer}.joined", "(+ f) d -> f d"),
    Rule("even", "layers.{layer}.woven", "e d (f +) -> e f d"),
    Rule("odd", "layers.{layer}.woven", "e d (f +) -> e f d"),
    Rule("expert", "layers.{layer}.experts.{expert}", "f d -> f d"),
    Rule("plain", "plain", "d -> d"),
)


@pytest.fixture
def woven(tmp_path: Path) -> dict[str, np.ndarray]:
    """A folder of every kind of rule in `tmp_path`; returns what the parameters must be."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    ours = {
        "kept": draw(2, 4, 3, 8),
        "turned": draw(2, 5, 8),
        "first": draw(2, 4, 8),
        "second": draw(2, 2, 8),
        "even": draw(2, 4, 6, 8),
        "odd": draw(2, 4, 6, 8),
        "expert": draw(2, 4, 5, 8),
        "plain": draw(16),
    }
    tensors = {"plain": ours["plain"]}
    for layer in range(2):
        name = f"layers.{layer}."
        tensors[name + "kept"] = ours["kept"][layer].reshape(12, 8)
        tensors[name + "turned"] = ours["turned"][layer].T.copy()
        pieces = [ours[path][layer] for path in ("first", "second")]
        tensors[name + "joined"] = np.concatenate(pieces)
        pair = np.stack([ours["even"][layer], ours["odd"][layer]], axis=2)  # e f 2 d
        tensors[name + "woven"] = pair.reshape(4, 12, 8).transpose(0, 2, 1).copy()
        for expert in range(4):
            tensors[f"{name}experts.{expert}"] = ours["expert"][layer, expert].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    return ours


def specs_of(ours, dtype=jnp.float32, mesh=None, axes=None) -> dict[str, jax.ShapeDtypeStruct]:
    def sharding(value):
        return mesh and NamedSharding(mesh, axes(value.ndim))

    return {
        path: jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding(value))
        for path, value in ours.items()
    }


AXES = {
    "last": lambda ndim: PartitionSpec(*[None] * (ndim - 1), "fsdp"),
    "first and last": lambda ndim: (
        PartitionSpec("layers", *[None] * (ndim - 2), "fsdp") if ndim > 1 else PartitionSpec("fsdp")
    ),
    "none": lambda ndim: PartitionSpec(),
}


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("axes", AXES)
def test_what_is_encoded_passes_in_small_pieces_and_is_what_the_whole_gives(
    tmp_path, woven, small, axes
):
    mesh, sizes = Mesh(np.array(jax.devices()).reshape(2, 4), ("layers", "fsdp")), []

    def encode(x: jax.Array) -> tuple[jax.Array, ...]:
        sizes.append(x.size * x.dtype.itemsize)
        return quantised.encode(x, "nf4", block=2)

    abstract = specs_of({"plain": woven.pop("plain")}, mesh=mesh, axes=AXES[axes])
    encoded = {}
    for path, value in woven.items():
        leaves = {"codes": (value.shape, jnp.uint4), "scales": ((*value.shape[:-1], 4), None)}
        sharding = NamedSharding(mesh, AXES[axes](value.ndim))
        specs = {
            f"{path}.{leaf}": jax.ShapeDtypeStruct(
                shape, dtype or quantised.SCALES_DTYPE, sharding=sharding
            )
            for leaf, (shape, dtype) in leaves.items()
        }
        encoded[path] = load.Encoded(specs, encode)
    params = load_params(tmp_path, Naming(SHARED_RULES), abstract, encoded)
    assert set(params) == {"plain", *(f"{p}.{n}" for p in woven for n in ("codes", "scales"))}
    for path, value in woven.items():
        whole = quantised.encode(jnp.asarray(value), "nf4", block=2)
        for leaf, wanted in zip(("codes", "scales"), whole, strict=True):
            found = params[f"{path}.{leaf}"]
            assert found.sharding == NamedSharding(mesh, AXES[axes](value.ndim))
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted, err_msg=f"{path}.{leaf}")
    assert max(sizes) <= load._STAGED


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    ("in_host_memory", "dtype"),
    [(True, jnp.float32), (True, jnp.bfloat16), (False, jnp.bfloat16)],
    ids=["host", "host, cast", "accelerator"],
)
def test_every_layout_is_read_in_small_pieces(
    tmp_path, woven, small, monkeypatch, in_host_memory, axes, dtype
):
    monkeypatch.setattr(load, "_have_host_memory", lambda _: in_host_memory)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("layers", "fsdp"))
    abstract = specs_of(woven, dtype, mesh, AXES[axes])
    params = load_params(tmp_path, Naming(SHARED_RULES), abstract)
    for path, value in woven.items():
        assert params[path].sharding == abstract[path].sharding
        np.testing.assert_array_equal(params[path], value.astype(dtype), err_msg=path)


@given(data=st.data())
def test_any_slice_is_what_numpy_selects(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "slices"
    ours = {"kept": np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)}
    if not folder.is_dir():
        folder.mkdir()
        tensors = {f"layers.{i}.kept": layer for i, layer in enumerate(ours["kept"])}
        save_file(tensors, folder / "model.safetensors")
    index = []
    for size in ours["kept"].shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    rules = [Rule("kept", "layers.{layer}.kept", "f d -> f d")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "_BLOCK", data.draw(st.integers(4, 64)))
        patch.setattr(read, "_PAGE", data.draw(st.integers(1, 32)))
        found = load.read_slices(
            folder, Naming(tuple(rules)), specs_of(ours), {"kept": [tuple(index)]}
        )
    np.testing.assert_array_equal(found["kept"][0], ours["kept"][tuple(index)])


def test_only_the_bytes_of_a_host_are_read_by_seeking(tmp_path, monkeypatch):
    stored = np.arange(64 * 8192, dtype=np.float32).reshape(64, 8192)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    # Host 1 of 4 with two devices: side by side, and read in one run of each row.
    indices = [(slice(None), slice(start, start + 1024)) for start in (2048, 3072)]
    counts = count_bytes(monkeypatch)
    specs = {"w": jax.ShapeDtypeStruct(stored.shape, jnp.float32)}
    found = load.read_slices(
        tmp_path, Naming((Rule("w", "w", "f d -> f d"),)), specs, {"w": indices}
    )
    for values, index in zip(found["w"], indices, strict=True):
        np.testing.assert_array_equal(values, stored[index])
    assert counts == [2048 * 4] * 64


def test_parameters_on_a_cpu_are_the_memory_that_was_read_into(tmp_path, woven, monkeypatch):
    made = []
    plain = load._empty

    def noted(shape, dtype):
        made.append(plain(shape, dtype))
        return made[-1]

    monkeypatch.setattr(load, "_empty", noted)
    params = load_params(tmp_path, Naming(SHARED_RULES), specs_of(woven))
    addresses = {array.ctypes.data for array in made}
    assert {param.unsafe_buffer_pointer() for param in params.values()} == addresses


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, woven, monkeypatch):
    file = tmp_path / "model.safetensors"
    plain = load._find

    def shrinking(*args):
        sources = plain(*args)
        os.truncate(file, file.stat().st_size - 8)
        return sources

    monkeypatch.setattr(load, "_find", shrinking)
    with pytest.raises(ModelError, match="became shorter"):
        load_params(tmp_path, Naming(SHARED_RULES), specs_of(woven))


MXFP4_RULES = (
    Rule("gate", "layers.{layer}.gate_up", "e d (f +) -> e f d"),
    Rule("up", "layers.{layer}.gate_up", "e d (f +) -> e f d"),
)


@pytest.fixture
def packed(tmp_path: Path) -> np.ndarray:
    """A folder of one layer in MXFP4 with the oracle's bytes; returns what they stand for."""
    with np.load(MXFP4) as stored:
        arrays = dict(stored)
    pair = {f"layers.0.gate_up_{name}": arrays[name] for name in ("blocks", "scales")}
    save_file(pair, tmp_path / "model.safetensors")
    return arrays["values"]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mxfp4_is_unpacked_as_transformers_does(tmp_path, packed, small, axes, dtype):
    experts, columns, rows = packed.shape
    shape = (1, experts, rows // 2, columns)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 8), ("layers", "fsdp"))
    sharding = NamedSharding(mesh, AXES[axes](4))
    spec = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    params = load_params(tmp_path, Naming(MXFP4_RULES), {"gate": spec, "up": spec})
    for first, path in enumerate(("gate", "up")):
        expected = packed[:, :, first::2].transpose(0, 2, 1)[None]
        np.testing.assert_array_equal(params[path].astype(np.float32), expected)


def test_tensors_in_mxfp4_count_as_the_ones_they_stand_for(tmp_path, packed):
    assert tensor_dtypes(tmp_path) == {"layers.0.gate_up": "bfloat16"}


def test_scales_that_do_not_fit_their_blocks_are_an_error(tmp_path, packed):
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.0.gate_up_scales"] = tensors["layers.0.gate_up_scales"][:, :-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    spec = jax.ShapeDtypeStruct((1, 2, 3, 96), jnp.float32)
    with pytest.raises(ModelError, match=r"layers\.0\.gate_up has blocks .* do not fit"):
        load_params(tmp_path, Naming(MXFP4_RULES), {"gate": spec, "up": spec})


def test_names_may_leave_out_a_prefix(tmp_path):
    tensors = {"wte.weight": np.ones((4, 2), np.float32), "h.0.bias": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    rules = [
        Rule("embed", "body.wte.weight", "v d -> v d"),
        Rule("bias", "body.h.{layer}.bias", "d -> d"),
    ]
    shapes = {"embed": np.empty((4, 2)), "bias": np.empty((1, 3))}
    params = load_params(
        tmp_path, Naming(tuple(rules), spellings=(("body.", ""),)), specs_of(shapes)
    )
    np.testing.assert_array_equal(params["embed"], tensors["wte.weight"])
    with pytest.raises(ModelError) as error:
        load_params(tmp_path, Naming(tuple(rules)), specs_of(shapes))
    assert "Missing: body.wte.weight." in error.value.problems


def test_names_that_do_not_fit_are_listed_at_once_and_by_ranges_of_layers(folder):
    def change(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
            name = f"model.layers.{layer}.self_attn.q_norm.weight"
            tensors[name] = np.ones(8, np.float32)
        del tensors["model.norm.weight"]
        tensors["score.weight"] = np.ones((2, 32), np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((65, 32), np.float32)
        tensors["model.layers.1.input_layernorm.weight"] = np.ones(32, np.int8)

    rewrite(folder, change)
    assert problems_of(folder)[1:] == [
        "Missing: model.norm.weight.",
        "Missing: model.layers.{0-1}.mlp.up_proj.weight.",
        "Unexpected: score.weight.",
        "Unexpected: model.layers.{0-1}.self_attn.q_norm.weight.",
        "model.embed_tokens.weight has shape [65, 32]; config.json asks for [64, 32].",
        "model.layers.1.input_layernorm.weight is stored as I8; "
        "expected one of F64, F32, F16, BF16.",
    ]


def test_nothing_is_allocated_when_something_does_not_fit(folder, monkeypatch):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    monkeypatch.setattr(load, "_empty", lambda *_: pytest.fail("made before the checks were done"))
    counts = count_bytes(monkeypatch)
    assert problems_of(folder)[1:] == ["Missing: lm_head.weight."]
    assert not counts


def test_ignored_names_may_be_there(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.int64)

    rewrite(folder, change)
    load_params(folder, Naming(RULES, (r"rotary_emb\.inv_freq$",)), ABSTRACT)
    unexpected = "Unexpected: model.layers.0.self_attn.rotary_emb.inv_freq."
    assert problems_of(folder)[1:] == [unexpected]


COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_folder("mqa_tied", tmp_path)


TIED = abstract_params(CASES["mqa_tied"])


def test_the_head_of_a_tied_model_may_be_stored_twice(tied):
    load_params(tied, Naming(RULES, copies=COPIES), TIED)
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    load_params(tied, Naming(RULES, copies=COPIES), TIED)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_an_error(tied):
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1e-3}))
    problems = problems_of(tied, abstract=TIED, copies=COPIES)
    assert "lm_head.weight differs from model.embed_tokens.weight" in problems[1]
    assert "'tie_word_embeddings' to false" in problems[1]


def test_missing_and_broken_shards_are_named_without_accusing_their_tensors(folder):
    split_into_shards(folder)
    first, second, third = sorted(folder.glob("model-*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    third.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    problems = problems_of(folder)[1:]
    assert len(problems) == 3
    assert problems[0].startswith(f"{first.name} is named by model.safetensors.index.json but")
    assert f"{second.name} is truncated: it has" in problems[1]
    assert problems[2].startswith(f"{third.name} has no readable header")
    assert "git lfs pull" in problems[2]


def test_a_tensor_that_the_index_puts_elsewhere_is_named(folder):
    split_into_shards(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    name = "model.norm.weight"
    real = content["weight_map"][name]
    content["weight_map"][name] = next(shard for shard in shards if shard != real)
    index.write_text(json.dumps(content))
    expected = f"{name} is not in {content['weight_map'][name]}, where"
    assert problems_of(folder)[1].startswith(expected)


@pytest.mark.parametrize("length", [0, 4, 8, 20, 500, 3000])
def test_a_file_cut_anywhere_is_an_error(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "model.safetensors" in problems_of(folder)[1]


def test_a_file_with_bytes_too_many_is_an_error(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert "model.safetensors is damaged" in problems_of(folder)[1]


def test_a_header_whose_offsets_do_not_fit_the_shape_is_an_error(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert any("model.norm.weight takes 124 bytes" in text for text in problems_of(folder))


def test_pickled_weights_are_refused_with_the_conversion(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    problems = problems_of(folder)
    assert "pickled weights" in problems[0]
    assert "save_pretrained" in problems[0]


def test_a_folder_without_weights_says_what_it_has(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert "only other.safetensors" in problems_of(folder)[0]


def test_dtypes_come_from_headers(folder):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(32, ml_dtypes.bfloat16)
        tensors["other"] = np.ones(3, np.int8)

    rewrite(folder, change)
    dtypes = tensor_dtypes(folder)
    assert dtypes.pop("model.norm.weight") == "bfloat16"
    assert dtypes.pop("other") == "I8"
    assert set(dtypes.values()) == {"float32"}


def test_a_real_model_loads(shared):
    folder = shared / "models" / "stories260K"
    config = read_config(folder)
    params = load_params(folder, Naming(RULES), abstract_params(config))
    assert sum(param.size for param in params.values()) == 260_032


def load_vector(folder: Path, **arguments) -> jax.Array:
    abstract = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    return load_params(folder, Naming((Rule("w", "body.w", "d -> d"),), **arguments), abstract)["w"]


def test_a_file_without_tensors_names_what_is_missing(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"Missing: body\.w"):
        load_vector(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"body.w": 3}}')
    with pytest.raises(ModelError, match="has no 'weight_map'"):
        load_vector(tmp_path)


def test_a_name_with_and_without_its_prefix_is_one_too_many(tmp_path):
    values, spellings = np.arange(3, dtype=np.float32), (("body.", ""),)
    save_file({"w": values}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(load_vector(tmp_path, spellings=spellings), values)
    save_file({"w": values, "body.w": values + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"Unexpected: w\."):
        load_vector(tmp_path, spellings=spellings)


def test_copies_are_equal_if_their_bytes_are(tmp_path):
    values = np.array([1.0, np.nan, 2.0], np.float32)
    save_file({"body.w": values, "copy": values.copy()}, tmp_path / "model.safetensors")
    assert np.isnan(load_vector(tmp_path, copies={"copy": "body.w"})[1])
    save_file({"body.w": values, "copy": values + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"copy differs from body\.w"):
        load_vector(tmp_path, copies={"copy": "body.w"})
