"""Attention: closed forms, packed documents, and the kernels that a CPU machine can still prove."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import splash_attention

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models import attention, splash
from jaxft.models.attention import (
    attend,
    causal_mask,
    check_backend,
    choose_backend,
)
from jaxft.models.config import LayerKind, Scoring
from jaxft.models.cudnn import MAX_SEGMENTS, segment_offsets
from jaxft.models.families import architecture_from_hf
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, Strategy, if_divisible
from jaxft.sharding.sequence import zigzag_order
from jaxft.training import program
from tests.oracle.cases import CASES
from tests.tiny import relative_error
from tests.tpu import compiles_for_tpu, tpu_devices


def random_qkv(shape=(2, 24), heads=(4, 2), head_dim=8, seed=0):
    random = np.random.RandomState(seed)
    sizes = (heads[0], heads[1], heads[1])
    return tuple(random.randn(*shape, n, head_dim).astype(np.float32) for n in sizes)


PLAIN = Scoring(scale=8**-0.5)


def closed_form(q, k, v, scores=PLAIN, sinks=None):
    """Causal attention of one document `[T, N, H]`, a head and a query at a time."""
    out = np.zeros_like(q)
    length, heads, _ = q.shape
    for head in range(heads):
        of_keys = head // (heads // k.shape[1])
        for t in range(length):
            seen = slice(max(0, t + 1 - scores.window) if scores.window else 0, t + 1)
            products = k[seen, of_keys] @ q[t, head] * scores.scale
            if scores.cap:
                products = scores.cap * np.tanh(products / scores.cap)
            weights = np.exp(products)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            out[t, head] = weights / total @ v[seen, of_keys]
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_grouped_heads_read_their_key_head(heads):
    q, k, v = random_qkv(heads=heads)
    out = attend(q, k, v, np.ones((2, 24), np.int32), backend="xla", scores=PLAIN)
    for row in range(2):
        np.testing.assert_allclose(out[row], closed_form(q[row], k[row], v[row]), atol=1e-5)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    "scores", [Scoring(0.2), Scoring(0.5, cap=0.8), Scoring(0.5, window=5), Scoring(0.7, 1.3, 1)]
)
def test_scale_bound_window_and_sinks_follow_their_formula(scores, with_sinks):
    q, k, v = random_qkv(seed=1)
    sinks = np.array([-1.0, 0.0, 0.5, 2.0], np.float32) if with_sinks else None
    segments = np.array([[1] * 24, [1] * 11 + [2] * 13], np.int32)
    out = attend(q, k, v, segments, backend="xla", scores=scores, sinks=sinks)
    for part in [(0, slice(None)), (1, slice(0, 11)), (1, slice(11, 24))]:
        expected = closed_form(q[part], k[part], v[part], scores, sinks)
        np.testing.assert_allclose(out[part], expected, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    q, k, v = random_qkv()
    segments = np.array([[1] * 7 + [2] * 9 + [3] * 8, [1] * 15 + [2] * 4 + [0] * 5], np.int32)
    out = attend(q, k, v, segments, backend="xla", scores=PLAIN)
    for row in range(2):
        for segment in range(1, segments[row].max() + 1):
            part = (row, segments[row] == segment)
            np.testing.assert_allclose(out[part], closed_form(q[part], k[part], v[part]), atol=1e-5)


def test_a_query_sees_keys_of_its_segment_in_its_own_slot_and_before():
    slots = np.array([3, 4])
    mask = causal_mask(slots, np.arange(6), np.array([[1, 2]]), np.array([[1, 1, 2, 1, 2, 2]]))
    expected = [[True, True, False, True, False, False], [False, False, True, False, True, False]]
    np.testing.assert_array_equal(mask, np.array(expected)[None, None])


documents_of_rows = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4)


@pytest.mark.slow(seconds=2)
@given(rows=documents_of_rows)
@settings(max_examples=15, deadline=None)
def test_offsets_and_lengths_name_every_segment(rows):
    length = 48
    segments = np.zeros((len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        numbers = np.repeat(np.arange(len(lengths)) + 1, lengths)
        segments[row, : len(numbers)] = numbers
    offsets, found = segment_offsets(jnp.asarray(segments))
    assert offsets.shape == (len(rows), MAX_SEGMENTS + 1)
    assert found.shape == (len(rows), MAX_SEGMENTS)
    assert offsets.dtype == found.dtype == jnp.int32
    for row, lengths in enumerate(rows):
        used, starts = len(lengths), np.cumsum([0, *lengths])[:-1]
        np.testing.assert_array_equal(found[row, :used], lengths)
        np.testing.assert_array_equal(offsets[row, :used], starts)
        assert np.all(np.asarray(found[row, used:]) == -1)
        assert np.all(np.asarray(offsets[row, used:]) == -1)


def test_the_binding_of_cudnn_sees_one_offset_for_each_segment_of_all_rows():
    """What reaches the kernel: it takes the segments of all rows as one list."""
    from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0], [0] * 8, [1, 2, 2, 2, 2, 3, 3, 3]])
    offsets, lengths = segment_offsets(segments)
    q = jnp.zeros((3, 8, 4, 16))
    k = jnp.zeros((3, 8, 2, 16))
    q_lengths, _, q_offsets, kv_offsets = _fix_seqlen_offsets(
        lengths, lengths, offsets, offsets, q, k
    )
    starts = np.array([0, 3, 16, 17, 21])
    np.testing.assert_array_equal(q_lengths.reshape(-1)[:5], [3, 2, 1, 4, 3])
    np.testing.assert_array_equal(q_offsets.reshape(-1)[:6], [*starts * 64, 24 * 64])
    np.testing.assert_array_equal(kv_offsets.reshape(-1)[:5], starts * 32)


def test_packed_rows_lower_to_the_kernel_of_cudnn_in_both_passes(monkeypatch):
    """The lowering asks the GPU for its versions; here a Hopper with a recent cuDNN answers."""
    from jax._src.cudnn import fused_attention_stablehlo as binding

    monkeypatch.setattr(binding, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(binding, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(binding, "is_cuda_compute_capability_equal", lambda capability: False)
    arrays = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in random_qkv((2, 256), head_dim=64)
    ]

    def total(q, k, v):
        out = attend(q, k, v, jnp.asarray(SEGMENTS), backend="cudnn", scores=Scoring(0.125))
        return jnp.sum(out.astype(jnp.float32))

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count(f"\\22max_seg_per_batch\\22: {MAX_SEGMENTS}") == 2
    assert text.count("PADDING_CAUSAL") == 2


DECODER = architecture_from_hf(CASES["gqa"] | {"head_dim": 128}).config
WINDOW = (LayerKind(window=512), LayerKind())
CHOICE = {
    "platform": "cpu",
    "length": 1024,
    "compute_dtype": jnp.bfloat16,
    "max_segments": 8,
    "compute_capability": "9.0",
}


@pytest.mark.parametrize(
    ("changes", "backend", "reason"),
    [
        ({}, "xla", "fastest that fits on cpu"),
        ({"platform": "gpu"}, "cudnn", "fastest that fits on gpu"),
        ({"platform": "gpu", "compute_capability": "8.0"}, "xla", "cudnn .*Hopper.* has 8.0"),
        ({"platform": "tpu"}, "splash", "fastest that fits on tpu"),
        ({"platform": "gpu", "compute_dtype": jnp.float32}, "xla", "cudnn .* compute is float32"),
        ({"platform": "gpu", "config.head_dim": 36}, "xla", "cudnn .* head size 36"),
        ({"platform": "gpu", "config.attention_cap": 50.0}, "xla", "cudnn .* bounds its scores"),
        ({"platform": "gpu", "config.sinks": True}, "xla", "cudnn .* attention sinks"),
        ({"platform": "gpu", "config.kinds": WINDOW}, "xla", "cudnn .* 1024 exceed .* \\[512\\]"),
        ({"platform": "gpu", "config.kinds": WINDOW, "length": 512}, "cudnn", "fastest"),
        ({"platform": "tpu", "config.kinds": WINDOW, "config.sinks": True}, "splash", "fastest"),
        ({"platform": "gpu", "max_segments": 65}, "xla", "cudnn .* a row holds 65 .* takes 64"),
        ({"platform": "tpu", "length": 1000}, "xla", "splash .* 1000 is not a multiple of 128"),
        ({"platform": "tpu", "length": 640}, "xla", "splash .* 640 is over 512 and not"),
        ({"platform": "tpu", "config.head_dim": 80}, "xla", "splash .* head size 80"),
        ({"parts": 2}, "ring", "fastest that fits on cpu"),
        ({"parts": 4, "platform": "tpu"}, "splash", "fastest that fits on tpu"),
        ({"parts": 16, "platform": "tpu"}, "ring", "splash .* 1024, over 16 devices 64, .* of 128"),
        ({"parts": 8, "platform": "gpu"}, "ring", "cudnn .* splits each row over 8 devices"),
        ({"parts": 2, "length": 2056}, "xla", "ring .* 2056 over 4 chunks is 514, over 512 and"),
    ],
)
def test_auto_takes_the_fastest_possible_back_end_and_says_why(changes, backend, reason):
    fields = {name[7:]: value for name, value in changes.items() if name.startswith("config.")}
    others = {name: value for name, value in changes.items() if not name.startswith("config.")}
    choice = choose_backend("auto", dataclasses.replace(DECODER, **fields), **CHOICE | others)
    assert choice.backend == backend
    assert re.search(reason, choice.reason)


def test_a_named_back_end_that_is_not_possible_is_refused_with_every_reason():
    impossible = CHOICE | {"compute_dtype": jnp.float32, "max_segments": 100}
    with pytest.raises(ConfigError) as error:
        choose_backend("cudnn", DECODER, **impossible)
    assert len(error.value.problems) == 3
    for part in ("device is a cpu", "compute is float32", "holds 100 documents"):
        assert part in str(error.value)
    assert choose_backend("xla", DECODER, **impossible).backend == "xla"
    with pytest.raises(ConfigError, match="attention=ring cannot be used: no mesh axis of more"):
        choose_backend("ring", DECODER, **CHOICE)
    assert choose_backend("ring", DECODER, **CHOICE | {"parts": 2}).backend == "ring"


# A packed row, and one with padding at its end; T is what the kernels take at least.
SLOTS = np.arange(256)
SEGMENTS = np.stack([1 + (SLOTS >= 100), np.where(SLOTS < 200, 1 + (SLOTS >= 37), 0)])


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the TPU kernel on the CPU, as Pallas interprets it."""
    kernel = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", kernel)


