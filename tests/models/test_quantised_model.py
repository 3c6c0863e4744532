"""A model whose layers' weights are in codes: its values, what travels, what is kept and held."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.compiled.collectives import collectives
from jaxft.compiled.layout import describe, make_program
from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models import quantised
from jaxft.models.config import make_numerics
from jaxft.models.families import Architecture, architecture_from_hf
from jaxft.models.module import init_params, merge
from jaxft.planner.placed import Placed
from jaxft.training import adaptation
from jaxft.training.program import Program, make_placement

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "vocab_size": 64,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def run_of(hf: dict, kind: str, **mesh: int) -> tuple[RunConfig, Architecture]:
    config = RunConfig(strategy="fsdp_ep" if "expert" in mesh else "fsdp")
    config.adapter.rank, config.model.quantise, config.model.dtypes = 4, kind, "float32"
    config.data.max_length, config.train.batch_size = 16, 8
    for axis, size in mesh.items():
        setattr(config.mesh, axis, size)
    plain = adaptation.adapted(architecture_from_hf(hf), config.adapter)
    return config, adaptation.quantised(plain, kind)


def program_of(hf: dict, kind: str, *, remat: str = "none", **mesh: int) -> Program:
    config, architecture = run_of(hf, kind, **mesh)
    config.model.remat = remat
    return make_program(config, architecture, placement=make_placement(config))


@pytest.mark.slow(seconds=10, but=r"^llama$")
@pytest.mark.parametrize("hf", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_a_model_in_codes_computes_what_one_of_decoded_weights_does(hf):
    """With gradients of what goes in; experts with and without a capacity."""
    numerics = make_numerics("float32")
    architecture = architecture_from_hf(hf)
    coded = dataclasses.replace(architecture, quantise="int8")
    abstract, plain = coded.abstract(numerics), architecture.abstract(numerics)
    params = init_params(coded.build(numerics), 0)
    decoded = {
        path: quantised.decode(
            params[path.replace(".w", ".codes")], params[path.replace(".w", ".scales")], jnp.float32
        )
        if path not in params
        else params[path]
        for path in plain.params
    }
    assert {quantised.weight_of(path) for path in params} == set(plain.params)
    assert {path for path in params if path.endswith(".w")} == {
        path for path in plain.params if path.endswith(".w") and "norm" not in path
    } - {quantised.weight_of(path) for path in params if quantised.is_leaf(path)}
    tokens = np.random.RandomState(0).randint(0, 64, (2, 8)).astype(np.int32)

    def value(graphdef, params, table):
        logits = merge(graphdef, {**params, "embed.w": table})(tokens)
        return jnp.sum(jnp.sin(logits))

    found = jax.jit(jax.value_and_grad(lambda p, t: value(abstract.graphdef, p, t), 1))(
        params, params["embed.w"]
    )
    expected = jax.jit(jax.value_and_grad(lambda p, t: value(plain.graphdef, p, t), 1))(
        decoded, params["embed.w"]
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("hf", "kind", "mesh"),
    [
        (LLAMA, "nf4", {"fsdp": 4, "data": 2}),
        pytest.param(MIXTRAL, "fp8", {"fsdp": 4, "expert": 2}, marks=pytest.mark.slow(seconds=30)),
    ],
    ids=["llama", "mixtral"],
)
def test_codes_are_held_and_travel_and_nothing_decoded_is_kept(hf, kind, mesh):
    """With `remat='none'`, which keeps all else of a layer for its backward pass."""
    program = program_of(hf, kind, **mesh)
    compiled, evaluator = program.compile(), program.evaluator
    abstract, placement = evaluator.abstract, evaluator.placement
    placed = Placed(placement, abstract, 16)
    bits = {"nf4": 4, "fp8": 8}[kind]
    codes = {path: spec.shape for path, spec in abstract.params.items() if ".codes" in path}
    coded = {path: spec for path, spec in abstract.params.items() if quantised.is_leaf(path)}
    held = Placed(placement, dataclasses.replace(abstract, params=coded), 16).parameters
    cuts = {path: 8 if "mixtral" in hf.values() and "mlp" in path else 4 for path in codes}
    assert held == sum(
        math.prod(shape) * (bits + 16 / 64) / 8 / cuts[path] for path, shape in codes.items()
    )
    described = describe(program, model="model").bytes_per_device
    assert described["parameters"] == placed.parameters
    arguments = compiled.memory_analysis().argument_size_in_bytes
    held = described["parameters"] + described["optimizer"]
    assert 0 <= arguments - held < 4096  # the batch

    gathered = [
        size
        for found in collectives(compiled.as_text(), placement.mesh)
        if found.kind == "all-gather" and found.axes == ("fsdp",)
        for size in found.arrays
    ]
    # XLA for CPU sends a byte for each code of 4 bits and two for fp8; a float32 would take four.
    width = {"nf4": 1, "fp8": 2}[kind]
    whole = {path: (*shape[1:],) for path, shape in codes.items()}
    sizes = {width * math.prod(shape) * 4 // cuts[path] for path, shape in whole.items()}
    assert sizes <= set(gathered)
    assert max(gathered) == max(sizes)
    kept = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    }
    layers = hf["num_hidden_layers"]
    for path, shape in whole.items():
        experts = (shape[0] * 4 // cuts[path], *shape[1:])
        assert (layers, *shape) not in kept, path
        assert (layers, *experts) not in kept, path


def test_what_is_in_codes_cannot_train():
    config = RunConfig()
    config.model.path, config.model.quantise = "model", "nf4"
    config.validate(evaluation=True)
    with pytest.raises(ConfigError, match="nothing learns beside the quantised"):
        config.validate()
    config.adapter.train = "attn.q"
    architecture = adaptation.adapted(architecture_from_hf(LLAMA), config.adapter)
    with pytest.raises(
        ConfigError, match=r"matches layers\.attn\.q\.w, which model\.quantise 'nf4'"
    ):
        adaptation.quantised(architecture, "nf4")
