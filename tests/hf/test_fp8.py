"""Weights in blocks of FP8: decoded as they are read, whatever part of them that is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxft.errors import ModelError
from jaxft.hf import decoded as decoding
from jaxft.hf.load import load_params
from jaxft.hf.rules import Naming, Rule
from jaxft.hf.stored import tensor_dtypes
from tests.oracle.cases import FP8

RULES = (
    Rule("q", "layers.{layer}.q.weight", "(n h) d -> n h d"),
    Rule("o", "layers.{layer}.o.weight", "d (n h) -> d n h"),
    Rule("gate", "layers.{layer}.gate_up.weight", "(+ f) d -> f d"),
    Rule("up", "layers.{layer}.gate_up.weight", "(+ f) d -> f d"),
    Rule("norm", "layers.{layer}.norm.weight", "d -> d"),
)
SHAPES = {"q": (2, 3, 8, 24), "o": (2, 24, 3, 8), "gate": (2, 20, 24), "up": (2, 20, 24)}
SHAPES["norm"] = (2, 24)


def decoded(codes: np.ndarray, factors: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns float32 values of a matrix by the format's definition, rounded to bfloat16."""
    sign, exponent, mantissa = 1.0 - 2 * (codes >> 7), codes >> 3 & 15, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)
    out = np.empty(codes.shape, np.float32)
    for row, column in np.ndindex(codes.shape):
        factor = factors[row // block[0], column // block[1]]
        out[row, column] = np.float32(sign[row, column] * values[row, column]) * factor
    return out.astype(ml_dtypes.bfloat16).astype(np.float32)


def write(folder: Path, tensors: dict[str, np.ndarray], block: list[int] | None) -> None:
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps({"quantization_config": method}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_fp8(random: np.random.RandomState, name: str, shape: tuple[int, int], block) -> dict:
    codes = random.randint(0, 127, size=shape) + 128 * random.randint(2, size=shape)  # no NaN
    grid = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    factors = np.exp(random.normal(size=grid)).astype(np.float32)
    values = codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": factors}


def two_layers(block: tuple[int, int]) -> tuple[dict, dict]:
    """Returns tensors of files, and what they stand for."""
    random, tensors, expected = np.random.RandomState(0), {}, {}
    for layer in range(2):
        for name, shape in (("q", (24, 24)), ("o", (24, 24)), ("gate_up", (40, 24))):
            full = f"layers.{layer}.{name}.weight"
            made = in_fp8(random, full, shape, block)
            tensors |= made
            bits = made[full].view(np.uint8).astype(int)
            expected[full] = decoded(bits, made[f"{full}_scale_inv"], block)
        full = f"layers.{layer}.norm.weight"
        tensors[full] = expected[full] = random.normal(size=24).astype(np.float32)
    return tensors, expected


@pytest.mark.parametrize("block", [(8, 16), (5, 7), (128, 128)])
@pytest.mark.parametrize(
    ("dtype", "axes"),
    [(jnp.float32, {"o": 1, "q": 3, "gate": 2, "up": 1}), (jnp.bfloat16, {})],
)
def test_any_part_of_a_matrix_in_fp8_is_what_its_format_defines(
    tmp_path, monkeypatch, block, dtype, axes
):
    """Whole and split over devices, a few values at a time; some blocks divide no side."""
    tensors, stored = two_layers(block)
    write(tmp_path, tensors, list(block))
    monkeypatch.setattr(decoding, "_VALUES", 50)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    specs = {}
    for path, shape in SHAPES.items():
        entries: list = [None] * len(shape)
        if path in axes:
            entries[axes[path]] = "fsdp"
        sharding = NamedSharding(mesh, PartitionSpec(*entries))
        specs[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    params = load_params(tmp_path, Naming(RULES), specs)
    for layer in range(2):
        of_layer = {path: np.asarray(value[layer], np.float32) for path, value in params.items()}
        found = {
            "q": of_layer["q"].reshape(24, 24),
            "o": of_layer["o"].reshape(24, 24),
            "gate_up": np.concatenate([of_layer["gate"], of_layer["up"]]),
            "norm": of_layer["norm"],
        }
        for name, values in found.items():
            wanted = stored[f"layers.{layer}.{name}.weight"].astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(values, wanted, err_msg=name)


def test_every_code_is_what_transformers_makes_of_it(tmp_path):
    with np.load(FP8) as numbers:
        codes, factors, values = (numbers[name] for name in ("codes", "factors", "values"))
    block = [a // b for a, b in zip(codes.shape, factors.shape, strict=True)]
    name = "layers.0.up.weight"
    tensors = {name: codes.view(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": factors}
    write(tmp_path, tensors, block)
    assert tensor_dtypes(tmp_path) == {name: "bfloat16"}
    spec = jax.ShapeDtypeStruct((1, *codes.shape), jnp.float32)
    params = load_params(
        tmp_path, Naming((Rule("up", "layers.{layer}.up.weight", "f d -> f d"),)), {"up": spec}
    )
    np.testing.assert_array_equal(params["up"][0], values)
    np.testing.assert_array_equal(decoded(codes.astype(int), factors, tuple(block)), values)


def test_factors_that_do_not_fit_and_codes_without_any_are_errors(tmp_path):
    tensors, _ = two_layers((8, 16))
    name = "layers.1.q.weight_scale_inv"
    specs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    for changed, complaint in (
        (np.ones((9, 9), np.float32), r"layers\.1\.q\.weight has shape .* and factors \[9, 9\]"),
        (tensors[name].astype(np.float16), r"with factors in F16; expected F8_E4M3 with factors"),
        (None, r"layers\.1\.q\.weight is stored as F8_E4M3; expected one of"),
    ):
        changes = {} if changed is None else {name: changed}
        rest = {key: value for key, value in tensors.items() if key != name}
        write(tmp_path, rest | changes, [8, 16])
        with pytest.raises(ModelError, match=complaint):
            load_params(tmp_path, Naming(RULES), specs)