def output_and_gradients(q, k, v, backend, scores=None, sinks=None, placement=None):
    segments = np.repeat(SEGMENTS, q.shape[1] // SEGMENTS.shape[1], axis=1)
    real = segments[:, :, None, None] > 0
    scores = scores or Scoring(q.shape[-1] ** -0.5)
    order = np.arange(q.shape[1]) if placement is None else placement.slots(q.shape[1])

    def total(q, k, v, sinks):
        arrays = (x[:, order] for x in (q, k, v, segments))
        with contextlib.nullcontext() if placement is None else placement.activate():
            out = attend(*arrays, backend=backend, scores=scores, sinks=sinks)
        out = jnp.where(real, out[:, np.argsort(order)], 0.0)
        return jnp.sum(jnp.sin(out)), out

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(q, k, v, sinks)


def context_placement(context, tensor):
    """Rows split over `context`, heads over `tensor`."""
    shape = {"context": context, "tensor": tensor}
    strategy = Strategy(
        mesh_axes=tuple(shape),
        fill="context",
        rules={
            "seq": "context",
            "act_heads": "tensor",
            "act_kv_heads": if_divisible("tensor"),
        },
    )
    devices = jax.devices()[: context * tensor]
    return Placement("split", strategy, make_mesh(shape, strategy, name="split", devices=devices))


SINKS = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)


