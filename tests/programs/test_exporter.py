"""Writing folders that other tools load."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import jaxft
from jaxft.errors import JaxftError, ModelError
from jaxft.hf import decoded
from jaxft.hf.rules import expand
from jaxft.models.config import make_numerics
from jaxft.models.families import architecture_from_hf
from tests.oracle.cases import CASES, write_folder
from tests.tiny_run import tiny_config, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("exporter") / "base")


def quiet(text: str) -> None:
    pass


def test_an_untouched_model_leaves_as_it_came_byte_for_byte(base, tmp_path):
    # Mixed types, as some published models have: norms in float32 beside bfloat16 matrices.
    tensors = {
        name: tensor if "norm" in name else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in base.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_file(tensors, mixed / "model.safetensors")
    output = jaxft.export(mixed, tmp_path / "out", on_log=quiet)
    exported = load_file(output / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype, name
        assert exported[name].tobytes() == tensor.tobytes(), name
    assert json.loads((output / "config.json").read_text()) == json.loads(
        (mixed / "config.json").read_text()
    )


@pytest.mark.slow(seconds=2)
def test_real_models_leave_as_they_came(shared, tmp_path):
    source = shared / "models/stories260K"
    output = jaxft.export(source, tmp_path / "out", verify=True, on_log=quiet)
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, output))
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)
    with safe_open(output / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_and_the_template_go_with_the_weights(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, output))
    messages = [{"role": "user", "content": "say abc"}]
    assert before.apply_chat_template(messages) == after.apply_chat_template(messages)
    assert after.chat_template == before.chat_template


def test_every_stop_token_is_in_the_generation_config(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    stops = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    # The end of a turn, which the config.json of this base does not name.
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<end>") in stops
    assert set(jaxft.load(output).stop_ids) == set(stops)


def test_another_dtype_is_written_and_named(base, tmp_path):
    lines: list[str] = []
    output = jaxft.export(
        base, tmp_path / "out", dtype="bfloat16", verify=True, on_log=lines.append
    )
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    config = json.loads((output / "config.json").read_text())
    assert {config.get(name, "bfloat16") for name in ("dtype", "torch_dtype")} == {"bfloat16"}
    assert re.search(
        "each is equal once rounded to bfloat16.*largest difference of logits", lines[-1], re.I
    )


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("named", ["bfloat16", None])
def test_random_weights_leave_in_the_type_that_config_json_names(tmp_path, named):
    config = tiny_config(tmp_path, train__steps=2, model__random_init=True)
    described = json.loads((tmp_path / "base/config.json").read_text())
    described = {k: v for k, v in described.items() if k not in ("dtype", "torch_dtype")}
    described |= {"torch_dtype": named} if named else {}
    (tmp_path / "base/config.json").write_text(json.dumps(described))
    result = jaxft.train(config)
    lines: list[str] = []
    output = jaxft.export(result.workdir, tmp_path / "out", verify=True, on_log=lines.append)
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}
    written = json.loads((output / "config.json").read_text())
    assert written == described | ({"torch_dtype": "float32"} if named else {})
    count = sum(tensor.size for tensor in tensors.values())
    assert lines[-1] == (
        f"Verified: compared all {count:,} weights of checkpoint 2 of {result.workdir} with those "
        "of the export, loaded again, and logits of 128 random tokens. All are equal."
    )


def test_verification_notices_weights_that_no_token_of_it_uses(base, tmp_path, monkeypatch):
    from jaxft.programs import exporter

    def damaged(folder, rules, params, **options):
        weights = params["embed.w"][slice(0, 64), slice(0, 32)].copy()
        weights[63, 5] += 1e-3
        return real(folder, rules, params | {"embed.w": weights}, **options)

    real = exporter.save_params
    monkeypatch.setattr(exporter, "save_params", damaged)
    with pytest.raises(ModelError, match=r"embed\.w differs by up to 0\.001"):
        jaxft.export(base, tmp_path / "out", verify=True, on_log=quiet)


def test_a_model_without_tokenizer_is_exported_without(base, tmp_path):
    source = tmp_path / "bare"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(base / name, source / name)
    lines: list[str] = []
    output = jaxft.export(source, tmp_path / "out", verify=True, on_log=lines.append)
    assert "has no tokenizer; the export has none either" in lines[0]
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in output.iterdir()} == files


def test_a_folder_is_not_overwritten_unless_asked(base, tmp_path):
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    with pytest.raises(JaxftError, match="out"):
        jaxft.export(base, output, on_log=quiet)
    jaxft.export(base, output, overwrite=True, on_log=quiet)


def test_verification_notices_other_weights(base, tmp_path, monkeypatch):
    from jaxft.programs import exporter

    def damaged(folder, rules, params, **options):
        weights = params["layers.attn.q.w"]
        weights = weights[tuple(slice(0, size) for size in weights.shape)]
        return real(folder, rules, params | {"layers.attn.q.w": weights[::-1]}, **options)

    real = exporter.save_params
    monkeypatch.setattr(exporter, "save_params", damaged)
    with pytest.raises(ModelError, match=r"other weights than .*base: layers\.attn\.q\.w differs"):
        jaxft.export(base, tmp_path / "out", verify=True, on_log=quiet)


def test_nothing_is_left_of_an_export_that_failed(base, tmp_path, monkeypatch):
    from jaxft.programs import exporter

    def failing(*args, **kwargs):
        raise ModelError("the disk is full")

    monkeypatch.setattr(exporter, "save_tokenizer", failing)
    with pytest.raises(ModelError):
        jaxft.export(base, tmp_path / "out", on_log=quiet)
    assert not (tmp_path / "out").exists()


# Kills the process before a file gets its name: the count tells which.
KILLED = """
import functools, os, signal, sys
from jaxft.programs import exporter
from jaxft.hf.save import save_params

