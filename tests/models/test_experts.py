"""Mixture of experts: both ways of dispatch against a loop, on one device and on a mesh."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxft.compiled.collectives import Collective, collectives
from jaxft.config import ObjectiveConfig, RunConfig
from jaxft.errors import ConfigError
from jaxft.models import dispatch
from jaxft.models.config import DecoderConfig, Numerics, make_numerics
from jaxft.models.experts import balance_loss, check_experts
from jaxft.models.families import architecture_from_hf
from jaxft.models.layers import Routing
from jaxft.models.module import AbstractModel, abstract_model, merge
from jaxft.sharding.mesh import make_mesh
from jaxft.sharding.rules import Placement, Strategy
from jaxft.training import program
from jaxft.training.objectives.bound import bind
from jaxft.training.program import make_placement
from tests.oracle.cases import CASES
from tests.tiny import Tiny, feed, load_tiny, make_program, random_rows, relative_error, start
from tests.tpu import compiles_for_tpu, tpu_devices

# Biases and a clamp; no bias and weights that do not sum to 1.
CASES_OF_EXPERTS = ["gpt_oss_gqa", "qwen3_moe_unnormalised_mha"]


def abstract_layer(case: str, capacity: float, matmul: str = "") -> tuple[Tiny, AbstractModel]:
    """Returns a model, and the experts of one of its layers without their weights."""
    tiny = load_tiny(case)
    config, numerics = tiny.architecture.config, Numerics(expert_capacity=capacity)
    block: Any = tiny.architecture.blocks[""]

    def build(rngs: Any) -> Any:
        experts = block(config, numerics, rngs).mlp
        for part in (experts.gate, experts.up, experts.down):
            part.matmul = matmul
        return experts

    return tiny, abstract_model(build)


def one_layer(case: str, capacity: float = 0.0, matmul: str = "") -> tuple[Any, Any, Any]:
    """Returns sizes and weights of the experts of a model's first layer, and a module of them."""
    tiny, abstract = abstract_layer(case, capacity, matmul)
    prefix = "layers.mlp."
    params = {p[len(prefix) :]: v[0] for p, v in tiny.params.items() if p.startswith(prefix)}
    return tiny.architecture.config, params, functools.partial(merge, abstract.graphdef)


def by_hand(config: Any, params, gating, x, limit=None):
    """Each token by itself, in NumPy float64; `limit` tokens of a row at most for an expert."""
    p = {path: np.asarray(value, np.float64) for path, value in params.items()}
    out, dropped = np.zeros_like(x), 0
    for row in range(x.shape[0]):
        logits = x[row] @ p["router.w"].T + p.get("router.b", 0)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.argsort(-probabilities, axis=-1)[:, : config.experts.chosen]
        weights = np.take_along_axis(probabilities, chosen, -1)
        if config.experts.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        taken = np.zeros(config.experts.count, int)
        for choice in range(config.experts.chosen):
            for token in range(x.shape[1]):
                e = chosen[token, choice]
                taken[e] += 1
                if limit is not None and taken[e] > limit:
                    dropped += 1
                    continue
                gate = p["gate.w"][e] @ x[row, token] + (p["gate.b"][e] if "gate.b" in p else 0)
                up = p["up.w"][e] @ x[row, token] + (p["up.b"][e] if "up.b" in p else 0)
                hidden = np.asarray(gating(jnp.asarray(gate), jnp.asarray(up)), np.float64)
                y = p["down.w"][e] @ hidden + (p["down.b"][e] if "down.b" in p else 0)
                out[row, token] += weights[token, choice] * y
    return out, dropped


def tokens_of(config, rows=2, length=12):
    return np.random.RandomState(0).randn(rows, length, config.embed).astype(np.float32)


