"""tokamax's attention: which keys it is told to see, and our softmax with sinks around its own.

Its kernels run on GPUs alone. Here its own reference takes their place forward, and backward the
rule of FlashAttention by which they make gradients; a run on a GPU compares the kernels themselves
before it starts (`check_backend`).
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import ConfigError
from jaxft.models import tokamax
from jaxft.models.attention import attend, causal_mask, choose_backend
from jaxft.models.config import Scoring
from tests.tiny import load_tiny, random_rows

needs_tokamax = pytest.mark.skipif(not tokamax.is_installed(), reason="tokamax is not installed")


@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_a_query_sees_the_keys_from_the_first_to_its_own(window):
    segments = jnp.array([[1] * 7 + [2] * 1 + [3] * 9 + [0] * 3, [1] * 20])
    slots = np.arange(20)
    expected = causal_mask(slots, slots, segments, segments, window=window)[:, 0]
    first = np.asarray(tokamax.first_keys(segments, window))[:, :, None]
    np.testing.assert_array_equal((slots >= first) & (slots <= slots[:, None]), expected)


@needs_tokamax
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its reference
@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 9])
def test_outputs_and_gradients_are_those_of_plain_attention(monkeypatch, window, sinks):
    use_the_reference(monkeypatch)
    rows = random_rows(2, 40, 50, seed=1)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, weights = (
        jax.random.normal(key, (2, 40, heads, 16))
        for key, heads in zip(keys, (4, 2, 2, 4), strict=False)
    )
    arrays = (q, k, v, 2 * jax.random.normal(keys[4], (4,)) if sinks else None)
    segments = jnp.asarray(rows.segments)
    scores = Scoring(scale=0.3, window=window)

    def total(q, k, v, sinks, backend):
        out = attend(q, k, v, segments, backend=backend, scores=scores, sinks=sinks)
        return jnp.sum(jnp.where(segments[..., None, None] > 0, weights * out, 0))

    grad = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)), static_argnums=4)
    with jax.numpy_rank_promotion("allow"):  # its reference promotes
        found, expected = grad(*arrays, "tokamax"), grad(*arrays, "xla")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def use_the_reference(monkeypatch):
    base = importlib.import_module("tokamax._src.ops.attention.base")

    def gradients(residuals, out, d_out, q, k, v, *, logits_scale, mask, **_):
        """As the kernel makes them, of the softmax's maximum and sum, and the output alone."""
        largest, total = (x[..., None] for x in residuals)
        group = q.shape[2] // k.shape[2]
        keys, values = (jnp.repeat(x, group, 2) for x in (k, v))
        scores = logits_scale * jnp.einsum("btnh,bsnh->bnts", q, keys)
        seen = mask.as_array(q.shape[1], k.shape[1])
        weights = jnp.where(seen, jnp.exp(scores - largest), 0) / total
        aligned = jnp.einsum("btnh,btnh->bnt", out, d_out)[..., None]
        d_scores = weights * (jnp.einsum("btnh,bsnh->bnts", d_out, values) - aligned)
        d_scores = logits_scale * d_scores
        d_keys = jnp.einsum("bnts,btnh->bsnh", d_scores, q)
        d_values = jnp.einsum("bnts,btnh->bsnh", weights, d_out)
        grouped = (*k.shape[:3], group, k.shape[3])
        return {
            "q": jnp.einsum("bnts,bsnh->btnh", d_scores, keys),
            "k": d_keys.reshape(grouped).sum(3),
            "v": d_values.reshape(grouped).sum(3),
        }

    reference = base.DotProductAttention(vjp=gradients)
    monkeypatch.setattr(tokamax, "kernel", lambda: reference)


@needs_tokamax
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow(seconds=5)
def test_the_kernels_are_lowered_for_gpus():
    """Forward and backward, for a GPU that is not there: that they exist and take what we give."""
    cross_compile = importlib.import_module("tokamax._src.config").cross_compile
    segments = jnp.asarray(random_rows(2, 128, 50, seed=1).segments)
    shape = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    scores = Scoring(scale=0.3, window=50)

    def total(q, k, v):
        out = attend(q, k, v, segments, backend="tokamax", scores=scores)
        return jnp.sum(out.astype(jnp.float32))

    device = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with (
        cross_compile(True),
        jax.numpy_rank_promotion("allow"),
        jax.sharding.use_abstract_mesh(mesh),
    ):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(shape, shape, shape)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall("triton", text)) >= 2


@pytest.mark.parametrize(
    ("case", "changes", "reason"),
    [
        ("gqa", {"platform": "cpu"}, "it runs on NVIDIA GPUs and the device is a cpu"),
        ("gqa", {"compute_capability": "7.5"}, "it needs compute capability 8.0"),
        ("gqa", {"compute_dtype": "float32"}, "it computes in bfloat16"),
        ("gqa", {"parts": 2}, "splits each row over 2 devices"),
        ("gemma2_gqa", {}, "bounds its scores"),
    ],
)
def test_what_it_cannot_do_is_said(monkeypatch, case, changes, reason):
    monkeypatch.setattr("jaxft.models.attention.is_installed", lambda: True)
    run = {
        "platform": "gpu",
        "length": 128,
        "compute_dtype": "bfloat16",
        "max_segments": 1000,
        "compute_capability": "8.0",
    }
    config = load_tiny(case).architecture.config
    plain = load_tiny("gqa").architecture.config
    assert choose_backend("tokamax", plain, **run)
    assert "tokamax holds no scores" in choose_backend("auto", plain, **run).reason
    with pytest.raises(ConfigError, match=reason):
        choose_backend("tokamax", config, **run | changes)