left = int(sys.argv[3])

def hook(event, _):
    global left
    if event == "os.rename":
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

exporter.save_params = functools.partial(save_params, max_shard_bytes=20_000)
sys.addaudithook(hook)
exporter.export(sys.argv[1], sys.argv[2])
"""


# The sixth rename is the folder's: what it was made of is no longer said in it, so nothing is kept.
@pytest.mark.slow(seconds=4, but=r"^3-2-2$")
@pytest.mark.parametrize(("renames", "complete", "kept"), [(1, 0, 0), (3, 2, 2), (6, 5, 0)])
def test_an_export_that_was_killed_goes_on_with_its_complete_files(
    base, tmp_path, monkeypatch, renames, complete, kept
):
    from jaxft.programs import exporter

    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(output), str(renames)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    [unfinished] = tmp_path.iterdir()
    times = {f.name: f.stat().st_mtime_ns for f in unfinished.glob("*.safetensors")}
    assert len(times) == complete
    small = functools.partial(exporter.save_params, max_shard_bytes=20_000)
    monkeypatch.setattr(exporter, "save_params", small)
    lines: list[str] = []
    jaxft.export(base, output, on_log=lines.append)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    same = times.items() & {f.name: f.stat().st_mtime_ns for f in output.iterdir()}.items()
    assert len(same) == kept
    assert lines == [f"Files of weights that an earlier export had written: {kept}."] * bool(kept)
    expected = load_file(base / "model.safetensors")
    found = {}
    for file in output.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    files = {file.name for file in output.iterdir() if file.suffix != ".safetensors"}
    assert files == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


@pytest.mark.slow(seconds=6)
def test_an_unfinished_export_of_other_weights_is_not_used(base, tmp_path, monkeypatch):
    from jaxft.programs import exporter

    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base, source)
    command = [sys.executable, "-c", KILLED, str(source), str(output), "3"]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -signal.SIGKILL
    tensors = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    small = functools.partial(exporter.save_params, max_shard_bytes=20_000)
    monkeypatch.setattr(exporter, "save_params", small)
    jaxft.export(source, output, on_log=quiet)
    found = {}
    for file in output.glob("*.safetensors"):
        found |= load_file(file)
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_a_tied_head_that_was_stored_twice_is_written_twice(base, tmp_path):
    source = tmp_path / "tied"
    shutil.copytree(base, source)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / "model.safetensors")
    output = jaxft.export(source, tmp_path / "out", on_log=quiet)
    found = load_file(output / "model.safetensors")
    assert found.keys() == tensors.keys()
    np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.slow(seconds=5)
def test_experts_in_mxfp4_are_written_unpacked(base, tmp_path):
    source = tmp_path / "packed"
    shutil.copytree(base, source)
    config = CASES["gpt_oss_gqa"] | {
        "hidden_size": 64,
        "intermediate_size": 32,
        "quantization_config": {"quant_method": "mxfp4"},
    }
    (source / "config.json").write_text(json.dumps(config))
    architecture = architecture_from_hf(config)
    abstract = architecture.abstract(make_numerics("float32")).params
    shapes = {path: spec.shape for path, spec in abstract.items()}
    random = np.random.default_rng(0)
    tensors, expected = {}, {}
    for tensor in expand(architecture.naming.rules, shapes):
        if not tensor.name.endswith(("gate_up_proj", "down_proj")):
            values = random.standard_normal(tensor.shape).astype(ml_dtypes.bfloat16)
            tensors[tensor.name] = expected[tensor.name] = values
            continue
        experts, columns, rows = tensor.shape
        blocks = random.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = random.integers(120, 130, blocks.shape[:-1], np.uint8)
        tensors |= {f"{tensor.name}_blocks": blocks, f"{tensor.name}_scales": scales}
        expected[tensor.name] = unpacked(blocks, scales)
    save_file(tensors, source / "model.safetensors")
    lines: list[str] = []
    output = jaxft.export(source, tmp_path / "out", verify=True, on_log=lines.append)
    assert "written unpacked" in lines[0]
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[name].astype(np.float32), values, err_msg=name)
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


def test_weights_in_fp8_are_written_decoded_as_are_layers_that_guess(tmp_path, monkeypatch):
    """Routers, norms and corrections are in other types; a layer behind the last is in FP8 too."""
    monkeypatch.setattr(decoded, "_VALUES", 100)  # so that they pass in pieces
    source = write_folder("deepseek_v3_published", tmp_path)
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 16]}
    config = CASES["deepseek_v3_published"] | {"quantization_config": method}
    (source / "config.json").write_text(json.dumps(config))
    tensors, expected = {}, {}
    for name, values in load_file(source / "model.safetensors").items():
        if values.ndim < 2 or "gate.weight" in name or "embed" in name or "head" in name:
            tensors[name] = expected[name] = values
            continue
        sides = zip(values.shape, (8, 16), strict=True)
        factors = np.full([-(-size // side) for size, side in sides], 0.03125, np.float32)
        factors[-1, -1] = 0.3
        spread = np.repeat(np.repeat(factors, 8, 0), 16, 1)[: len(values), : values.shape[1]]
        codes = (values / spread).astype(ml_dtypes.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": factors}
        expected[name] = (codes.astype(np.float32) * spread).astype(ml_dtypes.bfloat16)
    name = "model.layers.{}.self_attn.o_proj.weight"
    for end in ("", "_scale_inv"):
        tensors[name.format(2) + end] = tensors[name.format(1) + end]
    expected[name.format(2)] = expected[name.format(1)]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    output = jaxft.export(source, tmp_path / "out", verify=True, on_log=lines.append)
    assert lines[:2] == [
        "Tensors beside the model, which are written as they are, those in FP8 decoded: 1.",
        "Weights were stored in FP8; they are written unpacked.",
    ]
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    written = json.loads((output / "config.json").read_text())
    assert written == CASES["deepseek_v3_published"]


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns float32 `[E, columns, rows]`, by the formats' definition, a value at a time."""
    halves = np.stack([blocks & 15, blocks >> 4], axis=-1).astype(int)
    sign, exponent, mantissa = 1 - 2 * (halves >> 3), halves >> 1 & 3, halves & 1
    small = mantissa * 0.5
    normal = (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
    values = sign * np.where(exponent == 0, small, normal)
    values = values * 2.0 ** (scales.astype(int) - 127)[..., None, None]
    return values.reshape(*blocks.shape[:2], -1).swapaxes(1, 2).astype(np.float32)


@pytest.mark.slow(seconds=2)
def test_logits_of_the_export_are_those_of_the_model(base, tmp_path):
    tokens = np.arange(12).reshape(2, 6)
    output = jaxft.export(base, tmp_path / "out", on_log=quiet)
    assert np.array_equal(jaxft.load(base)(tokens), jaxft.load(output)(tokens))


def test_what_is_exported_is_not_deleted_by_its_own_export(tmp_path, shared):
    base = tmp_path / "base"
    shutil.copytree(shared / "models" / "stories260K", base)
    (tmp_path / "config.json").write_text("{}")
    for output in (tmp_path, base):
        with pytest.raises(ModelError, match="holds what is exported"):
            jaxft.export(base, output, overwrite=True)
    assert (base / "model.safetensors").is_file()


def test_what_corrects_the_choice_of_experts_keeps_its_type(tmp_path):
    source = write_folder("deepseek_v3_published", tmp_path)
    output = jaxft.export(source, tmp_path / "out", dtype="bfloat16", on_log=lambda text: None)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, output))
    types = {name: value.dtype.name for name, value in after.items()}
    corrections = {name for name in before if name.endswith("e_score_correction_bias")}
    assert corrections
    for name, kind in types.items():
        assert kind == ("float32" if name in corrections else "bfloat16"), name
    assert all(np.array_equal(before[name], after[name]) for name in corrections)