@pytest.mark.slow(seconds=3)
@pytest.mark.parametrize("case", CASES_OF_EXPERTS)
def test_without_capacity_every_token_goes_through_its_experts(case):
    config, params, module = one_layer(case)
    x, real = tokens_of(config), np.ones((2, 12), bool)
    out, routing = module(params)(x, real)
    expected, _ = by_hand(config, params, module(params).gating, x)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert float(jnp.sum(routing.counts)) == 2 * 12 * config.experts.chosen
    assert float(routing.dropped) == 0


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("case", CASES_OF_EXPERTS)
@pytest.mark.parametrize("capacity", [0.5, 1.0, 100.0])
def test_a_capacity_takes_first_choices_first_and_counts_what_it_drops(case, capacity):
    config, params, module = one_layer(case, capacity)
    x, real = tokens_of(config), np.ones((2, 12), bool)
    out, routing = module(params)(x, real)
    share = 12 * config.experts.chosen / config.experts.count
    limit = min(12, int(np.ceil(capacity * share)))
    expected, dropped = by_hand(config, params, module(params).gating, x, limit)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert float(routing.dropped) == dropped
    assert (dropped == 0) == (capacity == 100.0)


@pytest.mark.parametrize("capacity", [0.0, 0.6])
def test_padding_goes_to_no_expert_and_is_not_counted(capacity):
    config, params, module = one_layer(CASES_OF_EXPERTS[0], capacity)
    x = tokens_of(config)
    real = np.arange(12)[None] < np.array([[12], [5]])
    out, routing = module(params)(x, real)
    assert float(routing.tokens) == 17
    assert float(jnp.sum(routing.counts)) == 17 * config.experts.chosen
    assert not np.asarray(out)[~real].any()
    # Other padding gives the same: it competes with nothing.
    moved, _ = module(params)(np.where(real[..., None], x, x[:, ::-1]), real)
    np.testing.assert_array_equal(np.asarray(out)[real], np.asarray(moved)[real])


def test_the_balance_loss_follows_its_formula():
    random = np.random.RandomState(0)
    probabilities = random.dirichlet(np.ones(4), size=(3, 10))  # of 3 layers and 10 tokens
    chosen = np.argsort(-probabilities, axis=-1)[..., :2]
    one_hot = np.eye(4)[chosen]  # [3, 10, 2, 4]
    routing = Routing(
        counts=jnp.asarray(one_hot.sum((1, 2)), jnp.float32),
        probabilities=jnp.asarray(probabilities.sum(1), jnp.float32),
        tokens=jnp.full(3, 10.0),
        dropped=jnp.zeros(3),
    )
    shares, means = one_hot.sum(2).mean((0, 1)), probabilities.mean((0, 1))
    np.testing.assert_allclose(balance_loss(routing), 4 * (shares * means).sum(), rtol=1e-5)


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize(
    ("case", "strategy", "mesh", "capacity"),
    [
        # Without a capacity the matrix of test_strategies.py has them.
        ("mixtral_tied", "fsdp_ep", {"fsdp": 2, "expert": 2}, 1.0),
        ("gpt_oss_packed", "ep", {"expert": 2}, 1.0),
    ],
)
def test_a_step_on_a_mesh_equals_one_on_one_device(case, strategy, mesh, capacity):
    tiny = load_tiny(case)
    settings = {
        "model__expert_capacity": capacity,
        "model__remat": "dots",
        "objective__balance": 0.5,
        "optim__epsilon": 1.0,
        "train__batch_size": 16,
        "train__accumulation": 2,
    }
    rows = random_rows(16, 24, 64)
    on_mesh = {"strategy": strategy} | {f"mesh__{axis}": size for axis, size in mesh.items()}
    results = []
    for devices, changes in ((1, {}), (8, on_mesh)):
        built = make_program(tiny, devices, **settings, **changes)
        state, metrics = built.train_step(start(built, tiny.params), {}, feed(built, rows))
        changed = {path: state.params[path] - value for path, value in tiny.params.items()}
        results.append((jax.device_get((state.params, metrics)), jax.device_get(changed)))
    ((params, metrics), changed), (found, found_changed) = results
    assert metrics.ratios["expert_balance"][0] > 1.5
    assert (metrics.ratios["expert_dropped"][0] > 0) == (capacity > 0)
    assert relative_error(found, (params, metrics)) < 1e-5
    # Differences of parameters in float32: few of their bits are left.
    assert relative_error(found_changed, changed) < 1e-2


