"""The gated delta rule against a token at a time and transformers; packed, and in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.compiled.collectives import collectives
from jaxft.compiled.hlo import Module
from jaxft.models.delta import (
    SCOPE,
    convolution_state,
    delta_step,
    gated_delta_rule,
    short_convolution,
    unit_lower_inverse,
)
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, load_strategy
from tests.oracle import delta as oracle
from tests.oracle.cases import DELTA

convolve = jax.jit(short_convolution)
LENGTH, CHUNK, KEY_SIZE, VALUE_SIZE = 45, 16, 8, 6
WIDTH = 4
# Lengths of documents in a row; 0 begins padding of the length that follows.
LAYOUTS = {
    "one document": (45,),
    "borders inside chunks": (7, 13, 25),
    "borders of chunks": (16, 16, 13),
    "documents shorter than the convolution": (1, 1, 2, 3, 1, 20, 1, 1, 14, 1),
    "padding on both sides": (0, 5, 20, 9, 0, 11),
    "padding between documents": (18, 0, 9, 18),
    "padding alone": (0, 45),
    "padding at the right": (30, 0, 15),
}


def segments_of(layout) -> np.ndarray:
    numbers, parts, sizes = iter(range(1, 99)), [], iter(layout)
    for size in sizes:
        number, size = (next(numbers), size) if size else (0, next(sizes))
        parts += [number] * size
    return np.array(parts, np.int32)


SEGMENTS = np.stack([segments_of(layout) for layout in LAYOUTS.values()])
ROWS = len(SEGMENTS)


@functools.cache
def inputs(keys: int, heads: int) -> tuple[np.ndarray, ...]:
    """q, k, v, log_decay, beta and a state, of every row."""
    random, tokens = np.random.default_rng(keys), (ROWS, LENGTH)
    arrays = (
        random.normal(size=(*tokens, keys, KEY_SIZE)),
        random.normal(size=(*tokens, keys, KEY_SIZE)),
        random.normal(size=(*tokens, heads, VALUE_SIZE)),
        -random.exponential(size=(*tokens, heads)),
        random.uniform(size=(*tokens, heads)),
        random.normal(size=(ROWS, heads, KEY_SIZE, VALUE_SIZE)),
    )
    return tuple(x.astype(np.float32) for x in arrays)


def token_by_token(q, k, v, log_decay, beta, state, segments):
    """The rule as its equations stand, and a state that a border empties."""
    (_, _, keys, size), heads = k.shape, v.shape[2]

    def of_heads(x):
        x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
        return jnp.repeat(x, heads // keys, axis=2)

    before = np.concatenate([segments[:, :1], segments[:, :-1]], axis=1)
    begins, real = (segments != before) & (segments > 0), segments > 0

    def step(old, token):
        q, k, v, log_decay, beta, begins, real = token
        state = jnp.where(begins[:, None, None, None], 0, old)
        state = state * jnp.exp(log_decay)[..., None, None]
        error = beta[..., None] * (v - jnp.einsum("bhd,bhdv->bhv", k, state))
        state = state + k[..., None] * error[..., None, :]
        out = jnp.einsum("bhd,bhdv->bhv", q, state)
        return jnp.where(real[:, None, None, None], state, old), out

    tokens = (of_heads(q) * size**-0.5, of_heads(k), v, log_decay, beta, begins, real)
    state, out = jax.lax.scan(step, state, [jnp.moveaxis(jnp.asarray(x), 1, 0) for x in tokens])
    return jnp.moveaxis(out, 0, 1), state


def with_gradients(rule):
    """Returns the compiled rule: outputs of real tokens, the state, and gradients of both."""

    @jax.jit
    def passes(arrays, segments, pulled):
        def masked(*arrays):
            out, state = rule(*arrays, segments)
            return jnp.where(segments[..., None, None] > 0, out, 0), state

        found, back = jax.vjp(masked, *arrays)
        return found, back(pulled)

    return passes


def chunked(*arguments, span):
    *arrays, state, segments = arguments
    return gated_delta_rule(*arrays, segments, chunk=CHUNK, span=span, state=state)


in_chunks, in_one_span = (with_gradients(functools.partial(chunked, span=span)) for span in (1, 3))


def expected(arrays, segments, pulled):
    """The same of the equations in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, pulled))
        rule = with_gradients(lambda *arguments: token_by_token(*arguments[:-1], segments))
        return jax.tree.map(np.asarray, rule(wide[0], segments, wide[1]))