@pytest.mark.parametrize(
    ("scores", "sinks"),
    [(None, None), (Scoring(0.3, cap=2.0, window=50), None), (Scoring(0.1, window=17), SINKS)],
)
def test_splash_equals_xla_on_packed_rows(interpreted, scores, sinks):
    q, k, v = random_qkv((2, 256), head_dim=64)
    found = output_and_gradients(q, k, v, "splash", scores, sinks)
    assert relative_error(found, output_and_gradients(q, k, v, "xla", scores, sinks)) < 1e-5


@pytest.mark.parametrize(
    "backend", ["cudnn", pytest.param("splash", marks=pytest.mark.slow(seconds=3))]
)
def test_values_may_have_narrower_heads_than_keys(interpreted, monkeypatch, backend):
    """Kernels that take one size get values with zeros behind."""

    def of_one_size(q, k, v, *rest):
        assert k.shape == v.shape
        return attention.BACKENDS["xla"](q, k, v, *rest)

    monkeypatch.setitem(attention.BACKENDS, "cudnn", of_one_size)
    q, k, v = random_qkv((2, 256), head_dim=128)
    arrays = q, k, v[..., :64]
    found = output_and_gradients(*arrays, backend)
    assert relative_error(found, output_and_gradients(*arrays, "xla")) < 1e-5


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize(
    ("scores", "sinks"),
    [(None, None), (Scoring(0.3, cap=2.0, window=50), None), (Scoring(0.1, window=17), SINKS)],
)
def test_one_kernel_makes_the_gradients_of_two(interpreted, monkeypatch, scores, sinks):
    """Four blocks of keys, each of which leaves its part of the queries' gradients."""
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "_is_fused", lambda *_: True)
    q, k, v = random_qkv((2, 512), head_dim=64)
    found = output_and_gradients(q, k, v, "splash", scores, sinks)
    assert relative_error(found, output_and_gradients(q, k, v, "xla", scores, sinks)) < 1e-5


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize(
    ("heads", "tensor", "sinks"), [((4, 2), 2, None), ((4, 1), 2, SINKS), ((4, 2), 4, None)]
)
def test_sharded_splash_equals_xla(interpreted, heads, tensor, sinks):
    config = RunConfig(strategy="fsdp_tp")
    config.mesh.tensor = tensor
    placement = program.make_placement(config, jax.devices()[: 2 * tensor])
    q, k, v = random_qkv((2, 256), heads=heads, head_dim=64)
    with placement.activate():
        found = output_and_gradients(q, k, v, "splash", sinks=sinks)
    assert relative_error(found, output_and_gradients(q, k, v, "xla", sinks=sinks)) < 1e-5