# Rules that no built-in strategy has together: experts' hidden width split too, with positions of
# the residual stream; rows split; gradients cut further than weights.
MIXED = {
    "tensor": Strategy(
        mesh_axes=("fsdp", "expert", "tensor"),
        fill="fsdp",
        rules={
            "batch": ("fsdp", "expert"),
            "stream_seq": "tensor",
            "act_experts": "expert",
            "act_mlp": "tensor",
            "experts": "expert",
            "mlp": "tensor",
            "embed": "fsdp",
        },
    ),
    "context": Strategy(
        mesh_axes=("data", "context", "expert"),
        fill="data",
        rules={
            "batch": ("data", "expert"),
            "seq": "context",
            "stream_seq": "context",
            "act_experts": "expert",
            "experts": "expert",
        },
    ),
    "positions": Strategy(
        mesh_axes=("data", "expert"),
        fill="data",
        rules={"batch": "data", "seq": "expert", "act_experts": "expert", "experts": "expert"},
    ),
    "gradients": Strategy(
        mesh_axes=("data", "expert"),
        fill="data",
        rules={"batch": ("data", "expert"), "act_experts": "expert", "experts": "expert"},
        gradients={"embed": "data"},
    ),
    "two_axes": Strategy(
        mesh_axes=("stage", "fsdp", "expert"),
        fill="fsdp",
        rules={
            "batch": ("stage", "fsdp", "expert"),
            "act_experts": ("stage", "expert"),
            "experts": ("stage", "expert"),
            "embed": "fsdp",
        },
    ),
}


def place(strategy: str) -> Placement:
    """Returns eight devices, two along the last axes."""
    if strategy in MIXED:
        sizes = dict.fromkeys(MIXED[strategy].mesh_axes[1:], 2)
        return Placement(
            strategy, MIXED[strategy], make_mesh(sizes, MIXED[strategy], name=strategy)
        )
    config = RunConfig(strategy=strategy)
    config.mesh.expert = {"ep": 4, "fsdp_ep": 2}.get(strategy, 0)
    config.mesh.fsdp = {"fsdp_ep": 2}.get(strategy, 0)
    config.mesh.tensor = {"fsdp_tp": 2}.get(strategy, 0)
    return make_placement(config)


def compare_on(strategy: str, capacity: float = 0.0, router: Any = None, matmul: str = "") -> None:
    """Checks outputs, routing and gradients of one layer against those without a mesh."""
    config, params, module = one_layer("gpt_oss_gqa", capacity, matmul)
    params |= router or {}
    x = tokens_of(config, rows=8)
    real = np.arange(12)[None] < np.array([[12], [5], [12], [0], [12], [1], [11], [12]])
    # Two functions: one would be traced once.
    alone, on_mesh = (functools.partial(_value_and_gradients, module, real=real) for _ in range(2))
    expected = jax.jit(alone)(params, x)
    with place(strategy).activate():
        found = jax.jit(on_mesh)(params, x)
    for name, a, b in zip(("value", "gradients"), found, expected, strict=True):
        assert relative_error(a, b) < 1e-5, name


def _value_and_gradients(module: Any, params: Any, x: Any, *, real: Any) -> Any:
    def total(params: Any, x: Any) -> Any:
        out, routing = module(params)(x, real)
        return jnp.sum(jnp.sin(3.0 * out)) + jnp.sum(routing.probabilities**2), (out, routing)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.parametrize("capacity", [0.0, 1.0])
