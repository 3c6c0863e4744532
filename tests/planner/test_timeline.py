"""When instructions run: what overlaps and what is waited for, in programs written by hand."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxft.compiled.collectives import Reader
from jaxft.compiled.hlo import Module
from jaxft.hardware.chips import Chip, Switch, Torus
from jaxft.planner.network import HOP_SECONDS, Network
from jaxft.planner.timeline import ATTENTION, Kernel, Rates, Simulator, Timeline

# A device that multiplies 1e12 times, and reads 1e9 bytes, a second; its links carry 1e9.
CHIP = Chip(
    name="test",
    kind="test",
    bfloat16=1e12,
    float32=1e12,
    memory=1 << 40,
    bandwidth=1e9,
    network=Torus(dimensions=2, link=1e9),
    host=1e8,
    dcn=2e8,
    clock=1e9,
)
# 4 MB in float32.
ARRAY = "f32[1000,1000]{1,0}"
COPY_SECONDS = 2 * 4e6 / 1e9
KERNEL = Kernel(ATTENTION, 0.0, 0.5)
# An all-gather of a line of four chips brings each three quarters of 4 MB over one link.
GATHER_SECONDS = 3e6 / 1e9 + 3 * HOP_SECONDS


class FakeChip:
    """A chip in a line of four."""

    platform, process_index = "tpu", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.coords, self.slice_index = number, (number % 4, 0, 0), slice_index


def run(
    body: str, *others: str, slices: int = 1, chip: Chip = CHIP, memory: float = 1.0, **rates: bool
) -> Timeline:
    """Plays a program of four devices, or of several slices of them, whose entry is `body`."""
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    text = "HloModule test, is_scheduled=true, num_partitions=4\n\n"
    text += "\n\n".join(others)
    text += f"\n\nENTRY %main (p: f32[1000,1000]) -> f32[1000,1000] {{\n{lines}\n}}\n"
    chips = [[FakeChip(4 * j + i, j) for i in range(4)] for j in range(slices)]
    mesh = Mesh(np.array(chips), ("data", "fsdp"))
    module = Module(text)
    network = Network(chip, mesh, (4, 1))
    simulator = Simulator(
        module,
        Reader(module, mesh),
        network,
        kernels=lambda instruction, _: KERNEL if "kernel" in instruction.name else None,
        rates=Rates(memory=memory, links=1.0, sums=1.0, **rates),
    )
    return simulator.run()


GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"


def test_instructions_run_one_after_the_other():
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %a = {ARRAY} copy({ARRAY} %p)
        ROOT %b = {ARRAY} negate({ARRAY} %a)
        """
    )
    assert found.seconds == pytest.approx(2 * COPY_SECONDS)
    assert [span.kind for span in found.spans] == ["memory", "memory"]