@pytest.mark.parametrize(
    ("backend", "context", "tensor", "scores", "sinks"),
    [
        ("xla", 4, 1, None, SINKS),
        ("xla", 2, 2, Scoring(0.3, cap=2.0, window=50), None),
        pytest.param("splash", 2, 1, None, None, marks=pytest.mark.slow(seconds=3)),
        ("splash", 4, 1, Scoring(0.3, cap=2.0, window=200), SINKS),
        pytest.param(
            "splash", 2, 2, Scoring(0.3, window=50), None, marks=pytest.mark.slow(seconds=3)
        ),
    ],
)
def test_split_rows_see_the_keys_of_all_devices(
    interpreted, monkeypatch, backend, context, tensor, scores, sinks
):
    """Four query heads read one key head, of which two devices cannot take parts."""
    monkeypatch.setattr(splash, "BLOCK", 128)  # several blocks of keys
    placement = context_placement(context, tensor)
    q, k, v = random_qkv((2, 512), heads=(4, 1), head_dim=64)
    found = output_and_gradients(q, k, v, backend, scores, sinks, placement=placement)
    assert relative_error(found, output_and_gradients(q, k, v, "xla", scores, sinks)) < 1e-5


@pytest.mark.parametrize(
    "case", ["gpt_oss_gqa", pytest.param("gemma2_gqa", marks=pytest.mark.slow(seconds=3))]
)
def test_every_kind_of_layer_is_compared_at_the_start(interpreted, monkeypatch, case):
    decoder = architecture_from_hf(CASES[case]).config
    decoder = dataclasses.replace(decoder, head_dim=64)
    check_backend("splash", decoder)

    def without_window(q, k, v, segments, scores, sinks):
        scores = dataclasses.replace(scores, window=0)
        return attention.BACKENDS["xla"](q, k, v, segments, scores, sinks)

    monkeypatch.setitem(attention.BACKENDS, "splash", without_window)
    with pytest.raises(ConfigError, match="attention=splash gives wrong results"):
        check_backend("splash", decoder)