@pytest.mark.parametrize(
    "strategy",
    [
        *(pytest.param(name, marks=pytest.mark.slow(seconds=5)) for name in ("fsdp", "fsdp_tp")),
        "ep",
        "fsdp_ep",
    ],
)
def test_experts_on_a_mesh_give_the_same_and_have_the_same_gradients(strategy, capacity):
    compare_on(strategy, capacity)


@pytest.mark.parametrize(
    ("strategy", "capacity"),
    [
        *(pytest.param(strategy, 0.0, marks=pytest.mark.slow(seconds=5)) for strategy in MIXED),
        ("tensor", 1.0),
        pytest.param("gradients", 1.0, marks=pytest.mark.slow(seconds=5)),
        pytest.param("two_axes", 1.0, marks=pytest.mark.slow(seconds=5)),
    ],
)
def test_splitting_experts_combines_with_other_splits(strategy, capacity):
    compare_on(strategy, capacity)


@pytest.mark.parametrize(
    ("strategy", "capacity"),
    [("tensor", 1.0), pytest.param("tensor", 0.0, marks=pytest.mark.slow(seconds=5))],
)
def test_experts_of_8_bit_numbers_give_the_same_on_a_mesh(strategy, capacity):
    """With the hidden width split, which is what products add up."""
    compare_on(strategy, capacity, matmul="int8")


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("strategy", ["ep", "fsdp_ep"])
def test_no_token_is_lost_when_all_choose_the_same_experts(strategy):
    # Both are on one device under fsdp_ep: it gets each token twice, the most that can be.
    router = {"router.w": jnp.zeros((4, 32)), "router.b": jnp.array([0.0, 0.0, 1.0, 2.0])}
    compare_on(strategy, router=router)