def test_a_product_takes_its_flops_or_its_bytes_whichever_is_longer():
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        ROOT %a = {ARRAY} dot({ARRAY} %p, {ARRAY} %p), {dot}
        """
    )
    assert found.total(kind="matmul") == pytest.approx(max(2e9 / 1e12, 3 * 4e6 / 1e9))


def test_the_compilers_cycles_count_where_they_are_asked_for():
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    cycles = 'backend_config={"estimated_cycles":"50000000"}'
    body = f"""
        %p = {ARRAY} parameter(0)
        ROOT %a = {ARRAY} dot({ARRAY} %p, {ARRAY} %p), {dot}, {cycles}
        """
    assert run(body).seconds == pytest.approx(0.012)
    assert run(body, cycles=True).seconds == pytest.approx(0.05)


def test_a_collective_without_start_and_end_is_waited_for():
    found = run(
        f"""
        %p = f32[250,1000]{{1,0}} parameter(0)
        ROOT %g = {ARRAY} all-gather(f32[250,1000]{{1,0}} %p), {GROUPS}
        """
    )
    assert found.seconds == pytest.approx(GATHER_SECONDS)
    assert found.total(kind="wait ici") == pytest.approx(GATHER_SECONDS)
    assert found.total(lane="ici") == pytest.approx(GATHER_SECONDS)


def started(*between: str) -> str:
    work = "\n".join(between)
    return f"""
        %p = f32[250,1000]{{1,0}} parameter(0)
        %x = {ARRAY} broadcast(f32[250,1000]{{1,0}} %p), dimensions={{}}
        %s = (f32[250,1000]{{1,0}}, {ARRAY}) all-gather-start(f32[250,1000]{{1,0}} %p), {GROUPS}
        {work}
        ROOT %d = {ARRAY} all-gather-done((f32[250,1000]{{1,0}}, {ARRAY}) %s)
        """


def test_what_is_started_runs_beside_other_work():
    nothing = run(started())
    some = run(started(f"%a = {ARRAY} negate({ARRAY} %x)"))
    assert nothing.total(kind="wait ici") == pytest.approx(GATHER_SECONDS)
    # The copy takes longer than the exchange, which is hidden wholly.
    assert some.total(kind="wait ici") == 0
    assert some.seconds == pytest.approx(nothing.seconds - GATHER_SECONDS + COPY_SECONDS)


def test_a_wait_names_what_it_waits_for():
    [wait] = [span for span in run(started()).spans if span.kind == "wait ici"]
    assert wait.name == "s"


def test_two_exchanges_share_the_links():
    small = "f32[250,1000]{1,0}"
    found = run(
        f"""
        %p = {small} parameter(0)
        %s = ({small}, {ARRAY}) all-gather-start({small} %p), {GROUPS}
        %t = ({small}, {ARRAY}) all-gather-start({small} %p), {GROUPS.replace("=1", "=2")}
        %d = {ARRAY} all-gather-done(({small}, {ARRAY}) %s)
        ROOT %e = {ARRAY} all-gather-done(({small}, {ARRAY}) %t)
        """
    )
    assert found.seconds == pytest.approx(2 * GATHER_SECONDS)


def permuted(*pairs: str) -> str:
    """Returns a program that starts permutes of 4 MB, and waits for all at the end."""
    starts = [
        f"%s{i} = ({ARRAY}, {ARRAY}) collective-permute-start({ARRAY} %p), "
        f"channel_id={i + 1}, source_target_pairs={{{one}}}"
        for i, one in enumerate(pairs)
    ]
    ends = [
        f"%d{i} = {ARRAY} collective-permute-done(({ARRAY}, {ARRAY}) %s{i})"
        for i in range(len(pairs))
    ]
    return "\n".join(
        [f"%p = {ARRAY} parameter(0)", *starts, *ends, f"ROOT %r = {ARRAY} bitcast(%p)"]
    )


UP, DOWN = "{0,1},{1,2},{2,3}", "{1,0},{2,1},{3,2}"
HOP = 4e6 / 1e9 + HOP_SECONDS


def test_permutes_share_a_direction_of_the_links_and_not_both():
    assert run(permuted(UP)).seconds == pytest.approx(HOP)
    assert run(permuted(UP, DOWN)).seconds == pytest.approx(HOP)
    assert run(permuted(UP, UP)).seconds == pytest.approx(2 * HOP)


@pytest.mark.parametrize("gather_first", [True, False])
def test_a_gather_takes_both_directions_of_the_links(gather_first):
    small = "f32[250,1000]{1,0}"
    gather = f"%s = ({small}, {ARRAY}) all-gather-start({small} %q), {GROUPS.replace('=1', '=9')}"
    permutes = permuted(UP, DOWN).splitlines()
    place = 1 if gather_first else 3
    permutes[place:place] = [f"%q = {small} slice({ARRAY} %p)", gather]
    permutes.insert(-1, f"%g = {ARRAY} all-gather-done(({small}, {ARRAY}) %s)")
    found = run("\n".join(permutes), memory=1e9)
    assert found.seconds == pytest.approx(HOP + GATHER_SECONDS)


def test_what_goes_to_another_slice_runs_beside_other_work():
    meeting = 'frontend_attributes={_xla_host_transfer_rendezvous="m",'
    kind = '_xla_megascale_transfer_type="ALL_REDUCE"}'
    transfer = f"is_host_transfer=true, {meeting}{kind}"
    pair = f"({ARRAY}, u32[], token[])"

    def step(*between: str) -> Timeline:
        work = "\n".join(between)
        return run(
            f"""
            %p = {ARRAY} parameter(0)
            %token = token[] after-all()
            %s = {pair} send({ARRAY} %p, token[] %token), channel_id=2, {transfer}
            %r = {pair} recv(token[] %token), channel_id=3, {transfer}
            %sent = token[] send-done({pair} %s), channel_id=2
            {work}
            %d = ({ARRAY}, token[]) recv-done({pair} %r), channel_id=3
            ROOT %x = {ARRAY} get-tuple-element(({ARRAY}, token[]) %d), index=0
            """,
            slices=2,
        )

    alone = step()
    beside = step(f"%a = {ARRAY} negate({ARRAY} %p)")
    seconds = 4e6 / CHIP.dcn  # half of the sum goes each way: 2 (2 - 1) / 2 of the payload
    assert alone.total(lane="dcn") == alone.total(kind="wait dcn") == pytest.approx(seconds)
    assert beside.total(kind="wait dcn") == pytest.approx(seconds - COPY_SECONDS)
    assert beside.seconds == pytest.approx(alone.seconds)


def test_whole_float32_takes_a_tpu_six_products():
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    large = "f32[100000,1000]{1,0}"

    def seconds(more: str) -> float:
        return run(
            f"""
            %p = f32[1000,1000]{{1,0:S(1)}} parameter(0)
            %q = f32[100000,1000]{{1,0:S(1)}} parameter(1)
            ROOT %a = f32[100000,1000]{{1,0:S(1)}} dot({large} %q, {ARRAY} %p), {dot}{more}
            """
        ).seconds

    assert seconds(", operand_precision={highest,highest}") == pytest.approx(6 * seconds(""))


@pytest.mark.parametrize("codes", ["s8", "f8e4m3fn"])
def test_codes_are_multiplied_at_their_own_rate(codes):
    chip = dataclasses.replace(CHIP, int8=4e12, float8=4e12)
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"

    def seconds(dtype: str) -> float:
        body = f"""
            %p = {dtype}[1000,1000]{{1,0:S(1)}} parameter(0)
            ROOT %a = bf16[1000,1000]{{1,0:S(1)}} dot(%p, %p), {dot}
            """
        return run(body, chip=chip).seconds

    assert seconds("bf16") == pytest.approx(2e9 / 1e12)
    assert seconds(codes) == pytest.approx(2e9 / 4e12)


def test_on_a_gpu_whole_float32_takes_its_own_rate_and_products_the_share_they_reach():
    gpu = dataclasses.replace(
        CHIP, network=Switch(size=8, link=1e9), float32=1e10, product_share=0.5
    )
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"

    def seconds(more: str) -> float:
        body = f"""
            %p = {ARRAY} parameter(0)
            ROOT %a = {ARRAY} dot({ARRAY} %p, {ARRAY} %p), {dot}{more}
            """
        return run(body, chip=gpu, memory=100.0).seconds

    assert seconds("") == pytest.approx(2e9 / (0.5 * 1e12))
    precise = seconds(", operand_precision={highest,highest}")
    assert precise == pytest.approx(2e9 / (0.5 * gpu.exact))


def test_memory_is_as_fast_as_the_share_that_it_reaches():
    body = f"""
        %p = {ARRAY} parameter(0)
        ROOT %a = {ARRAY} negate({ARRAY} %p)
        """
    assert run(body, memory=0.5).seconds == pytest.approx(2 * COPY_SECONDS)


LOOP = (
    f"""%body (p: (s32[], f32[1000,1000])) -> (s32[], f32[1000,1000]) {{
  %p = (s32[], {ARRAY}) parameter(0)
  %i = s32[]{{:S(2)}} get-tuple-element((s32[], {ARRAY}) %p), index=0
  %one = s32[]{{:S(2)}} constant(1)
  %next = s32[]{{:S(2)}} add(s32[] %i, s32[] %one)
  %x = {ARRAY} get-tuple-element((s32[], {ARRAY}) %p), index=1
  %y = {ARRAY} negate({ARRAY} %x)
  ROOT %t = (s32[], {ARRAY}) tuple(s32[] %next, {ARRAY} %y)
}}""",
    f"""%condition (p: (s32[], f32[1000,1000])) -> pred[] {{
  %p = (s32[], {ARRAY}) parameter(0)
  %i = s32[] get-tuple-element((s32[], {ARRAY}) %p), index=0
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(s32[] %i, s32[] %n), direction=LT
}}""",
)


def test_a_loop_takes_its_body_as_often_as_it_runs():
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %zero = s32[]{{:S(2)}} constant(0)
        %t = (s32[], {ARRAY}) tuple(s32[] %zero, {ARRAY} %p)
        %w = (s32[], {ARRAY}) while((s32[], {ARRAY}) %t), condition=%condition, body=%body
        ROOT %r = {ARRAY} get-tuple-element((s32[], {ARRAY}) %w), index=1
        """,
        *LOOP,
    )
    [loop] = found.loops
    assert loop.trips == 7
    assert found.seconds == pytest.approx(7 * COPY_SECONDS)
    assert found.total(kind="memory") == pytest.approx(7 * COPY_SECONDS)