@pytest.mark.slow(seconds=4)
def test_a_back_end_that_ignores_segments_is_caught_at_the_start(interpreted, monkeypatch):
    decoder = architecture_from_hf(CASES["gqa"] | {"head_dim": 64}).config
    check_backend("splash", decoder)

    def blind(q, k, v, segments, scores, sinks):
        return attention.BACKENDS["xla"](q, k, v, jnp.ones_like(segments), scores, sinks)

    monkeypatch.setitem(attention.BACKENDS, "splash", blind)
    with pytest.raises(ConfigError, match="attention=splash gives wrong results for packed rows"):
        check_backend("splash", decoder)


@pytest.mark.parametrize("window", [0, 1, 20, 50])
def test_blocks_of_the_kernel_s_mask_are_those_of_the_whole_mask(window):
    slots = zigzag_order(128, 4)
    ones = np.ones((1, 128), np.int32)
    whole = causal_mask(slots, np.arange(128), ones, ones, window=window)[0, 0]
    blocks = [slice(start, start + 16) for start in range(0, 128, 16)]
    mask = splash.RowMask(slots, window)
    found = np.block([[mask[rows, keys] for keys in blocks] for rows in blocks])
    np.testing.assert_array_equal(found, whole)


@compiles_for_tpu
@pytest.mark.parametrize(
    ("strategy", "head_dim", "length", "kv_heads"),
    [
        ("fsdp", 256, 4096, 2),
        ("fsdp", 64, 512, 2),
        ("fsdp_tp", 128, 512, 1),
    ],
)
def test_the_training_step_compiles_for_a_tpu_with_splash_in_both_passes(
    strategy, head_dim, length, kv_heads
):
    config = RunConfig(strategy=strategy)
    config.data.max_length, config.train.batch_size = length, 4
    config.mesh.tensor = 2 if strategy == "fsdp_tp" else 0
    backend, text = compiled_for_tpu(config, head_dim=head_dim, num_key_value_heads=kv_heads)
    assert backend == "splash"
    assert "tpu_custom_call" in text
    for kernel in KERNELS:
        assert kernel in text


KERNELS = ("splash_mha_fwd", "splash_mha_dkv")


def compiled_for_tpu(config, **changes):
    """Returns the back end, and the text of the training step for four chips of a v5e."""
    architecture = architecture_from_hf(CASES["gqa"] | {"hidden_size": 256} | changes)
    placement = program.make_placement(config, tpu_devices("v5e:2x2"))
    evaluator = program.build_evaluator(config, architecture, max_segments=8, placement=placement)
    built = program.build(config, evaluator, steps=10)
    text = built.lower().compile().as_text()
    return evaluator.attention.backend, text


@compiles_for_tpu
@pytest.mark.parametrize("backend", ["auto", "ring"])
def test_split_rows_compile_for_a_tpu_in_both_passes(backend):
    config = RunConfig(strategy="fsdp_cp")
    config.data.max_length, config.train.batch_size, config.mesh.context = 1024, 2, 2
    config.model.attention = backend
    chosen, text = compiled_for_tpu(config, head_dim=64)
    if backend == "ring":
        assert chosen == "ring"
        assert_sent_while_scored(text)
        return
    assert chosen == "splash"
    assert all(kernel in text for kernel in KERNELS)
    # Gradients of keys and values leave each device by a reduce-scatter.
    gradient = r"bf16\[1,512,2,64\]\S* reduce-scatter\("
    assert len(re.findall(gradient, text)) == 2


def assert_sent_while_scored(text):
    """Of each pass of the first step: keys are on their way while a loop scores pairs."""
    marks = re.findall(r" (collective-permute-start|collective-permute-done|while)\(", text)
    spans = " ".join(marks).split("collective-permute-start while collective-permute-done")
    assert len(spans) >= 3