def pulled_of(heads: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(9)
    shapes = (ROWS, LENGTH, heads, VALUE_SIZE), (ROWS, heads, KEY_SIZE, VALUE_SIZE)
    return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)


def assert_close(found, wanted, tolerance: float):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.all(np.isfinite(one))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("keys", "heads", "rule"), [(2, 4, in_chunks), (2, 2, in_one_span)])
def test_chunks_give_what_tokens_give_one_by_one_and_so_do_gradients(keys, heads, rule):
    arguments = inputs(keys, heads), SEGMENTS, pulled_of(heads)
    found, wanted = rule(*arguments), expected(*arguments)
    assert_close(found[0], wanted[0], 1e-5)
    assert_close(found[1], wanted[1], 2e-5)


def test_decays_to_nothing_and_whole_corrections_have_finite_gradients():
    q, k, v, log_decay, beta, state = (x.copy() for x in inputs(2, 4))
    random = np.random.default_rng(5)
    log_decay[random.uniform(size=beta.shape) < 0.2] = -50
    log_decay[random.uniform(size=beta.shape) < 0.2] = 0
    beta = random.integers(2, size=beta.shape).astype(np.float32)
    q[:, 5], k[:, 6] = 0, 0
    arguments = (q, k, v, log_decay, beta, state), SEGMENTS, pulled_of(4)
    found, wanted = in_chunks(*arguments), expected(*arguments)
    assert_close(found[0], wanted[0], 1e-5)
    # A vector of length 0 is divided by 1e-3, so that its gradients are a thousand times as large.
    assert_close(found[1], wanted[1], 1e-4)


def test_a_document_is_the_same_alone_and_among_others():
    arrays, layout = inputs(2, 4), LAYOUTS["borders inside chunks"]
    row = list(LAYOUTS).index("borders inside chunks")
    (packed, last), _ = in_chunks(arrays, SEGMENTS, pulled_of(4))
    apart = [np.zeros_like(x) for x in arrays]
    segments = np.zeros_like(SEGMENTS)
    ends = np.cumsum(layout)
    for number, (end, size) in enumerate(zip(ends, layout, strict=True)):
        segments[number, :size] = 1
        for x, whole in zip(apart[:5], arrays[:5], strict=True):
            x[number, :size] = whole[row, end - size : end]
    apart[5][0] = arrays[5][row]
    (alone, states), _ = in_chunks(tuple(apart), segments, pulled_of(4))
    for number, (end, size) in enumerate(zip(ends, layout, strict=True)):
        assert_close(alone[number, :size], packed[row, end - size : end], 1e-6)
    assert_close(states[len(layout) - 1], last[row], 1e-6)


def test_padding_leaves_the_state_as_it_is():
    arrays = inputs(2, 4)
    (_, last), _ = in_chunks(arrays, SEGMENTS, pulled_of(4))
    names = list(LAYOUTS)
    alone = names.index("padding alone")
    np.testing.assert_array_equal(last[alone], arrays[5][alone])
    row = names.index("padding at the right")
    others = [x.copy() for x in arrays]
    for x in others[:5]:
        x[row, 30:] = 7
    (_, again), _ = in_chunks(tuple(others), SEGMENTS, pulled_of(4))
    np.testing.assert_array_equal(last[row], again[row])


@jax.jit
def piece(x, kernel, arrays, segments, states):
    """A piece of text through the convolution and the rule, and their states."""
    before, state = states
    out = short_convolution(x, kernel, segments, before)
    before = convolution_state(x, segments > 0, width=WIDTH, state=before)
    more, state = gated_delta_rule(*arrays, segments, chunk=CHUNK, state=state)
    return (out, more), (before, state)