def test_tokens_and_copies_have_the_gradients_of_plain_indexing():
    """Two copies of a token at places of their own, some of them nowhere; places may be empty."""
    tokens, chosen, count, width = 5, 2, 12, 3
    random = np.random.RandomState(0)
    of_copy = random.permutation(count)[: tokens * chosen].reshape(tokens, chosen)
    of_copy[1, 0], of_copy[3] = count, count
    copies = np.full(count + 1, tokens * chosen)
    copies[of_copy.reshape(-1)] = np.arange(tokens * chosen)
    places = dispatch.Places(jnp.asarray(of_copy), jnp.asarray(copies[:-1]))
    x, mix = random.randn(tokens, width), random.randn(tokens, chosen)

    def by_places(x, mix):
        return dispatch.combine(jnp.sin(dispatch.spread(x, places)), mix, places)

    def by_tokens(x, mix):
        return (jnp.sin(x)[:, None] * (mix * (of_copy < count))[..., None]).sum(1)

    found, expected = (jax.vjp(f, x, mix) for f in (by_places, by_tokens))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for a, b in zip(found[1](found[0]), expected[1](found[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_travel_to_their_experts_and_back(seed):
    peers, rows, width = 4, 10, 2
    random = np.random.RandomState(seed)
    # Up to `rows` copies on a device, few or none for most experts; the rest is padding.
    sizes = random.multinomial(rows, random.dirichlet(np.full(12 + 1, 0.2)), size=peers)[:, :-1]
    sizes = sizes.astype(np.int32)
    copies = random.randn(peers, rows, width).astype(np.float32)
    among = dispatch.Peers(("expert",), peers)
    mesh = Mesh(np.array(jax.devices()[:peers]), ("expert",))

    def local(sizes, copies):
        there, back, arrived = dispatch.journeys(sizes[0], among)
        taken = dispatch.exchange(copies[0], there, among, rows, peers * rows)
        returned = dispatch.exchange(taken, back, among, rows, rows)
        return jax.tree.map(lambda x: x[None], (there, back, arrived, taken, returned))

    split = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    there, back, arrived, taken, returned = jax.device_get(jax.jit(split)(sizes, copies))
    # What CPU devices do, and what others do with the same plan.
    check_travels(sizes, copies, arrived, taken, returned)
    taken = ragged_all_to_all(copies, np.zeros_like(taken), there)
    returned = ragged_all_to_all(taken, np.zeros_like(copies), back)
    check_travels(sizes, copies, arrived, taken, returned)


def check_travels(sizes: Any, copies: Any, arrived: Any, taken: Any, returned: Any) -> None:
    """Checks, for each device, what arrived at its experts and what came back to it."""
    peers, each = len(sizes), sizes.shape[1] // len(sizes)
    begin = np.cumsum(sizes, axis=1) - sizes
    for device in range(peers):
        mine = range(device * each, (device + 1) * each)
        wanted = np.concatenate(
            [
                copies[source, begin[source, e] : begin[source, e] + sizes[source, e]]
                for e in mine
                for source in range(peers)
            ]
        )
        np.testing.assert_array_equal(taken[device, : len(wanted)], wanted)
        np.testing.assert_array_equal(arrived[device], sizes.sum(0)[list(mine)])
        sent = sizes[device].sum()
        np.testing.assert_array_equal(returned[device, :sent], copies[device, :sent])
        assert not returned[device, sent:].any()


def ragged_all_to_all(operand: Any, output: Any, journey: Any) -> Any:
    """What the documentation of `jax.lax.ragged_all_to_all` says, for all devices at once."""
    output, (peers, slices) = output.copy(), journey.send_sizes.shape
    received = np.zeros_like(journey.recv_sizes)
    for sender in range(peers):
        for i in range(slices):
            receiver, number = divmod(i, slices // peers)
            size = journey.send_sizes[sender, i]
            begin, end = journey.input_offsets[sender, i], journey.output_offsets[sender, i]
            output[receiver, end : end + size] = operand[sender, begin : begin + size]
            received[receiver, sender * (slices // peers) + number] = size
    np.testing.assert_array_equal(received, journey.recv_sizes)
    return output


def collectives_of_a_layer(
    strategy: str, capacity: float
) -> tuple[DecoderConfig, list[Collective]]:
    """Returns one layer's sizes, and the collectives of both passes over 8 rows of 64 tokens."""
    tiny, abstract = abstract_layer("gpt_oss_gqa", capacity)
    config, placement = tiny.architecture.config, place(strategy)
    shardings = placement.shardings(abstract.params, abstract.axes)
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
        abstract.params,
        shardings,
    )
    x = jax.ShapeDtypeStruct((8, 64, config.embed), jnp.float32, sharding=placement.rows)
    real = np.ones((8, 64), bool)

    def gradients(params: Any, x: Any) -> Any:
        module = functools.partial(merge, abstract.graphdef)
        return _value_and_gradients(module, params, x, real=real)[1]

    with placement.activate():
        lowered = jax.jit(gradients, out_shardings=(shardings, placement.rows)).lower(params, x)
    return config, collectives(str(lowered.compile().as_text()), placement.mesh)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_tokens_travel_by_all_to_all_and_gradients_are_reduce_scattered(capacity):
    config, found = collectives_of_a_layer("fsdp_ep", capacity)
    tokens = 64 * config.embed * 4  # bytes of a device's
    weights = 2 * config.embed * config.mlp * 4  # of a device's experts, gathered
    travelling = [c for c in found if c.kind == "all-to-all" and c.bytes >= tokens]
    assert len(travelling) == 4  # there and back, in both passes
    assert {c.axes for c in travelling} == {("expert",)}
    scattered = [c for c in found if c.kind == "reduce-scatter" and weights in c.arrays]
    assert [c.axes for c in scattered] == 3 * [("fsdp",)]
    gathered = [c for c in found if c.kind == "all-gather"]
    assert {c.axes for c in gathered if c.bytes >= weights} == {("fsdp",)}
    assert max(c.bytes for c in gathered) == weights < tokens
    # Only parts of gradients are summed whole: those that the devices of `fsdp` have left.
    for one in found:
        assert one.kind != "all-reduce" or max(one.arrays) <= weights // 2


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    config, params, module = one_layer("gpt_oss_gqa")
    x, real = tokens_of(config, rows=8), np.ones((8, 12), bool)
    with place("fsdp").activate():
        kept = jax.eval_shape(
            lambda params, x: jax.vjp(lambda *args: module(args[0])(args[1], real)[0], params, x)[
                1
            ],
            params,
            x,
        )
    # Of eight devices together: copies of tokens at most, not eight times the weights.
    copies = 8 * 12 * config.experts.chosen * config.embed
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= copies < 8 * params["up.w"].size


@pytest.mark.slow(seconds=5)
def test_a_pipeline_runs_experts_of_several_stages_at_once():
    rules = {"layers": "stage", "batch": "expert", "act_experts": "expert", "experts": "expert"}
    strategy = Strategy(mesh_axes=("stage", "expert"), fill="expert", rules=rules)
    placement = Placement("staged", strategy, make_mesh({"stage": 2}, strategy, name="staged"))
    config, params, module = one_layer("gpt_oss_gqa")
    params = {path: jnp.stack([value, 1.5 * value]) for path, value in params.items()}
    x = np.stack([tokens_of(config, rows=4), tokens_of(config, rows=4)[::-1]])
    real = np.broadcast_to(np.arange(12) < np.array([[12], [5], [1], [0]]), (2, 4, 12))

    def gradients(params: Any, x: Any, *, axis: str | None) -> Any:
        def total(params: Any, x: Any) -> Any:
            stages = jax.vmap(lambda p, x, real: module(p)(x, real)[0], spmd_axis_name=axis)
            return jnp.sum(jnp.sin(3.0 * stages(params, x, real)))

        return jax.value_and_grad(total, argnums=(0, 1))(params, x)

    expected = jax.jit(functools.partial(gradients, axis=None))(params, x)
    with placement.activate():
        found = jax.jit(functools.partial(gradients, axis="stage"))(params, x)
    assert relative_error(found, expected) < 1e-5


def test_splits_that_experts_cannot_work_under_are_refused_together():
    strategy = Strategy(
        mesh_axes=("data", "context"),
        fill="data",
        rules={"batch": "data", "seq": "context", "act_experts": "data", "experts": "data"},
    )
    placement = Placement("mine", strategy, make_mesh({"context": 2}, strategy, name="mine"))
    check_experts(placement, capacity=0.0)
    with pytest.raises(ConfigError, match=r"expert_capacity 1\.5 counts the tokens of a whole row"):
        check_experts(placement, capacity=1.5)
    strategy = dataclasses.replace(strategy, rules=dict(strategy.rules) | {"batch": ()})
    placement = dataclasses.replace(placement, strategy=strategy)
    with pytest.raises(ConfigError, match="act_experts over mesh axis 'data'") as caught:
        check_experts(placement, capacity=1.5)
    assert len(caught.value.problems) == 2


@compiles_for_tpu
@pytest.mark.parametrize(
    ("capacity", "kind", "count"),
    # There and back; both again in the backward pass; and of their gradients.
    [(0.0, "ragged-all-to-all", 6), (1.25, "all-to-all", 6)],
)
def test_the_step_with_experts_on_other_devices_compiles_for_a_tpu(capacity, kind, count):
    config = RunConfig(strategy="fsdp_ep")
    config.mesh.expert = config.mesh.fsdp = 2
    config.model.expert_capacity = capacity
    config.data.max_length, config.train.batch_size = 512, 4
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_local_experts": 8, "head_dim": 64}
    architecture = architecture_from_hf(CASES["gpt_oss_gqa"] | sizes)
    placement = program.make_placement(config, tpu_devices("v5e:2x2"))
    evaluator = program.build_evaluator(config, architecture, max_segments=8, placement=placement)
    built = program.build(config, evaluator, steps=10)
    text = built.lower().compile().as_text()
    found = collectives(text, placement.mesh)
    tokens = 512 * architecture.config.embed * 2  # bytes of a device's, in bfloat16
    travelling = [c for c in found if c.kind == kind and c.bytes > tokens]
    layers = architecture.config.layers
    assert sum(c.count for c in travelling) == count * layers
    assert {c.axes for c in travelling} == {("expert",)}
    gathered = [c.bytes for c in found if c.kind == "all-gather"]
    assert max(gathered) <= layers * 8 // 2 * 256 * 256 * 2  # experts of a device


@pytest.mark.slow(seconds=5)
def test_the_balance_loss_moves_the_router_towards_unused_experts():
    tiny = load_tiny("mixtral_tied")
    batch = random_rows(4, 24, 64)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, balance):
        def total(params):
            judged = bind(ObjectiveConfig(chunk=0, balance=balance)).judge(
                tiny.merge(params), batch
            )
            return judged.auxiliary / judged.terms.weight, judged.auxiliary

        return jax.value_and_grad(total, has_aux=True)(params)

    params, values = dict(tiny.params), []
    for _ in range(20):
        (value, _), gradients = gradient(params, 1.0)
        values.append(float(value))
        router = "layers.mlp.router.w"
        params[router] = params[router] - 0.3 * gradients[router]
    assert values[-1] < values[0] - 0.02
    assert values[-1] > 1.9  # the chosen experts of a token: 2 with perfect balance
    (off, auxiliary), _ = gradient(tiny.params, 0.0)
    assert off == auxiliary == 0


@pytest.mark.slow(seconds=3)
def test_experts_without_a_mesh_and_under_a_placement_trace_alike():
    config, params, module = one_layer("qwen3_moe_gqa_published")
    x, real = tokens_of(config, rows=8), np.ones((8, 12), bool)
    expected, _ = module(params)(x, real)
    with make_placement(RunConfig(strategy="fsdp")).activate():
        found, _ = jax.jit(lambda p: module(p)(x, real))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_router_is_never_computed_in_fewer_bits():
    tiny = load_tiny("mixtral_tied", make_numerics("mixed"))
    batch = random_rows(2, 16, 64)
    objective = bind(ObjectiveConfig(chunk=0))
    total = jax.make_jaxpr(lambda p: objective.judge(tiny.merge(p), batch).terms.total)
    text = str(total(tiny.params))
    # [B, T, D] x [E, D] in float32 at the highest precision.
    assert re.search(r"f32\[2,16,4\] = dot_general\[[^=]*=[^=]*=\(Precision\.HIGHEST", text)


@pytest.mark.parametrize(("length", "capacity"), [(64, 1.5), (256, 1.5)])
def test_memory_of_slots_grows_with_tokens_and_not_with_their_square(length, capacity):
    config, params, module = one_layer("qwen3_moe_gqa_published", capacity)
    x = jax.ShapeDtypeStruct((1, length, config.embed), jnp.float32)
    real = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    jaxpr = jax.make_jaxpr(lambda x, real: module(params)(x, real))(x, real)
    avals: list[Any] = [v.aval for e in jaxpr.jaxpr.eqns for v in e.outvars]
    largest = max(aval.size for aval in avals)
    # Tokens times the largest of: choices by experts, slots by width.
    slots = capacity * config.experts.chosen
    assert largest <= length * max(config.experts.chosen * 4, slots * config.embed) + 2048


@pytest.mark.slow(seconds=11)
def test_evaluation_drops_no_token():
    tiny = load_tiny("mixtral_tied")
    program = make_program(tiny, model__expert_capacity=0.5)
    rows = random_rows(8, 24, 64)
    state = start(program, tiny.params)
    terms = program.evaluator.eval_step(state.params, rows)
    exact = bind(ObjectiveConfig(chunk=0)).rows(tiny.merge(), rows)
    np.testing.assert_allclose(terms.total, exact.total, rtol=1e-5)
    _, metrics = program.train_step(state, {}, feed(program, rows))
    assert metrics.ratios["expert_dropped"][0] > 0
    assert abs(float(metrics.ratios["loss"][0] / exact.total.sum()) - 1) > 1e-3
