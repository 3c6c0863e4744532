"""Meshes, rules and strategies, and every way a layout cannot be."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxft.config import RunConfig
from jaxft.errors import ConfigError
from jaxft.models.config import Numerics
from jaxft.models.families import architecture_from_hf
from jaxft.sharding.mesh import _lines, make_mesh
from jaxft.sharding.rules import Placement, Strategy, constrain, if_divisible, load_strategy
from jaxft.training.program import build, build_evaluator, make_placement
from tests.oracle.cases import CASES
from tests.tpu import compiles_for_tpu, tpu_devices


def place(strategy: str, **mesh: int) -> Placement:
    config = RunConfig(strategy=strategy)
    for axis, size in mesh.items():
        setattr(config.mesh, axis, size)
    return make_placement(config)


def placement_of(strategy: Strategy, **sizes: int) -> Placement:
    return Placement("mine", strategy, make_mesh(sizes, strategy, name="mine"))


def test_optimizer_state_follows_its_parameter_and_counters_are_replicated():
    config = RunConfig(strategy="fsdp_tp")
    config.mesh.tensor = 2
    config.data.max_length, config.train.batch_size = 16, 8
    placement = make_placement(config)
    architecture = architecture_from_hf(CASES["gqa"])
    evaluator = build_evaluator(config, architecture, max_segments=1, placement=placement)
    state = build(config, evaluator, steps=1).state
    moments = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        if leaf.shape == ():
            assert leaf.sharding.is_fully_replicated
            continue
        name = path[-1].key
        assert leaf.shape == state.trainable[name].shape
        assert leaf.sharding == state.trainable[name].sharding == evaluator.shardings[name]
        moments += 1
    assert moments == 2 * len(state.trainable)
    assert state.trainable["layers.mlp.up.w"].sharding.spec == P(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    ("strategy", "sizes", "expected"),
    [
        ("ddp", {}, {"data": 8}),
        ("fsdp", {}, {"data": 1, "fsdp": 8}),
        ("fsdp", {"data": 2}, {"data": 2, "fsdp": 4}),
        ("fsdp", {"data": -1, "fsdp": 2}, {"data": 4, "fsdp": 2}),
        ("fsdp", {"tensor": 1}, {"data": 1, "fsdp": 8}),
        ("fsdp_tp", {"tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}),
        ("fsdp_tp", {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
        ("fsdp", {"data": 2, "fsdp": 2}, {"data": 2, "fsdp": 2}),
        ("fsdp_tp", {"tensor": -1}, {"data": 1, "fsdp": 1, "tensor": 8}),
    ],
)
def test_a_mesh_takes_the_sizes_asked_for_and_fills_the_rest(strategy, sizes, expected):
    assert dict(place(strategy, **sizes).mesh.shape) == expected


@pytest.mark.parametrize(
    ("strategy", "sizes", "message"),
    [
        (
            "fsdp",
            {"data": 3},
            "data=3 x fsdp=-1 does not fit 8 devices: .*multiply to 8, .*1, 2, 4, 8",
        ),
        ("fsdp", {"data": 4, "fsdp": 4}, "data=4 x fsdp=4 does not fit 8 devices"),
        ("fsdp", {"data": 16}, "data=16 x fsdp=-1 does not fit 8 devices"),
        (
            "ddp",
            {"tensor": 2},
            "mesh.tensor is 2, but strategy 'ddp' has no axis 'tensor'; its axes are data. "
            "Set --config.mesh.tensor=0, or .* fsdp_tp, fsdp_tp_sp, pp_fsdp_tp, tp",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(strategy, sizes, message):
    with pytest.raises(ConfigError, match=message):
        place(strategy, **sizes)


def test_an_unknown_axis_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown axis 'embd'\. Did you mean 'embed'"):
        Strategy(mesh_axes=("data",), fill="data", rules={"embd": "data"})
    with place("ddp").activate(), pytest.raises(ConfigError, match=r"'act_heds'.*'act_heads'"):
        constrain(jnp.zeros(2), "act_heds")


def test_rules_name_axes_of_the_mesh():
    with pytest.raises(ConfigError) as error:
        Strategy(mesh_axes=("data",), fill="dat", rules={"mlp": if_divisible("tensor")})
    assert error.value.problems == [
        "strategy: 'dat' is not one of its mesh axes, data.",
        "strategy: 'tensor' is not one of its mesh axes, data.",
    ]


def test_every_size_that_does_not_divide_is_named_with_both_numbers():
    placement = place("fsdp_tp", tensor=8)
    abstract = architecture_from_hf(CASES["gqa"] | {"intermediate_size": 44}).abstract(Numerics())
    with pytest.raises(ConfigError) as error:
        placement.shardings(abstract.params, abstract.axes)
    problems = error.value.problems
    paths = [re.search(r"cannot shard (\S+):", problem)[1] for problem in problems]
    assert set(paths) == {
        "layers.attn.q.w",
        "layers.attn.o.w",
        "layers.mlp.gate.w",
        "layers.mlp.up.w",
        "layers.mlp.down.w",
    }
    assert (
        "strategy 'fsdp_tp' cannot shard layers.attn.q.w: axis 'heads' has size 4, mesh axis "
        "'tensor' has size 8. Use a mesh size that divides 4, or map 'heads' to "
        "if_divisible('tensor')."
    ) in problems


def test_a_dimension_that_may_stay_whole_does_where_it_does_not_divide():
    strategy = Strategy(
        mesh_axes=("a", "b"), fill="b", rules={"mlp": if_divisible("a", "b"), "vocab": "a"}
    )
    placement = placement_of(strategy, a=2)
    assert placement.spec(("mlp", "vocab"), (12, 6), "w") == P(None, "a")
    assert placement.spec(("mlp", "norm"), (16, 6), "w") == P(("a", "b"), None)
    with pytest.raises(ConfigError, match="'batch' to if_divisible; name the mesh axes"):
        _ = placement_of(
            Strategy(mesh_axes=("a",), fill="a", rules={"batch": if_divisible("a")})
        ).batch_axes


def test_a_mesh_axis_serves_one_dimension_of_an_array():
    strategy = Strategy(mesh_axes=("a",), fill="a", rules={"embed": "a", "mlp": "a"})
    with pytest.raises(ConfigError, match=r"two dimensions of w .* over mesh axis 'a'"):
        placement_of(strategy).spec(("embed", "mlp"), (8, 8), "w")


def test_an_override_replaces_what_the_rules_give():
    strategy = Strategy(
        mesh_axes=("a",), fill="a", rules={"embed": "a"}, overrides=((r"head\.w$", P(None, "a")),)
    )
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    found = placement_of(strategy).shardings(
        {"head.w": shape, "other.w": shape},
        {"head.w": ("embed", "vocab"), "other.w": ("embed", "vocab")},
    )
    assert found["head.w"].spec == P(None, "a")
    assert found["other.w"].spec == P("a", None)


@pytest.mark.parametrize("axis", ["layers", "seq"])
def test_what_depends_on_a_split_cannot_be_split_or_not_by_size(axis):
    strategy = Strategy(mesh_axes=("a",), fill="a", rules={axis: if_divisible("a")})
    with pytest.raises(ConfigError, match=f"maps '{axis}' to if_divisible; name the mesh axes"):
        placement_of(strategy).split(axis)


def test_a_strategy_can_come_from_any_importable_module(monkeypatch):
    module = types.ModuleType("theirs.layout")
    module.STRATEGY = Strategy(mesh_axes=("x",), fill="x", rules={"batch": "x", "mlp": "x"})
    monkeypatch.setitem(sys.modules, "theirs", types.ModuleType("theirs"))
    monkeypatch.setitem(sys.modules, "theirs.layout", module)
    placement = place("theirs.layout")
    assert placement.name == "theirs.layout"
    assert placement.spec(("mlp",), (16,), "w") == P("x")
    assert placement.batch_shards == 8


def test_an_unknown_strategy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'fsd'; known: cp, ddp, .*'fsdp'\?"):
        load_strategy("fsd")
    with pytest.raises(ConfigError, match=r"Unknown strategy 'nobody\.has\.this'; known: cp"):
        load_strategy("nobody.has.this")
    for name in ("json.decoder", "json", "sys"):
        with pytest.raises(ConfigError, match=rf"'{name}' cannot be used: .* defines no STRATEGY"):
            load_strategy(name)


def test_a_strategy_in_the_working_folder_needs_no_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "its_rules.py").write_text("RULES = {'batch': 'x'}\n")
    (tmp_path / "two_way.py").write_text(
        "from its_rules import RULES\nfrom jaxft.sharding.rules import Strategy\n"
        "STRATEGY = Strategy(mesh_axes=('x',), fill='x', rules=RULES)\n"
    )
    (tmp_path / "json.py").write_text("STRATEGY = 1\n")
    path = list(sys.path)
    assert place("two_way").batch_shards == 8
    for name in ("two_way", "its_rules"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="json/__init__"):
        load_strategy("json")  # a module of the folder hides none of the library
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("STRATEGY = 1 +", "SyntaxError"),
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("STRATEGY = {}", "defines no STRATEGY of the type"),
        (
            "from jaxft.sharding.rules import Strategy\nSTRATEGY = Strategy(('x',), {}, fill='y')",
            "'y' is not one of its mesh axes",
        ),
    ],
)
def test_a_strategy_that_cannot_be_imported_says_why(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_layout.py").write_text(text)
    monkeypatch.delitem(sys.modules, "broken_layout", raising=False)
    with pytest.raises(ConfigError, match=f"'broken_layout' cannot be used: .*{said}"):
        load_strategy("broken_layout")
    sys.modules.pop("broken_layout", None)


def test_constraints_are_the_identity_without_a_strategy():
    x = jnp.ones((4, 4))
    assert constrain(x, "batch", "seq") is x


def test_constraints_place_activations_while_a_strategy_is_active():
    placement = place("fsdp_tp", tensor=2)

    def double(x):
        with placement.activate():
            return constrain(2 * x, "batch", "seq", "act_mlp")

    out = jax.jit(double)(jnp.ones((4, 3, 6)))
    assert out.sharding.spec == P("fsdp", None, "tensor")


@compiles_for_tpu
def test_the_axis_across_slices_spans_them_and_all_others_stay_within():
    devices = tpu_devices("v5e:2x4", num_slices=2)

    def slices_along(strategy: str, axis: str, **sizes: int) -> tuple[dict, set[int]]:
        config = RunConfig(strategy=strategy)
        for name, size in sizes.items():
            setattr(config.mesh, name, size)
        mesh = make_placement(config, devices).mesh
        index = [0] * len(mesh.axis_names)
        index[mesh.axis_names.index(axis)] = slice(None)
        return dict(mesh.shape), {device.slice_index for device in mesh.devices[tuple(index)]}

    assert slices_along("hsdp", "fsdp") == ({"data": 2, "fsdp": 8}, {0})
    assert slices_along("hsdp", "data") == ({"data": 2, "fsdp": 8}, {0, 1})
    assert slices_along("hsdp", "fsdp", data=4)[1] == {0}
    assert slices_along("fsdp_tp", "tensor", tensor=4)[1] == {0}
    with pytest.raises(ConfigError, match=r"mesh.data is 1, and there are 2 slices.*multiple of 2"):
        slices_along("hsdp", "data", data=1)
    assert slices_along("fsdp", "fsdp") == ({"data": 1, "fsdp": 16}, {0, 1})


@pytest.mark.parametrize(
    ("coordinates", "sizes"),
    [
        ([(0, 0)], (1,)),
        ([(x, 0) for x in range(8)], (8,)),
        ([(x, y) for x in range(8) for y in range(4)], (8, 4)),
        ([(y, x) for x in range(8) for y in range(4)], (8, 4)),
        ([(x, y, z) for x in range(4) for y in range(2) for z in range(3)], (4, 2, 3)),
        ([(x, y, z) for x in range(4) for y in range(1) for z in range(3)], (4, 3)),
        ([(0, 0), (1, 1), (2, 0), (3, 1)], None),
        ([()] * 8, (8,)),
    ],
)
def test_an_axis_is_cut_where_the_network_changes_its_dimension(coordinates, sizes):
    assert _lines(coordinates) == sizes