def test_text_read_in_pieces_and_token_by_token_is_text_read_at_once():
    random, lengths = np.random.default_rng(3), [(20, 13), (1, 20), (20, 2), (3, 3)]
    rows = len(lengths)
    q, k, v, log_decay, beta, state = (x[:rows] for x in inputs(2, 4))
    x = random.normal(size=(rows, LENGTH, 3, 2)).astype(np.float32)
    kernel = random.normal(size=(3, 2, WIDTH)).astype(np.float32)
    tokens = (x, q, k, v, log_decay, beta)
    totals = np.sum(lengths, axis=1) + 2
    segments = (np.arange(LENGTH)[None] < totals[:, None]).astype(np.int32)
    zeros = np.zeros((rows, WIDTH - 1, 3, 2), np.float32)
    (outs, states) = piece(x, kernel, tokens[1:], segments, (zeros, state))
    now, starts = (zeros, state), np.zeros(rows, int)
    for number in range(2):
        sizes = np.array([pair[number] for pair in lengths])
        part = [np.full((rows, 20, *a.shape[2:]), 3, np.float32) for a in tokens]
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            for to, a in zip(part, tokens, strict=True):
                to[row, :size] = a[row, start : start + size]
        of_part = (np.arange(20)[None] < sizes[:, None]).astype(np.int32)
        found, now = piece(part[0], kernel, part[1:], of_part, now)
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            for one, whole in zip(found, outs, strict=True):
                assert_close(one[row, :size], whole[row, start : start + size], 1e-5)
        starts += sizes
    step = jax.jit(delta_step)
    for _ in range(2):
        before, state = now
        at = [jnp.asarray(a[np.arange(rows), starts]) for a in tokens]
        one = jnp.ones((rows, 1), jnp.int32)
        out = convolve(at[0][:, None], kernel, one, before)[:, 0]
        before = convolution_state(at[0][:, None], one > 0, width=WIDTH, state=before)
        more, state = step(*at[1:], np.ones(rows, bool), state)
        for found, whole in zip((out, more), outs, strict=True):
            assert_close(found, whole[np.arange(rows), starts], 1e-5)
        now, starts = (before, state), starts + 1
    assert_close(now, states, 1e-5)
    _, kept = step(*at[1:], np.zeros(rows, bool), state)
    np.testing.assert_array_equal(kept, state)


def test_rows_shorter_than_a_chunk():
    arrays = tuple(x[:, :5] for x in inputs(2, 4)[:5])
    segments = np.tile(np.array([1, 1, 2, 2, 2], np.int32), (ROWS, 1))
    rule = jax.jit(gated_delta_rule)
    out, state = rule(*arrays, segments)
    zeros = np.zeros_like(inputs(2, 4)[5])
    assert_close((out, state), token_by_token(*arrays, zeros, segments), 1e-5)


def test_chunks_that_cannot_be_are_refused():
    arrays = inputs(2, 4)[:5]
    with pytest.raises(ValueError, match="chunk is 24; expected a power of two"):
        gated_delta_rule(*arrays, SEGMENTS, chunk=24)
    three = (arrays[0], arrays[1], *(x[:, :, :3] for x in arrays[2:]))
    with pytest.raises(ValueError, match="3 heads of values are not a multiple of 2 heads of keys"):
        gated_delta_rule(*three, SEGMENTS, chunk=16)


def test_the_convolution_sees_nothing_before_a_document():
    random = np.random.default_rng(2)
    x = random.normal(size=(ROWS, LENGTH, 3)).astype(np.float32)
    kernel = random.normal(size=(3, WIDTH)).astype(np.float32)
    sums = np.zeros_like(x)
    for row, at in np.argwhere(SEGMENTS > 0):
        for back in range(WIDTH):
            if at >= back and SEGMENTS[row, at - back] == SEGMENTS[row, at]:
                sums[row, at] += x[row, at - back] * kernel[:, WIDTH - 1 - back]
    found = convolve(x, kernel, SEGMENTS)
    real = SEGMENTS > 0
    assert_close(found[real], (sums / (1 + np.exp(-sums)))[real], 1e-6)


def passes(system, pulled):
    inverse, back = jax.vjp(unit_lower_inverse, system)
    return inverse, back(pulled)[0]