def test_kernels_take_what_the_caller_says():
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        ROOT %kernel = {ARRAY} custom-call({ARRAY} %p), custom_call_target="tpu_custom_call"
        """
    )
    assert found.total(kind="attention") == 0.5


def test_copies_to_the_host_go_both_ways_at_once():
    host = "f32[1000,1000]{1,0:S(5)}"
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %h = {host} parameter(1)
        %s = ({host}, {ARRAY}, u32[]) copy-start({ARRAY} %p)
        %t = ({ARRAY}, {host}, u32[]) copy-start({host} %h)
        %d = {host} copy-done(({host}, {ARRAY}, u32[]) %s)
        ROOT %e = {ARRAY} copy-done(({ARRAY}, {host}, u32[]) %t)
        """
    )
    assert found.total(lane="host") == pytest.approx(2 * 4e6 / 1e8)
    assert found.seconds == pytest.approx(4e6 / 1e8)


@pytest.mark.parametrize(("other", "times"), [("out", 1), ("in", 2)])
def test_a_part_that_comes_from_the_host_waits_for_what_comes_and_not_for_what_goes(other, times):
    host = "f32[1000,1000]{1,0:S(5)}"
    stack = "f32[4,1000,1000]{2,1,0:S(5)}"
    shape = f"(({stack}, s32[]), {ARRAY}, u32[])"
    copies = {
        "out": f"({host}, {ARRAY}, u32[]) copy-start({ARRAY} %p)",
        "in": f"({ARRAY}, {host}, u32[]) copy-start({host} %g)",
    }
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %g = {host} parameter(1)
        %h = {stack} parameter(2)
        %i = s32[]{{:S(2)}} constant(0)
        %c = {copies[other]}
        %s = {shape} dynamic-slice-start({stack} %h, s32[] %i)
        %e = {ARRAY} copy-done(({ARRAY}, {host}, u32[]) %c)
        ROOT %d = {ARRAY} dynamic-slice-done({shape} %s)
        """
    )
    assert found.total(lane="host") == pytest.approx(2 * 4e6 / 1e8)
    assert found.seconds == pytest.approx(times * 4e6 / 1e8)


def test_an_update_of_what_was_started_is_waited_for_like_it():
    host = "f32[1000,1000]{1,0:S(5)}"
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %s = ({host}, {ARRAY}, u32[]) copy-start({ARRAY} %p)
        %u = ({host}, {ARRAY}, u32[]) async-update(({host}, {ARRAY}, u32[]) %s)
        ROOT %d = {host} copy-done(({host}, {ARRAY}, u32[]) %u)
        """
    )
    assert found.total(kind="wait host") == pytest.approx(4e6 / 1e8)


