"""Collectives read from compiled programs: closed forms, and the dialects of several compilers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.compiled.collectives import Collective, collectives, summary
from jaxft.compiled.hlo import shape_bytes
from jaxft.config import RunConfig
from jaxft.models.families import architecture_from_hf
from jaxft.training.program import build, build_evaluator, make_placement
from tests.oracle.cases import CASES


def mesh_of(order=range(8), **sizes: int) -> Mesh:
    devices = np.array(jax.devices())[list(order)].reshape(tuple(sizes.values()))
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


MESH = mesh_of(a=2, b=4)


def compiled(
    function, *, mesh: Mesh = MESH, dtype=jnp.float32, axes=("a", "b")
) -> list[Collective]:
    """Runs a function on a `[16, 8]` block per device."""
    x = jax.ShapeDtypeStruct((16 * mesh.size, 8), dtype, sharding=NamedSharding(mesh, P(axes)))
    inner = jax.shard_map(function, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False)
    return collectives(jax.jit(inner).lower(x).compile().as_text(), mesh)


BLOCK = 16 * 8 * 4


@pytest.mark.parametrize(
    ("kind", "function", "axes", "size", "payload", "wire"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "b"), ("b",), 4, BLOCK, 2 * BLOCK * 3 / 4),
        ("all-reduce", lambda x: jax.lax.pmax(x, ("b", "a")), ("a", "b"), 8, BLOCK, BLOCK * 7 / 4),
        (
            "all-gather",
            lambda x: jax.lax.all_gather(x, "b", tiled=True),
            ("b",),
            4,
            4 * BLOCK,
            3 * BLOCK,
        ),
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "a", tiled=True),
            ("a",),
            2,
            BLOCK,
            BLOCK / 2,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True),
            ("b",),
            4,
            BLOCK,
            BLOCK * 3 / 4,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
            ("b",),
            4,
            BLOCK,
            BLOCK,
        ),
    ],
)
def test_a_primitive_is_found_with_its_axes_and_bytes(kind, function, axes, size, payload, wire):
    [found] = compiled(function)
    assert (found.kind, found.axes, found.group_size) == (kind, axes, size)
    assert (found.count, found.exact, found.across_slices) == (1, True, False)
    assert (found.bytes, found.wire_bytes) == (payload, wire)


def test_devices_are_numbered_by_their_place_in_the_mesh():
    swapped = mesh_of([0, 4, 1, 5, 2, 6, 3, 7], x=4, y=2)
    [found] = compiled(lambda x: jax.lax.psum(x, "y"), mesh=swapped, axes=("x", "y"))
    assert (found.axes, found.group_size) == (("y",), 2)


def test_a_loop_counts_as_often_as_it_runs_and_loops_multiply():
    def nested(x):
        def outer(c, _):
            c = jax.lax.psum(c, "a")
            c, _ = jax.lax.scan(lambda d, _: (jax.lax.psum(d, "b"), None), c, length=3)
            return c, None

        return jax.lax.scan(outer, x, length=5)[0]

    found = {one.axes: one for one in compiled(nested)}
    assert {axes: one.count for axes, one in found.items()} == {("a",): 5, ("b",): 15}
    [total] = summary([found["b",], found["b",]])
    assert (total.count, total.bytes, total.wire_bytes) == (30, 30 * BLOCK, 45 * BLOCK)


def test_a_loop_of_unknown_length_is_marked():
    def until_small(x):
        steps = x[0, 0].astype(jnp.int32)
        return jax.lax.fori_loop(0, steps, lambda _, c: jax.lax.psum(c, "a"), x)

    [found] = compiled(until_small)
    assert (found.count, found.exact) == (1, False)
    assert not summary([found])[0].exact


@pytest.mark.parametrize("larger_first", [True, False])
def test_of_a_conditional_the_branch_that_sends_most_counts(larger_first):
    def choose(x):
        small = lambda: jnp.tile(jax.lax.psum(x[:2], "b"), (8, 1))  # noqa: E731
        large = lambda: jax.lax.psum(x, "b")  # noqa: E731
        branches = (large, small) if larger_first else (small, large)
        return jax.lax.cond(x[0, 0] > 0, *branches)

    [found] = compiled(choose)
    assert found.bytes == BLOCK


def test_arrays_that_are_reduced_together_are_added_up():
    def pair(x):
        both = jax.lax.psum((x, x[:, :4] * x[0, 0]), "b")
        return jnp.concatenate(both, axis=1)

    found = compiled(pair)
    assert sorted(size for one in found for size in one.arrays) == [BLOCK // 2, BLOCK]
    assert sum(one.bytes for one in found) == BLOCK * 3 // 2


def test_what_one_device_does_alone_is_no_collective():
    assert compiled(lambda x: jax.lax.psum(x, "a"), mesh=mesh_of(a=1, b=8)) == []


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[3,5]{1,0}", 60),
        ("bf16[16,128]{1,0:T(8,128)(2,1)S(1)}", 4096),
        ("pred[7]{0}", 7),
        ("s4[5]{0:E(4)}", 3),
        ("f8e4m3fn[2,2]{1,0}", 4),
        ("f4e2m1fn[8]{0}", 4),
        ("c64[2]", 16),
        ("s64[]", 8),
        ("u32[<=10]", 40),
        ("(f32[2]{0}, (bf16[3]{0}, u8[0]{0}), /*index=2*/token[])", 14),
    ],
)
def test_bytes_of_a_shape(shape, expected):
    assert shape_bytes(shape) == expected


TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions={devices}

ENTRY %main (p: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, \
use_global_device_ids=true, to_apply=%add
}}
"""


