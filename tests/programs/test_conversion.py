"""What `jaxft convert --check` says of models that fit, and of every way in which one does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import cli
from jaxft.errors import ModelError
from jaxft.programs.conversion import check, describe
from tests.hf.test_hub import REPOS, Server
from tests.hf.test_hub import server as server
from tests.oracle.cases import CASES, write_folder
from tests.tiny_run import write_base

Q = "model.layers.{layer}.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder("gqa", tmp_path)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def states(folder: Path) -> dict[str, str]:
    """Returns what is the matter with each line that is not ok, by the name of its tensors."""
    return {line.theirs: line.state for line in check(folder).lines if line.state != "ok"}


def test_a_model_that_fits_is_listed_rule_by_rule(folder):
    found = check(folder, dtypes="bfloat16")
    assert found.fits
    [line] = [line for line in found.lines if line.ours == "layers.attn.q.w"]
    assert line.cells() == (
        "layers.attn.q.w", "2×4×8×32", "bfloat16", Q, "(n h) d -> n h d", "32×32", "float32", "ok",
    )  # fmt: skip
    tensors = load_file(folder / "model.safetensors")
    assert found.parameters == sum(value.size for value in tensors.values())
    assert found.stored_bytes == sum(value.nbytes for value in tensors.values())
    assert found.loaded_bytes == 2 * found.parameters
    text = describe(found).splitlines()
    assert text[-1].endswith("Everything fits.")
    assert len(text) == len(found.lines) + 3


def test_all_that_does_not_fit_is_in_the_table(folder):
    def change(tensors):
        for layer in range(2):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
            tensors[f"model.layers.{layer}.extra"] = np.ones(3, np.float32)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        tensors["model.embed_tokens.weight"] = np.ones((65, 32), np.float32)
        tensors["model.norm.weight"] = np.ones(32, np.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, change)
    assert states(folder) == {
        "model.layers.{layer}.mlp.up_proj.weight": "MISSING model.layers.{0-1}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight": "MISSING model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight": ("WRONG: has shape [65, 32]; config.json asks for [64, 32]."),
        "model.norm.weight": "WRONG: is stored as I8; expected one of F64, F32, F16, BF16.",
        "model.layers.{0-1}.extra": "UNEXPECTED",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "ignored",
    }
    found = check(folder)
    assert not found.fits
    assert describe(found).endswith("Lines that do not fit: 5.")


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_a_copy(tmp_path):
    write_folder("mqa_tied", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert states(tmp_path) == {
        "lm_head.weight": "copy of model.embed_tokens.weight (values not compared)"
    }
    assert check(tmp_path).fits  # its values are not read


def test_weights_are_not_read(folder):
    file = folder / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    size = file.stat().st_size
    with file.open("r+b") as stream:  # only the header is left, the rest is a hole
        stream.truncate(8 + length)
        stream.truncate(size)
    assert check(folder).fits


def test_a_file_that_is_not_there_is_a_problem(folder):
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "a.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = check(folder)
    assert not found.fits
    assert "a.safetensors is named by model.safetensors.index.json" in describe(found)
    assert {line.state[:10] for line in found.lines} == {"UNREADABLE"}


def convert_check(repo: str, server: Server, home: Path, **environment) -> tuple[int, str]:
    """Runs the command in a process of its own: the Hub's client reads its settings once."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", "convert", "--check", repo],
        env=os.environ | settings | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow(seconds=6)
def test_of_a_repository_only_headers_are_asked_for(folder, server, tmp_path, monkeypatch):
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    monkeypatch.setitem(REPOS, "org/llama", files)
    home = tmp_path / "home"
    status, text = convert_check("org/llama", server, home)
    assert status == 0, text
    assert "Everything fits." in text
    assert not list(home.rglob("*.safetensors"))
    status, text = convert_check("org/llama", server, home, HF_HUB_OFFLINE="1")
    assert status == 1
    assert "HF_HUB_OFFLINE is set" in text


@pytest.mark.slow(seconds=2)
def test_a_repository_of_pickled_weights_says_how_to_convert_them(
    folder, server, tmp_path, monkeypatch
):
    files = {"config.json": (folder / "config.json").read_bytes(), "pytorch_model.bin": b"pickle"}
    monkeypatch.setitem(REPOS, "org/bin", files)
    status, text = convert_check("org/bin", server, tmp_path / "home")
    assert status == 1
    assert "save_pretrained" in text


def test_an_unsupported_family_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["gqa"] | {"model_type": "bert"}))
    with pytest.raises(ModelError, match="'bert' is not supported"):
        check(tmp_path)


def test_a_real_model_fits(shared):
    found = check(shared / "models" / "stories260K")
    assert found.fits
    assert found.parameters == 260_032


def test_a_model_is_written_in_another_type(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    output = tmp_path / "out"
    assert cli.main(["convert", str(base), f"--output={output}", "--dtype=bfloat16"]) == 0
    assert f"Wrote {output}." in capsys.readouterr().out
    assert {dtype for line in check(output).lines for dtype in line.dtypes} == {"bfloat16"}


def test_wrong_usage_is_refused(tmp_path, capsys):
    for arguments in ([], ["--check", "--output=x"]):
        assert cli.main(["convert", str(tmp_path), *arguments]) == 2
        assert "Give --check or --output" in capsys.readouterr().err
    for flag in ("--dtype=bfloat16", "--overwrite"):
        assert cli.main(["convert", str(tmp_path), "--check", flag]) == 2
        assert "writes nothing" in capsys.readouterr().err
