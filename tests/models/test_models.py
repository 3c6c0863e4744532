"""The decoder that families share: its config, its numerics and the way it is compiled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.config import ObjectiveConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.models.config import LayerKind, Numerics, make_numerics, runs_of
from jaxft.models.families import architecture_from_hf
from jaxft.models.layers import RMSNorm
from jaxft.models.module import init_params, merge
from jaxft.models.rope import Rope, rotary_tables, rotate
from jaxft.training.objectives.bound import bind
from tests.oracle.cases import CASES
from tests.tiny import judge, load_tiny, make_documents, pack, relative_error


def summed_loss(tiny, batch: Batch, chunk: int = 0):
    """Returns a function of parameters that gives the summed loss, and the logits beside it."""

    def total(params):
        model = tiny.merge(params)
        logits = model(batch.tokens, batch.positions, batch.segments)
        return judge(model, batch, chunk=chunk).minimised, logits

    return total


@pytest.fixture(scope="module")
def stories(shared):
    return jaxft.load(shared / "models" / "stories260K")


def test_a_pre_trained_model_gives_the_golden_logits(shared, stories):
    golden = np.load(shared / "models" / "stories260K" / "golden" / "logits_golden.npz")
    assert stories.parameters == 260_032
    logits = stories(golden["input_ids"][None])[0]
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.slow(seconds=2)
def test_a_pre_trained_model_continues_with_the_golden_text(shared, stories):
    golden = (shared / "models" / "stories260K" / "golden" / "greedy_200_runc.txt").read_text()
    assert stories.generate("", max_new_tokens=200).strip() == golden.strip()


def problems_of(config) -> list[str]:
    with pytest.raises(ModelError) as error:
        architecture_from_hf(config)
    return error.value.problems


def test_every_problem_of_a_config_is_named_at_once():
    config = CASES["gqa"] | {
        "hidden_act": "gelu",
        "attention_bias": True,
        "soft_cap": 30.0,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    }
    del config["rms_norm_eps"], config["vocab_size"]
    problems = "\n".join(problems_of(config))
    for part in (
        "no 'vocab_size'",
        "no 'rms_norm_eps'",
        "hidden_act is 'gelu'; only 'silu'",
        "attention_bias is True; only False",
        "'soft_cap' (30.0) is not understood",
        "rope scaling 'dynamic' with ['factor'] is not supported",
        "llama3 with factor, high_freq_factor, low_freq_factor",
    ):
        assert part in problems
    assert len(problems.splitlines()) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple .* 3"),
        ({"head_dim": 7}, "head size 7 is odd"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; expected a positive whole"),
        ({"vocab_size": "64"}, "vocab_size is '64'; expected a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "4", "rope_theta": 1e4}},
            "rope scaling has {'factor': '4'}; expected positive numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "rope_theta": 1e4}},
            "rope scaling has {'factor': None}; expected positive numbers",
        ),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is None; expected a number above"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size 30 is not a multiple .* 4"),
        ({"rope_interleaved": True}, "rope_interleaved is True; only False"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
            "rope scaling 'llama3' with \\['factor'\\] is not supported",
        ),
        ({"model_type": "lama"}, "'lama' is not supported; supported are .*llama"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(changes, message):
    (problem,) = problems_of(CASES["gqa"] | changes)
    assert re.search(message, problem)


def test_absent_fields_of_a_config_mean_what_transformers_means():
    config = dict(CASES["gqa"])
    for name in ("head_dim", "num_key_value_heads", "rope_parameters", "tie_word_embeddings"):
        del config[name]
    decoder = architecture_from_hf(config).config
    assert (decoder.head_dim, decoder.kv_heads, decoder.tied) == (8, 4, False)
    assert decoder.kinds == (LayerKind(rope=Rope(10000.0, 8)),)
    assert decoder.pattern == (0, 0)


@pytest.fixture(scope="module")
def batch() -> Batch:
    documents = make_documents([9, 14, 20, 5, 3, 24], CASES["gqa"]["vocab_size"])
    return pack([documents[:2], documents[2:5], documents[5:]], 28)


@functools.cache
def step_of(numerics: Numerics, layers: int = 2):
    """Returns a tiny model and its jitted loss and gradients, to be called with a batch."""
    tiny = load_tiny("gqa", numerics, num_hidden_layers=layers)

    def step(params, batch):
        return jax.value_and_grad(summed_loss(tiny, batch), has_aux=True)(params)

    return tiny, jax.jit(step)


@pytest.mark.slow(seconds=5, but=r"^full-$")
@pytest.mark.parametrize(
    ("remat", "offload"),
    [
        ("dots", ""),
        ("full", ""),
        ("qkv+attention", ""),
        ("full", "inputs"),
        ("qkv+mlp_out", "inputs+qkv"),
    ],
)
def test_rematerialisation_does_not_change_the_result(batch, remat, offload):
    tiny, plain = step_of(Numerics())
    _, checkpointed = step_of(Numerics(remat=remat, offload=offload))
    found, expected = checkpointed(tiny.params, batch), plain(tiny.params, batch)
    assert relative_error(found, expected) < 1e-5


def test_each_rematerialisation_policy_keeps_less_for_the_backward_pass(batch):
    kept = {}
    for remat in ("none", "dots", "full"):
        tiny, _ = step_of(Numerics(remat=remat))

        def total(params, tiny=tiny):
            return bind(ObjectiveConfig(chunk=0)).judge(tiny.merge(params), batch).terms.total

        _, backward = jax.eval_shape(functools.partial(jax.vjp, total), tiny.params)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    assert kept["full"] < 0.8 * kept["dots"] < 0.8 * 0.8 * kept["none"]


# A bfloat16 number is typically off by 2^-9 of itself, and what a weight's gradient is made of has
# been rounded some hundred times: 2^-9 * sqrt(100) is 2 per cent, more where differences are taken,
# as in the softmax. The loss is a mean over dozens of tokens whose errors are independent.
@pytest.mark.slow(seconds=3, but=r"^mixed$")
@pytest.mark.parametrize("dtypes", ["mixed", "bfloat16"])
def test_bfloat16_compute_gives_nearly_the_loss_of_float32(batch, dtypes):
    tiny, plain = step_of(Numerics())
    (exact, _), exact_gradients = plain(tiny.params, batch)
    low, step = step_of(make_numerics(dtypes))
    (total, logits), gradients = step(low.params, batch)
    assert abs(float(total) / float(exact) - 1) < 0.002
    assert logits.dtype == jnp.float32
    for path, gradient in gradients.items():
        assert gradient.dtype == low.params[path].dtype
        difference = np.linalg.norm(np.float32(gradient) - exact_gradients[path])
        assert difference < 0.05 * np.linalg.norm(exact_gradients[path]), path


@pytest.mark.parametrize(
    ("dtypes", "param", "compute"),
    [
        ("float32", jnp.float32, jnp.float32),
        ("mixed", jnp.float32, jnp.bfloat16),
        ("bfloat16", jnp.bfloat16, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("case", ["gqa", "mqa_tied"])
def test_a_dtype_policy_means_what_it_says(batch, case, dtypes, param, compute):
    numerics = make_numerics(dtypes)
    abstract = architecture_from_hf(CASES[case]).abstract(numerics)
    assert {spec.dtype for spec in abstract.params.values()} == {jnp.dtype(param)}

    def outputs(params):
        model = merge(abstract.graphdef, params)
        hidden, _ = model.hidden(batch.tokens, batch.positions, batch.segments)
        return hidden, model.logits(hidden), model.init_cache(2, 8).layers[0].k

    hidden, logits, cache = jax.eval_shape(outputs, abstract.params)
    assert (hidden.dtype, logits.dtype, cache.dtype) == (compute, jnp.float32, compute)


def assert_rounded_once(found, exact):
    """A bfloat16 number that was rounded once is off by at most 2^-8 of itself."""
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert np.all(error <= 1.001 * 2.0**-8 * np.abs(exact) + 1e-6)


def test_norms_and_rotations_of_bfloat16_are_computed_in_float32():
    x = jnp.asarray(np.random.RandomState(0).randn(2, 5, 3, 8), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    norm = RMSNorm(8, epsilon=1e-5, dtype=jnp.bfloat16)
    assert_rounded_once(norm(x), exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5))
    positions = np.array([[0, 1, 2, 3, 100]] * 2, np.int32)
    cos, sin = rotary_tables(Rope(10000.0, 8), positions, positions)
    angles = positions[:, :, None, None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    first, second = exact[..., :4], exact[..., 4:]
    turned = (first + 1j * second) * np.exp(1j * angles)
    rotated = rotate(x, cos, sin)
    assert_rounded_once(rotated[..., :4], turned.real)
    assert_rounded_once(rotated[..., 4:], turned.imag)


def equations(jaxpr):
    """Yields every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_layers_are_scanned_so_that_programs_do_not_grow_with_them(batch):
    sizes = []
    for layers in (2, 7):
        abstract = load_tiny("gqa", num_hidden_layers=layers).abstract
        jaxpr = jax.make_jaxpr(
            lambda params, graphdef: merge(graphdef, params)(batch.tokens), static_argnums=1
        )(abstract.params, abstract.graphdef)
        found = list(equations(jaxpr.jaxpr))
        (scan,) = [e for e in found if e.primitive.name == "scan"]
        assert scan.params["length"] == layers
        sizes.append(len(found))
    assert sizes[0] == sizes[1] > 50