def written(groups: str, mesh: Mesh) -> Collective:
    [found] = collectives(TEXT.format(groups=groups, devices=mesh.size), mesh)
    return found


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("z",), 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("x",), 2),
        ("{{0,1,2,3},{4,5,6,7}}", ("y", "z"), 4),
        ("{}", ("x", "y", "z"), 8),
        ("[4,2]<=[8]", ("z",), 2),
        ("[1,8]<=[8]", ("x", "y", "z"), 8),
        ("[4,2]<=[2,4]T(1,0)", ("x",), 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("y",), 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("x", "z"), 4),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", ("x", "z"), 4),
        ("mesh['axis_0'=8] {'axis_0'}", ("x", "y", "z"), 8),
        # Parts of an axis: 8 = 4 x 2, the first or the second; and the middle of 2 x 2 x 2.
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("z",), 2),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("x", "y"), 4),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", ("y",), 2),
        ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", ("x", "z"), 4),
        # Meshes that count their devices in another order.
        ("mesh['u'=2,'v'=4], device_ids=([4,2]T(1,0)) {'u'}", ("z",), 2),
        ("mesh['u'=4,'v'=2], device_ids=(0,4,1,5,2,6,3,7) {'v'}", ("x",), 2),
    ],
)
def test_every_form_of_groups_gives_the_mesh_axes(groups, axes, size):
    found = written(groups, mesh_of(x=2, y=2, z=2))
    assert (found.axes, found.group_size, found.bytes) == (axes, size, 256)


def test_groups_over_any_axes_of_a_mesh_are_told_apart():
    mesh = mesh_of(x=2, y=1, z=2, w=2)
    places = np.arange(8).reshape(2, 1, 2, 2)
    shape = ",".join(f"'{name}'={mesh.shape[name]}" for name in mesh.axis_names)
    for count in (1, 2, 3):
        for axes in itertools.combinations("xzw", count):
            kept = [i for i, name in enumerate(mesh.axis_names) if name not in axes]
            moved = [i for i, name in enumerate(mesh.axis_names) if name in axes]
            groups = places.transpose(kept + moved).reshape(-1, 2**count).tolist()
            explicit = str(groups).replace("[", "{").replace("]", "}").replace(" ", "")
            named = f"mesh[{shape}] {{{','.join(map(repr, axes))}}}"
            for form in (explicit, named):
                found = written(form, mesh)
                assert (found.axes, found.group_size) == (axes, 2**count)


def test_a_part_of_an_axis_is_found_by_the_compiler_itself():
    mesh = mesh_of(a=4, b=2)
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, P("a")))

    def halves(x):
        return jax.lax.with_sharding_constraint(
            x.reshape(2, 8, 16).sum(1), NamedSharding(mesh, P())
        )

    found = collectives(jax.jit(halves).lower(x).compile().as_text(), mesh)
    assert [(one.kind, one.axes, one.group_size, one.bytes) for one in found] == [
        ("all-reduce", ("a",), 2, 64),
        ("all-gather", ("a",), 2, 128),
    ]


def test_a_program_for_other_devices_is_refused():
    with pytest.raises(ValueError, match="for 4 devices, the mesh has 8"):
        collectives(TEXT.format(groups="{}", devices=4), MESH)


