"""Writing safetensors: bytes that were loaded come back, read by the safetensors library."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxft.errors import ModelError
from jaxft.hf import save
from jaxft.hf.load import load_params
from jaxft.hf.rules import Naming, Rule
from jaxft.hf.save import atomic_folder, save_params
from jaxft.hf.stored import tensor_dtypes
from tests.hf.test_load import RULES, SPECS, abstract_params
from tests.oracle.cases import CASES, write_folder


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns `{name: (dtype, shape, bytes)}` of all tensors, as the safetensors library sees."""
    content = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118  (safe_open has no iterator)
                value = tensors.get_tensor(name)
                content[name] = (str(value.dtype), value.shape, value.tobytes())
    return content


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["gqa", "mqa_tied", "head_dim_6", "head_dim_10_tied"])
def test_load_then_save_gives_the_same_bytes(tmp_path, case, dtype, shard_bytes):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    write_folder(case, source)
    file = source / "model.safetensors"
    tensors = {name: value.astype(dtype) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
    specs = SPECS if case == "gqa" else {"embed.w": PartitionSpec(None, "fsdp")}
    params = load_params(source, Naming(RULES), abstract_params(CASES[case], spec=specs, mesh=mesh))
    save_params(
        target, Naming(RULES), params, dtypes=tensor_dtypes(source), max_shard_bytes=shard_bytes
    )
    assert stored_bytes(target) == stored_bytes(source)
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    again = load_params(target, Naming(RULES), abstract_params(CASES[case]))
    for path, param in params.items():
        np.testing.assert_array_equal(again[path], param)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_may_be_sharded_too(tmp_path, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    values = np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3)
    sharding = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    rules = [Rule("w", "layers.{layer}.weight", "f d -> d f")]
    save_params(
        tmp_path, Naming(tuple(rules)), {"w": jax.device_put(values, sharding)}, dtypes="float32"
    )
    saved = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        np.testing.assert_array_equal(saved[f"layers.{layer}.weight"], values[layer].T)


@pytest.fixture
def params(tmp_path: Path) -> dict[str, jax.Array]:
    source = tmp_path / "source"
    source.mkdir()
    return load_params(write_folder("gqa", source), Naming(RULES), abstract_params(CASES["gqa"]))


def test_mixed_types_are_kept_a_tensor_at_a_time(tmp_path, params):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    dtypes = dict.fromkeys(tensor_dtypes(source), "bfloat16")
    dtypes["model.norm.weight"] = dtypes["model.layers.1.input_layernorm.weight"] = "float32"
    save_params(target, Naming(RULES), params, dtypes=dtypes)
    assert tensor_dtypes(target) == dtypes
    norm = load_file(target / "model.safetensors")["model.norm.weight"]
    np.testing.assert_array_equal(norm, params["norm.scale"])
    with safe_open(target / "model.safetensors", "numpy") as tensors:
        assert set(tensors.keys()) == set(dtypes)


def test_one_type_for_all_rounds_to_nearest(tmp_path, params):
    target = tmp_path / "target"
    target.mkdir()
    save_params(target, Naming(RULES), params, dtypes="bfloat16")
    saved = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    expected = np.asarray(params["embed.w"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(saved, expected)


def test_shards_keep_the_limit_and_the_index_names_them(tmp_path, params):
    target = tmp_path / "target"
    target.mkdir()
    save_params(target, Naming(RULES), params, dtypes="float32", max_shard_bytes=20_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    sizes = {file: load_file(target / file) for file in files}
    for file, tensors in sizes.items():
        assert sum(value.nbytes for value in tensors.values()) <= 20_000
        assert {name for name, shard in index["weight_map"].items() if shard == file} == set(
            tensors
        )
    total = sum(value.nbytes for tensors in sizes.values() for value in tensors.values())
    assert index["metadata"]["total_size"] == total


def test_a_tensor_above_the_limit_gets_its_own_shard(tmp_path):
    rules = [Rule(name, name, "d -> d") for name in ("a", "b", "c")]
    arrays = {name: jnp.ones(size) for name, size in (("a", 100), ("b", 2), ("c", 2))}
    save_params(tmp_path, Naming(tuple(rules)), arrays, dtypes="float32", max_shard_bytes=16)
    shards = [sorted(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert shards == [["a"], ["b", "c"]]


def test_other_libraries_find_tensors_aligned(tmp_path):
    rules = [Rule(name, name, "d -> d") for name in ("a", "b")]
    dtypes = {"a": "bfloat16", "b": "float32"}
    save_params(tmp_path, Naming(tuple(rules)), {"a": jnp.ones(3), "b": jnp.ones(3)}, dtypes=dtypes)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length + header["b"]["data_offsets"][0]) % 4 == 0


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, params, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ModelError, match=r"The weights take 78\.5 kB more.*Make room"):
        save_params(target, Naming(RULES), params, dtypes="float32")
    assert not list(target.iterdir())


def test_a_folder_appears_whole(tmp_path):
    output = tmp_path / "deep" / "out"
    with atomic_folder(output) as folder:
        (folder / "config.json").write_text("{}")
        assert not output.exists()
    assert [file.name for file in output.iterdir()] == ["config.json"]
    assert [file.name for file in output.parent.iterdir()] == ["out"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert output.stat().st_mode == plain.stat().st_mode


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise KeyError
    assert not list(tmp_path.iterdir())


def killed_while_writing(output: Path, content: object) -> None:
    """Lets a process write one file into the folder to be, and kills it."""
    program = (
        "import json, os, signal, sys; from pathlib import Path\n"
        "from jaxft.hf.save import atomic_folder\n"
        "content = json.loads(sys.argv[2])\n"
        "with atomic_folder(Path(sys.argv[1]), content=content) as folder:\n"
        "    (folder / 'config.json').write_text('{}'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(output), json.dumps(content)],
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    killed_while_writing(tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
    with atomic_folder(tmp_path / "out") as folder:  # what is left does not stand in the way
        assert not (folder / "config.json").exists()
        (folder / "new").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_same_content_goes_on_after_a_kill_and_another_starts_anew(tmp_path):
    output = tmp_path / "out"
    killed_while_writing(output, {"step": 1})
    with pytest.raises(KeyboardInterrupt), atomic_folder(output, content={"step": 1}) as folder:
        assert (folder / "config.json").is_file()
        raise KeyboardInterrupt
    with atomic_folder(output, content={"step": 2}) as folder:
        assert not (folder / "config.json").exists()
    assert not list(output.iterdir())


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    with (
        atomic_folder(tmp_path / "out"),
        pytest.raises(ModelError, match="Another process of this machine is writing"),
        atomic_folder(tmp_path / "out"),
    ):
        pass


def test_files_that_are_complete_are_kept_and_torn_ones_written_again(tmp_path, params):
    whole, target = tmp_path / "whole", tmp_path / "target"
    whole.mkdir()
    target.mkdir()
    save_params(whole, Naming(RULES), params, dtypes="float32", max_shard_bytes=20_000)
    kept, torn, other, short, *_ = sorted(whole.glob("*.safetensors"))
    shutil.copy2(kept, target)
    content = other.read_bytes()
    (target / other.name).write_bytes(content.replace(b"model.layers.0", b"model.layers.7"))
    assert (target / other.name).read_bytes() != content
    (target / short.name).write_bytes(short.read_bytes()[:-4])
    (target / torn.with_suffix(".unfinished").name).write_bytes(torn.read_bytes()[:1000])
    before = (target / kept.name).stat()
    count = save_params(target, Naming(RULES), params, dtypes="float32", max_shard_bytes=20_000)
    assert count == 1
    assert (target / kept.name).stat().st_mtime_ns == before.st_mtime_ns
    assert stored_bytes(target) == stored_bytes(whole)
    assert {file.name for file in target.iterdir()} == {file.name for file in whole.iterdir()}


def test_tensors_are_written_in_rows_where_their_first_axis_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_ELEMENTS", 16)
    rules = [
        Rule("plain", "plain", "v d -> v d"),
        Rule("turned", "{layer}.turned", "d f -> f d"),
        Rule("grouped", "{layer}.grouped", "(n h) d -> n h d"),
        Rule("even", "{layer}.woven", "e d (f +) -> e f d"),
        Rule("odd", "{layer}.woven", "e d (f +) -> e f d"),
        Rule("joined", "{layer}.joined", "(+ f) d -> f d"),
        Rule("more", "{layer}.joined", "(+ f) d -> f d"),
    ]
    random = np.random.default_rng(0)
    shapes = {"plain": (9, 4), "turned": (2, 3, 8), "grouped": (2, 3, 2, 4)}
    shapes |= {"even": (2, 5, 3, 4), "odd": (2, 5, 3, 4), "joined": (2, 3, 4), "more": (2, 5, 4)}
    arrays = {path: random.standard_normal(shape) for path, shape in shapes.items()}
    asked = []

    class Noted:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, index):
            # A file, unlike an array, has nothing beyond its end.
            within = zip(index, self.shape, strict=True)
            assert all((part.stop or size) <= size for part, size in within)
            asked.append(self.array[index].size)
            return self.array[index]

    noted = {path: Noted(array) for path, array in arrays.items()}
    save_params(tmp_path, Naming(tuple(rules)), noted, dtypes="float64")
    saved = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(saved["plain"], arrays["plain"])
    np.testing.assert_array_equal(saved["1.turned"], arrays["turned"][1].T)
    np.testing.assert_array_equal(saved["0.grouped"], arrays["grouped"][0].reshape(6, 4))
    pair = np.stack([arrays["even"][1], arrays["odd"][1]], axis=2).reshape(5, 6, 4)
    np.testing.assert_array_equal(saved["1.woven"], pair.transpose(0, 2, 1))
    joined = np.concatenate([arrays["joined"][0], arrays["more"][0]])
    np.testing.assert_array_equal(saved["0.joined"], joined)
    assert max(asked) == 24  # `grouped`, as a whole
    assert sum(asked) == sum(array.size for array in arrays.values())


def test_names_and_copies_are_written_as_the_file_had_them(tmp_path):
    rules = [Rule("embed", "body.wte", "v d -> v d"), Rule("norm", "body.norm", "d -> d")]
    arrays = {"embed": np.ones((3, 2), np.float32), "norm": np.ones(2, np.float32)}
    copies = {"head": "body.wte", "other_head": "body.wte"}
    dtypes = {"wte": "float32", "norm": "bfloat16", "head": "float16", "ignored": "int8"}
    save_params(
        tmp_path,
        Naming(tuple(rules), copies=copies, spellings=(("body.", ""),)),
        arrays,
        dtypes=dtypes,
    )
    dtypes.pop("ignored")
    assert tensor_dtypes(tmp_path) == dtypes


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelError, match="exists and is not empty"), atomic_folder(tmp_path):
        pass
    with pytest.raises(ModelError, match="not an exported model"), atomic_folder(tmp_path, True):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "out" / "config.json").is_file()


def test_overwriting_replaces_a_model_as_a_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "model-00002-of-00002.safetensors").touch()
    with pytest.raises(KeyError), atomic_folder(output, overwrite=True):
        raise KeyError
    assert (output / "config.json").read_text() == "old"
    with atomic_folder(output, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert [file.read_text() for file in output.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ModelError, match="is a file"), atomic_folder(tmp_path / "out"):
        pass


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_while_writing_is_explained(tmp_path):
    with (
        pytest.raises(ModelError, match="could not be written: No space left"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "model.unfinished").symlink_to("/dev/full")
        save_params(
            folder, Naming((Rule("a", "a", "d -> d"),)), {"a": jnp.ones(3)}, dtypes="float32"
        )
    # What is complete waits for room.
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]


def test_what_appears_while_a_folder_is_written_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ModelError, match="exists and is not empty"), atomic_folder(output) as part:
        (part / "config.json").write_text("{}")
        output.mkdir()
        (output / "thesis.tex").write_text("years")
    assert (output / "thesis.tex").read_text() == "years"


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("old")
    (tmp_path / "latest").symlink_to("real")
    with atomic_folder(tmp_path / "latest", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be made"), atomic_folder(Path("/dev/null/x")):
        pass


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    params = {"a": np.float32([1.0, -1e5])}
    with pytest.raises(ModelError, match="a has values up to 100000, which float16 cannot hold"):
        save_params(tmp_path, Naming((Rule("a", "a", "d -> d"),)), params, dtypes="float16")


def test_weights_of_another_number_of_files_are_removed(tmp_path, params):
    target = tmp_path / "target"
    target.mkdir()
    save_params(target, Naming(RULES), params, dtypes="float32")
    save_params(target, Naming(RULES), params, dtypes="float32", max_shard_bytes=20_000)
    assert not (target / "model.safetensors").exists()
    assert len(list(target.glob("model-*.safetensors"))) > 1
    save_params(target, Naming(RULES), params, dtypes="float32")
    assert [file.name for file in target.iterdir()] == ["model.safetensors"]