@pytest.mark.slow(seconds=5)
def test_random_parameters_have_the_configured_scale_and_depend_on_the_seed():
    architecture = architecture_from_hf(CASES["gqa"] | {"initializer_range": 0.5})
    init = jax.jit(functools.partial(init_params, architecture.build(Numerics())), static_argnums=0)
    params, other = init(0), init(1)
    for path, value in params.items():
        if path.endswith("scale"):
            assert np.all(value == 1), path
            continue
        assert abs(float(jnp.std(value)) - 0.5) < 0.05, path
        assert not np.allclose(value, other[path]), path
        if path.startswith("layers."):
            assert not np.allclose(value[0], value[1]), path


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ("aaaa", [[range(4)]]),
        ("aabaab", [[range(0, 6, 3), range(1, 6, 3), range(2, 6, 3)]]),
        ("dddmmmm", [[range(3)], [range(3, 7)]]),
        ("abababc", [[range(0, 6, 2), range(1, 6, 2)], [range(6, 7)]]),
        ("a", [[range(1)]]),
    ],
)
def test_layers_are_cut_into_runs_of_recurring_groups(blocks, runs):
    found = runs_of(tuple(blocks))
    assert found == tuple(map(tuple, runs))
    assert sorted(n for run in found for part in run for n in part) == list(range(len(blocks)))