def test_asynchronous_collectives_are_counted_once():
    text = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%wrapped (q: f32[64]) -> f32[16] {
  %q = f32[64]{0} parameter(0)
  ROOT %rs = f32[16]{0} reduce-scatter(%q), channel_id=3, replica_groups=[2,4]<=[8], \
use_global_device_ids=true, dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %ags = (f32[64]{0}, f32[256]{0}) all-gather-start(%p), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}, use_global_device_ids=true
  %agd = f32[256]{0} all-gather-done(%ags)
  %cps = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(f32[64]{0} %p), \
channel_id=2, source_target_pairs={{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}
  %cpd = f32[64]{0} collective-permute-done(%cps)
  %rss = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%p), calls=%wrapped
  %rsu = ((f32[64]{0}), f32[16]{0}, u32[]) async-update(%rss), calls=%wrapped
  %rsd = f32[16]{0} async-done(%rsu), calls=%wrapped
  ROOT %r = f32[64]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""
    found = collectives(text, mesh_of(x=2, y=2, z=2))
    assert [(one.kind, one.axes, one.group_size, one.bytes) for one in found] == [
        ("all-gather", ("y", "z"), 4, 1024),
        ("collective-permute", ("z",), 2, 256),
        ("reduce-scatter", ("y", "z"), 4, 256),
        ("all-reduce", ("y", "z"), 4, 256),
    ]


# As XLA for TPU writes them: loops without their length, a collective in three fusions, and a
# reduce-scatter as a fusion of the sum and the slice.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%start (s.0: bf16[64]) -> (bf16[64], bf16[512]) {
  %s.0 = bf16[64]{0:T(1024)(128)(2,1)} parameter(0)
  %ag.0 = bf16[512]{0:T(1024)} all-gather(%s.0), channel_id=9, replica_groups=\
mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %cc.0 = (bf16[64]{0}, bf16[512]{0}) custom-call(%s.0, %ag.0), \
custom_call_target="AsyncCollectiveStart"
}

%done (s.1: bf16[64]) -> bf16[512] {
  %s.1 = bf16[64]{0:T(1024)(128)(2,1)} parameter(0)
  %ag.1 = bf16[512]{0:T(1024)} all-gather(%s.1), channel_id=9, replica_groups=\
mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %cc.1 = bf16[512]{0} custom-call(%s.1, %ag.1), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (t: f32[512]) -> f32[64] {
  %t = f32[512]{0:T(1024)S(1)} parameter(0)
  %ar = f32[512]{0:T(1024)} all-reduce(%t), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, \
use_global_device_ids=true, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %ds = f32[64]{0:T(1024)S(1)} dynamic-slice(%ar, %zero), dynamic_slice_sizes={64}
}

%next (n.0: s32[], n.1: s32[]) -> s32[] {
  %n.0 = s32[] parameter(0)
  %n.1 = s32[] parameter(1)
  ROOT %add.1 = s32[] add(%n.0, %n.1)
}

%body (b: (s32[], bf16[64], f32[512], s32[])) -> (s32[], bf16[64], f32[512], s32[]) {
  %b = (s32[], bf16[64]{0}, f32[512]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = bf16[64]{0} get-tuple-element(%b), index=1
  %g = f32[512]{0} get-tuple-element(%b), index=2
  %last.1 = s32[] get-tuple-element(%b), index=3
  %two = s32[] constant(2)
  %f.0 = (bf16[64]{0}, bf16[512]{0}) fusion(%x), kind=kCustom, calls=%start
  %cc = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call", backend_config={"a":"b
}}, metadata={op_name="a text with a line break"}
  %f.1 = bf16[512]{0} fusion(%x), kind=kCustom, calls=%done
  %f.2 = f32[64]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %add.0 = s32[] fusion(%i, %two), kind=kLoop, calls=%next
  ROOT %tuple.1 = (s32[], bf16[64]{0}, f32[512]{0}, s32[]) tuple(%add.0, %x, %g, %last.1)
}

%condition (c: (s32[], bf16[64], f32[512], s32[])) -> pred[] {
  %c = (s32[], bf16[64]{0}, f32[512]{0}, s32[]) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %j = s32[] get-tuple-element(%c), index=0
  %last.2 = s32[] get-tuple-element(%c), index=3
  ROOT %lt = pred[]{:T(512)} compare(%j, %LIMIT), direction=LT
}