def test_what_sparse_cores_move_is_beside_the_core():
    moved = (
        f"%moved (p: f32[1000,1000]) -> f32[1000,1000] {{\n"
        f"  %p = {ARRAY} parameter(0)\n  ROOT %r = {ARRAY} copy({ARRAY} %p)\n}}"
    )
    shape = f"(({ARRAY}), {ARRAY}, u32[])"
    for name in ("to_apply", "calls"):
        found = run(
            f"""
            %p = {ARRAY} parameter(0)
            %s = {shape} call-start({ARRAY} %p), {name}=%moved
            %a = {ARRAY} negate({ARRAY} %p)
            ROOT %d = {ARRAY} call-done({shape} %s)
            """,
            moved,
        )
        assert found.total(lane="sparsecore") == pytest.approx(COPY_SECONDS)
        assert found.seconds == pytest.approx(COPY_SECONDS)


def test_a_called_function_takes_the_time_of_what_it_does():
    twice = (
        f"%twice (p: f32[1000,1000]) -> f32[1000,1000] {{\n"
        f"  %p = {ARRAY} parameter(0)\n  %q = {ARRAY} negate({ARRAY} %p)\n"
        f"  ROOT %r = {ARRAY} negate({ARRAY} %q)\n}}"
    )
    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        ROOT %c = {ARRAY} call({ARRAY} %p), to_apply=%twice
        """,
        twice,
    )
    assert found.seconds == found.total(kind="memory") == pytest.approx(2 * COPY_SECONDS)


def test_of_branches_the_mean_counts():
    def branch(name: str, what: str) -> str:
        return (
            f"%{name} (p: f32[1000,1000]) -> f32[1000,1000] {{\n"
            f"  %p = {ARRAY} parameter(0)\n  ROOT %r = {ARRAY} {what}({ARRAY} %p)\n}}"
        )

    found = run(
        f"""
        %p = {ARRAY} parameter(0)
        %i = s32[]{{:S(2)}} constant(0)
        ROOT %c = {ARRAY} conditional(s32[] %i, {ARRAY} %p, {ARRAY} %p), """
        "branch_computations={%b0, %b1}",
        branch("b0", "negate"),
        branch("b1", "bitcast"),
    )
    assert found.seconds == found.total(kind="memory") == pytest.approx(COPY_SECONDS / 2)