@pytest.mark.parametrize("size", [64, 128])
def test_the_inverse_is_accurate_where_keys_are_alike_and_nothing_decays(size):
    """Sums of powers of the matrix are of 1e18 there, and of the inverse no entry is above 1."""
    random = np.random.default_rng(0)
    common = random.normal(size=(3, 1, 32))
    noise = np.array([0, 0.1, 1])[:, None, None]
    keys = common + noise * random.normal(size=(3, size, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    system = np.tril(keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)
    wanted = np.linalg.inv(np.eye(size) + np.float64(system))
    pulled = random.normal(size=system.shape).astype(np.float32)
    found, gradients = jax.jit(passes)(system, pulled)
    assert np.max(np.abs(found - wanted)) < 2e-6
    gradient = -np.tril(wanted.swapaxes(-1, -2) @ pulled @ wanted.swapaxes(-1, -2), -1)
    np.testing.assert_allclose(gradients, gradient, rtol=1e-4, atol=1e-4)


def test_transformers_gives_the_same():
    given, stored = oracle.inputs(), dict(np.load(DELTA))
    start, order = jnp.asarray(given["state"]), ("query", "key", "value", "g", "beta")
    segments = jnp.ones((oracle.ROWS, oracle.LENGTH), jnp.int32)

    def rule(*arrays):
        return gated_delta_rule(*arrays, segments, chunk=oracle.CHUNK, state=start)

    @jax.jit
    def passes(*arrays):
        found, back = jax.vjp(rule, *arrays)
        return found, back(jax.tree.map(lambda x: 2 * x, found))

    found, gradients = passes(*(given[name] for name in order))
    for form in ("chunks", "recurrent"):
        assert_close(found, (stored[f"{form}/out"], stored[f"{form}/state"]), 1e-5)
    for name, gradient in zip(order, gradients, strict=True):
        assert_close(gradient, stored[f"gradients/{name}"], 2e-5)


def test_transformers_convolves_the_same():
    given, stored = oracle.convolved(), dict(np.load(DELTA))
    x, kernel, before = (jnp.asarray(given[name]) for name in ("x", "kernel", "before"))
    real = jnp.ones(x.shape[:2], bool)
    out = convolve(x, kernel, real.astype(jnp.int32), before)
    state = convolution_state(x, real, width=oracle.WIDTH, state=before)
    assert_close((out, state), (stored["update/out"], stored["update/state"]), 1e-5)
    assert_close(convolve(x, kernel, real.astype(jnp.int32)), stored["convolution/out"], 1e-5)


def test_rows_and_heads_on_their_own_devices_exchange_gradients_of_kernels_alone():
    strategy = load_strategy("fsdp_tp")
    placement = Placement("mine", strategy, make_mesh({"data": 2, "tensor": 4}, strategy, name="x"))
    rows, length, keys, heads = 4, 64, 4, 8
    head = ("batch", "seq", "act_heads")
    shapes = {
        "q": ((rows, length, keys, KEY_SIZE), (*head, "act_head_dim")),
        "k": ((rows, length, keys, KEY_SIZE), (*head, "act_head_dim")),
        "v": ((rows, length, heads, VALUE_SIZE), (*head, "act_head_dim")),
        "log_decay": ((rows, length, heads), head),
        "beta": ((rows, length, heads), head),
        "kernel": ((heads, VALUE_SIZE, WIDTH), ("heads", "head_dim", "norm")),
    }
    arrays = {
        name: jax.ShapeDtypeStruct(
            shape, np.float32, sharding=placement.sharding(axes, shape, name)
        )
        for name, (shape, axes) in shapes.items()
    }
    segments = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=placement.rows)

    def total(arrays, segments):
        v = short_convolution(arrays["v"], arrays["kernel"], segments)
        given = (arrays["q"], arrays["k"], v, arrays["log_decay"], arrays["beta"])
        return jnp.sum(gated_delta_rule(*given, segments, chunk=CHUNK)[0] ** 2)

    shardings = {name: array.sharding for name, array in arrays.items()}
    step = jax.jit(jax.grad(total), out_shardings=shardings)
    text = step.lower(arrays, segments).compile().as_text()
    found = collectives(text, placement.mesh)
    size = heads * VALUE_SIZE * WIDTH * 4 // 4
    assert [(one.kind, one.axes, sum(one.arrays)) for one in found] == [
        ("all-reduce", ("data",), size)
    ]
    # A plan knows the rule's work by its name, forward and backward.
    computations = Module(text).computations.values()
    loops = [i for c in computations for i in c.instructions.values() if i.opcode == "while"]
    assert len(loops) > 1 and all(SCOPE in one.origin for one in loops)
    assert any("transpose" in one.origin for one in loops)