ENTRY %main (p: bf16[64], q: f32[512]) -> f32[512] {
  %p = bf16[64]{0} parameter(0)
  %q = f32[512]{0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %copied = s32[]{:T(128)} copy(%one)
  %end = s32[]{:T(128)} constant(20)
  %tuple.0 = (s32[], bf16[64]{0}, f32[512]{0}, s32[]) tuple(%copied, %p, %q, %end)
  %while = (s32[], bf16[64]{0}, f32[512]{0}, s32[]) while(%tuple.0), condition=%condition, \
body=%body
  ROOT %out = f32[512]{0} get-tuple-element(%while), index=2
}
"""


@pytest.mark.parametrize(("limit", "trips"), [("limit", 5), ("last.2", 10)])
def test_the_dialect_of_tpu_is_understood(limit, trips):
    """From 1 in steps of 2 to 10, which the condition holds, or to 20, which the loop carries."""
    found = collectives(TPU.replace("LIMIT", limit), mesh_of(data=1, fsdp=8))
    assert [(one.kind, one.axes, one.count, one.exact, one.arrays) for one in found] == [
        ("all-gather", ("fsdp",), trips, True, (1024,)),
        ("reduce-scatter", ("fsdp",), trips, True, (2048,)),
    ]


def test_a_loop_whose_step_cannot_be_told_is_marked():
    text = TPU.replace("LIMIT", "limit").replace("add(%n.0, %n.1)", "multiply(%n.0, %n.1)")
    found = collectives(text, mesh_of(data=1, fsdp=8))
    assert [(one.count, one.exact) for one in found] == [(1, False), (1, False)]


@pytest.mark.parametrize(
    ("limit", "direction", "step", "trips"),
    [
        (9, "LE", 2, 5),
        (9, "NE", 2, 4),
        (-9, "NE", -2, 5),
        (8, "NE", 2, None),  # steps over its end
        (9, "NE", -2, None),
        (10, "LT", -2, None),
        (0, "LT", -2, None),
    ],
)
def test_a_loop_is_counted_from_one_by_its_condition(limit, direction, step, trips):
    text = TPU.replace("constant(10)", f"constant({limit})").replace("%LIMIT", "%limit")
    text = text.replace("direction=LT", f"direction={direction}")
    text = text.replace("%two = s32[] constant(2)", f"%two = s32[] constant({step})")
    found = collectives(text, mesh_of(data=1, fsdp=8))
    expected = (1, False) if trips is None else (trips, True)
    assert {(one.count, one.exact) for one in found} == {expected}


def test_a_length_that_is_written_down_may_have_spaces():
    text = TPU.replace("LIMIT", "limit").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count": {"n": "7"}}'
    )
    found = collectives(text, mesh_of(data=1, fsdp=8))
    assert [(one.count, one.exact) for one in found] == [(7, True)] * 2


def test_names_may_be_printed_without_their_sign():
    text = TPU.replace("LIMIT", "limit")
    mesh = mesh_of(data=1, fsdp=8)

    def facts(found: list[Collective]) -> list[tuple]:
        return [(one.kind, one.axes, one.count, one.exact, one.arrays) for one in found]

    assert facts(collectives(text.replace("%", ""), mesh)) == facts(collectives(text, mesh))
    shaped = TEXT.replace("(%p)", "(f32[64]{{0:T(8,128)}} p)")
    assert collectives(shaped.format(groups="{}", devices=8), MESH)[0].bytes == 256


@pytest.mark.parametrize("operands", ["()", "(%q)", "(q)", "(7)"])
def test_a_collective_of_unknown_data_is_refused(operands):
    text = TEXT.replace("(%p)", operands).format(groups="{}", devices=8)
    with pytest.raises(ValueError, match=r"no operands|operand 'q' is not defined"):
        collectives(text, MESH)


SEND = """\
HloModule jit_step, num_partitions=8

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %after = token[] after-all()
  %recv = (f32[64]{0}, u32[], token[]) recv(%after), channel_id=1ATTRIBUTES
  %send = (f32[64]{0}, u32[], token[]) send(%p, %after), channel_id=1ATTRIBUTES
  %sent = token[] send-done(%send), channel_id=1
  %got = (f32[64]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %r = f32[64]{0} get-tuple-element(%got), index=0
}
"""


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_permute_in_two_halves_is_counted_once(quote):
    pairs = f"{quote}{{{{0,1}},{{1,2}},{{2,3}},{{4,5}},{{5,6}},{{6,7}}}}{quote}"
    attributes = f", frontend_attributes={{_xla_send_recv_source_target_pairs={pairs}}}"
    [found] = collectives(SEND.replace("ATTRIBUTES", attributes), MESH)
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", ("b",), 256)


def test_of_halves_with_no_devices_only_those_to_the_host_are_left_out():
    assert collectives(SEND.replace("ATTRIBUTES", ", is_host_transfer=true"), MESH) == []
    with pytest.raises(ValueError, match="send: no pairs of devices"):
        collectives(SEND.replace("ATTRIBUTES", ""), MESH)


def test_a_sum_of_which_only_slices_are_used_outside_a_fusion_is_an_all_reduce():
    """That is what moves twice the bytes: the whole sum is there before it is cut."""
    text = """\
HloModule jit_step, num_partitions=8

ENTRY %main (t: f32[512]) -> f32[64] {
  %t = f32[512]{0} parameter(0)
  %ar = f32[512]{0} all-reduce(%t), channel_id=3, replica_groups={}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %ds = f32[64]{0} dynamic-slice(%ar, %zero), dynamic_slice_sizes={64}
}
"""
    [found] = collectives(text, MESH)
    assert (found.kind, found.bytes) == ("all-reduce", 2048)


@pytest.mark.parametrize(
    ("base", "gathers"), [("broadcast(%zero), dimensions={}", True), ("copy(%whole)", False)]
)
def test_a_sum_of_parts_among_zeros_is_known_to_gather(base, gathers):
    text = f"""\
HloModule jit_step, num_partitions=8

ENTRY %main (t: f32[64], whole: f32[512]) -> f32[512] {{
  %t = f32[64]{{0}} parameter(0)
  %whole = f32[512]{{0}} parameter(1)
  %zero = f32[] constant(0)
  %place = u32[] partition-id()
  %base = f32[512]{{0}} {base}
  %padded = f32[512]{{0}} dynamic-update-slice(%base, %t, %place)
  ROOT %ar = f32[512]{{0}} all-reduce(%padded), channel_id=3, replica_groups={{}}, to_apply=%add
}}
"""
    [found] = collectives(text, MESH)
    assert (found.kind, found.bytes, found.gathers) == ("all-reduce", 2048, gathers)


class OnSlice:
    """A device of which only the slice is asked."""

    def __init__(self, number: int):
        self.slice_index = number


def test_transfers_between_slices_are_collectives_over_the_axis_that_leaves_them():
    text = """\
HloModule jit_step, num_partitions=4

ENTRY %main (p: bf16[256]) -> bf16[256] {
  %p = bf16[256]{0} parameter(0)
  %after = token[] after-all()
  %send = (bf16[256]{0}, u32[], token[]) send(%p, %after), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[256]{0}, u32[], token[]) recv(%after), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %got = (bf16[256]{0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %r = bf16[256]{0} get-tuple-element(%got), index=0
  ROOT %ag = bf16[1024]{0} all-gather(%r), channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
}
"""
    devices = np.array([OnSlice(i // 4) for i in range(8)]).reshape(2, 4)
    mesh = Mesh(devices, ("data", "fsdp"))
    between, within = collectives(text, mesh)
    assert (between.kind, between.axes, between.group_size) == ("all-reduce", ("data",), 2)
    assert (between.bytes, between.wire_bytes, between.across_slices) == (512, 512, True)
    assert (within.kind, within.axes, within.group_size) == ("all-gather", ("fsdp",), 4)
    assert (within.bytes, within.across_slices) == (2048, False)


@pytest.mark.parametrize(
    ("strategy", "kind", "axis", "left_out"),
    [
        ("ddp", "all-reduce", "data", ()),
        # Those of norms are whole everywhere, and rows of the embedding add up where they live.
        ("zero2", "reduce-scatter", "data", ("norm",)),
        ("fsdp", "reduce-scatter", "fsdp", ("norm", "embed.w")),
    ],
)
@pytest.mark.slow(seconds=4)
def test_training_sums_the_bytes_of_its_gradients_once(strategy, kind, axis, left_out):
    config = RunConfig(strategy=strategy)
    config.model.dtypes, config.data.max_length, config.train.batch_size = "float32", 16, 8
    placement = make_placement(config)
    evaluator = build_evaluator(
        config, architecture_from_hf(CASES["gqa"]), max_segments=1, placement=placement
    )
    program = build(config, evaluator, steps=1)
    text = program.lower().compile().as_text()
    found = [one for one in collectives(text, placement.mesh) if one.kind == kind]
    assert {one.axes for one in found} == {(axis,)}
    summed = {
        path: 4 * math.prod(spec.shape)
        for path, spec in evaluator.abstract.params.items()
        if not any(part in path for part in left_out)
    }
    large = [size for one in found for size in one.count * one.arrays if size > 4]
    assert sum(large) == sum(summed.values())
