"""The fullest moment of programs, against counts by hand and what a compiler allocates."""

import jax
import jax.numpy as jnp
import pytest

from jaxft.compiled.hlo import Module
from jaxft.planner.liveness import Peak, peak_of

KIB = 1024


def peak(entry: str, computations: str = "") -> Peak:
    """Returns the peak of a program; `entry` are the lines of its computation, in order."""
    text = f"HloModule step, is_scheduled=true\n\n{computations}\nENTRY %main () -> f32[] {{\n"
    return peak_of(Module(f"{text}{entry}\n}}\n"))


def names(found: Peak) -> set[str]:
    return {buffer.name for buffer in found.buffers}


def test_of_a_chain_the_largest_pair_of_neighbours_is_alive():
    found = peak("""\
  %p = f32[256]{0} parameter(0)
  %one = f32[256]{0} exponential(%p)
  %two = f32[512]{0} concatenate(%one, %one), dimensions={0}
  %three = f32[768]{0} concatenate(%one, %two), dimensions={0}
  %four = f32[1024]{0} concatenate(%three, %one), dimensions={0}
  %half = f32[512]{0} slice(%four), slice={[0:512]}
  ROOT %result = f32[256]{0} slice(%half), slice={[0:256]}""")
    # `two` is dead when `four` is made, `one` is not.
    assert found.bytes == (1 + 3 + 4) * KIB
    assert names(found) == {"one", "three", "four"}
    assert sum(buffer.bytes for buffer in found.buffers) == found.bytes


def test_a_buffer_is_named_by_its_shape_and_origin():
    [buffer] = peak("""\
  %p = bf16[9,100]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %e = bf16[9,100]{1,0:T(8,128)(2,1)} exponential(%p), metadata={op_name="jit(f)/exp"}\
""").buffers
    # Tiles are padded.
    assert buffer == (2 * 16 * 128, "bf16", (9, 100), "jit(f)/exp", "e")


def test_arguments_and_what_is_elsewhere_take_no_room():
    found = peak("""\
  %p = f32[1024]{0} parameter(0)
  %c = f32[1024]{0} constant({...})
  %numbers = s32[4096]{0} iota(), iota_dimension=0
  %vmem = f32[1024]{0:S(1)} exponential(%p)
  %host = f32[1024]{0:S(5)} copy(%p)
  %view = f32[32,32]{1,0} bitcast(%p)
  ROOT %sum = f32[32,32]{1,0} reverse(%view), dimensions={0}""")
    assert (found.bytes, names(found)) == (4 * KIB, {"sum"})


def test_a_view_keeps_what_it_shows_alive():
    lines = """\
  %p = f32[256]{0} parameter(0)
  %shown = f32[256]{0} reverse(%p), dimensions={0}
  %view = f32[16,16]{1,0} bitcast(%shown)
  %other = f32[512]{0} concatenate(%p, %p), dimensions={0}
  ROOT %result = f32[256]{0} custom-call(%other, LAST), custom_call_target="k\""""
    assert peak(lines.replace("LAST", "%view")).bytes == (1 + 2 + 1) * KIB
    assert peak(lines.replace("LAST", "%p")).bytes == (2 + 1) * KIB


def test_an_update_in_place_takes_no_room_of_its_own():
    lines = """\
  %p = f32[256]{0} parameter(0)
  %zero = s32[] constant(0)
  %stack = f32[4,256]{1,0} broadcast(%zero), dimensions={}
  %row = f32[1,256]{1,0} reverse(%p), dimensions={0}
  UPDATE
  ROOT %result = f32[256]{0} custom-call(%updated), custom_call_target="k\""""
    alone = "%updated = f32[4,256]{1,0} dynamic-update-slice(%stack, %row, %zero, %zero)"
    assert peak(lines.replace("UPDATE", alone)).bytes == (4 + 1) * KIB
    body = """\
%put (a: f32[4,256], b: f32[1,256], i: s32[]) -> f32[4,256] {
  %a = f32[4,256]{1,0} parameter(0)
  %b = f32[1,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %b2 = f32[1,256]{1,0} add(%b, %b)
  ROOT %put.1 = f32[4,256]{1,0} dynamic-update-slice(%a, %b2, %i, %i)
}
"""
    fused = "%updated = f32[4,256]{1,0} fusion(%stack, %row, %zero), kind=kLoop, calls=%put"
    assert peak(lines.replace("UPDATE", fused), body).bytes == (4 + 1) * KIB
    # Nor does one of an argument.
    argument = lines.replace("broadcast(%zero), dimensions={}", "parameter(1)")
    assert peak(argument.replace("UPDATE", fused), body).bytes == 1 * KIB  # the row
    # Another fusion of such a shape has a result of its own.
    body = body.replace("ROOT %put.1", "%put.1").replace(
        "%i, %i)\n", "%i, %i)\n  ROOT %r = f32[4,256]{1,0} reverse(%put.1), dimensions={0}\n"
    )
    lines = lines.replace("custom-call(%updated)", "custom-call(%updated, %stack)")
    assert peak(lines.replace("UPDATE", fused), body).bytes == (4 + 1 + 4) * KIB


ADDED = """\
%added (a: f32[1024], b: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  ROOT %sum = f32[1024]{0} add(%a, %b)
}
"""


@pytest.mark.parametrize(
    ("last", "kib"),
    [
        # `x` and `y` die at the fusion: its result is in the place of one of them.
        ("%sum", 4 + 4),
        # Both live on, so the result has a place of its own.
        ("%sum, %x, %y", 4 + 4 + 4),
    ],
)
def test_a_fusion_replaces_an_operand_that_nobody_reads_any_more(last, kib):
    lines = f"""\
  %p = f32[1024]{{0}} parameter(0)
  %x = f32[1024]{{0}} reverse(%p), dimensions={{0}}
  %y = f32[1024]{{0}} custom-call(%p), custom_call_target="k"
  %sum = f32[1024]{{0}} fusion(%x, %y), kind=kLoop, calls=%added
  ROOT %result = f32[] custom-call({last}), custom_call_target="k\""""
    assert peak(lines, ADDED).bytes == kib * KIB


def test_an_operand_of_another_size_is_not_replaced():
    lines = """\
  %p = f32[1024]{0} parameter(0)
  %x = f32[512]{0} slice(%p), slice={[0:512]}
  ROOT %y = f32[1024]{0} fusion(%x, %x), kind=kLoop, calls=%added"""
    assert peak(lines, ADDED).bytes == (2 + 4) * KIB


def test_of_two_operands_of_the_size_of_one_result_one_is_replaced():
    lines = """\
  %p = f32[1024]{0} parameter(0)
  %x = f32[1024]{0} reverse(%p), dimensions={0}
  %y = f32[1024]{0} reverse(%x), dimensions={0}
  %sum = f32[1024]{0} fusion(%x, %y), kind=kLoop, calls=%added
  %large = f32[4096]{0} custom-call(%sum), custom_call_target="k"
  ROOT %result = f32[] custom-call(%large, %sum), custom_call_target="k\""""
    assert peak(lines, ADDED).bytes == (4 + 16) * KIB


@pytest.mark.parametrize(
    ("line", "kib"),
    [
        ("add(%x, %p)", 4),
        ("multiply(%x, %p)", 4),
        ("subtract(%x, %p)", 4),
        ("convert(%x)", 4),
        ("negate(%x)", 8),
        # It still reads what it would overwrite.
        ("fusion(%x, %p), kind=kOutput, calls=%product", 8),
        ("fusion(%x, %p), kind=kOutput, calls=%filtered", 8),
    ],
)
def test_sums_are_made_in_place_and_products_are_not(line, kib):
    bodies = "".join(
        f"""\
%{name} (a: f32[1024], b: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %b = f32[1024]{{0}} parameter(1)
  ROOT %made = f32[1024]{{0}} {opcode}(%a, %b)
}}

"""
        for name, opcode in (("product", "dot"), ("filtered", "convolution"))
    )
    lines = f"""\
  %p = f32[1024]{{0}} parameter(0)
  %x = f32[1024]{{0}} reverse(%p), dimensions={{0}}
  ROOT %y = f32[1024]{{0}} {line}"""
    assert peak(lines, bodies).bytes == kib * KIB


def test_what_passes_a_barrier_stays_where_it_is():
    found = peak("""\
  %p = f32[1024]{0} parameter(0)
  %x = f32[1024]{0} reverse(%p), dimensions={0}
  %y = f32[512]{0} slice(%p), slice={[0:512]}
  %given = (f32[1024]{0}, f32[512]{0}) tuple(%x, %y)
  %held = (f32[1024]{0}, f32[512]{0}) opt-barrier(%given)
  %small = f32[512]{0} get-tuple-element(%held), index=1
  %large = f32[8192]{0} custom-call(%small), custom_call_target="k"
  ROOT %result = f32[] custom-call(%large), custom_call_target="k\"""")
    # `x` is dead once the barrier is passed.
    assert (found.bytes, names(found)) == ((2 + 32) * KIB, {"y", "large"})


def test_a_fusion_that_updates_two_buffers_in_place_takes_no_room():
    body = """\
%put (a: f32[4,256], b: f32[4,256], c: f32[1,256], i: s32[]) -> (f32[4,256], f32[4,256]) {
  %a = f32[4,256]{1,0} parameter(0)
  %b = f32[4,256]{1,0} parameter(1)
  %c = f32[1,256]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %new = f32[4,256]{1,0} broadcast(%i), dimensions={}
  %one = f32[4,256]{1,0} dynamic-update-slice(%a, %c, %i, %i)
  %two = f32[4,256]{1,0} dynamic-update-slice(%TARGET, %c, %i, %i)
  ROOT %both = (f32[4,256]{1,0}, f32[4,256]{1,0}) tuple(%one, %two)
}
"""
    lines = """\
  %p = f32[1,256]{1,0} parameter(0)
  %i = s32[] constant(0)
  %x = f32[4,256]{1,0} broadcast(%i), dimensions={}
  %y = f32[4,256]{1,0} broadcast(%i), dimensions={}
  %f = (f32[4,256]{1,0}, f32[4,256]{1,0}) fusion(%x, %y, %p, %i), kind=kLoop, calls=%put
  %one = f32[4,256]{1,0} get-tuple-element(%f), index=0
  %large = f32[8192]{0} custom-call(%one), custom_call_target="k"
  ROOT %result = f32[] custom-call(%large), custom_call_target="k\""""
    both = peak(lines, body.replace("TARGET", "b"))
    assert (both.bytes, names(both)) == ((4 + 32) * KIB, {"x", "large"})
    # What is made inside of the fusion has to have a place, and with it all that it makes.
    new = peak(lines, body.replace("TARGET", "new"))
    assert (new.bytes, names(new)) == ((4 + 4 + 32) * KIB, {"f", "large"})


def loop(body: str) -> Peak:
    """Returns the peak of a loop that carries 4 KiB; the lines of its body make `%next`."""
    computations = f"""\
%body (carried: (s32[], f32[1024])) -> (s32[], f32[1024]) {{
  %carried = (s32[], f32[1024]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %x = f32[1024]{{0}} get-tuple-element(%carried), index=1
  %one = s32[] constant(1)
{body}
  %j = s32[] add(%i, %one)
  ROOT %passed = (s32[], f32[1024]{{0}}) tuple(%j, %next)
}}

%condition (carried.1: (s32[], f32[1024])) -> pred[] {{
  %carried.1 = (s32[], f32[1024]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}}
"""
    return peak(
        """\
  %p = f32[1024]{0} parameter(0)
  %zero = s32[] constant(0)
  %first = f32[1024]{0} reverse(%p), dimensions={0}
  %start = (s32[], f32[1024]{0}) tuple(%zero, %first)
  %loop = (s32[], f32[1024]{0}) while(%start), condition=%condition, body=%body
  %last = f32[1024]{0} get-tuple-element(%loop), index=1
  ROOT %result = f32[256]{0} slice(%last), slice={[0:256]}""",
        computations,
    )


def test_a_loop_whose_body_reuses_what_it_carries_needs_its_temporaries_more():
    found = loop("""\
  %part = f32[512]{0} slice(%x), slice={[0:512]}
  %next = f32[1024]{0} dynamic-update-slice(%x, %part, %i)""")
    assert (found.bytes, names(found)) == ((4 + 2) * KIB, {"first", "part"})


def test_what_a_body_hands_on_takes_the_place_of_what_it_was_given():
    found = loop("  %next = f32[1024]{0} negate(%x)")
    # The result, which is made when the loop is over, is the most beside what is carried.
    assert (found.bytes, names(found)) == ((4 + 1) * KIB, {"first", "result"})


def test_what_a_body_copies_to_hand_it_on_has_a_place_until_then():
    found = loop("""\
  %new = f32[1024]{0} reverse(%x), dimensions={0}
  %half = f32[512]{0} slice(%x), slice={[0:512]}
  %both = f32[1024]{0} custom-call(%new, %half), custom_call_target="k"
  %next = f32[1024]{0} copy(%both)""")
    assert found.bytes == (4 + 4 + 2 + 4) * KIB
    assert names(found) == {"first", "new", "half", "both"}


def test_what_an_entry_returns_takes_the_place_of_its_arguments():
    lines = """\
  %p = f32[1024]{0} parameter(0)
  %gradient = f32[1024]{0} reverse(%p), dimensions={0}
  %next = f32[1024]{0} subtract(%p, %gradient)
  %loss = f32[512]{0} slice(%gradient), slice={[0:512]}
  ROOT %result = (f32[1024]{0}, f32[512]{0}) tuple(%next, %loss)"""
    found = peak(lines)
    assert (found.bytes, names(found)) == (4 * KIB, {"gradient"})


def branch(kib: int) -> str:
    """Lines that need 4 + `kib` KiB, their result of 4 KiB among them."""
    return f"""\
%branch.{kib} (given.{kib}: (f32[1024])) -> (f32[1024]) {{
  %given.{kib} = (f32[1024]{{0}}) parameter(0)
  %x.{kib} = f32[1024]{{0}} get-tuple-element(%given.{kib}), index=0
  %large.{kib} = f32[{256 * kib}]{{0}} custom-call(%x.{kib}), custom_call_target="k"
  %result.{kib} = f32[1024]{{0}} custom-call(%large.{kib}), custom_call_target="k"
  ROOT %results.{kib} = (f32[1024]{{0}}) tuple(%result.{kib})
}}
"""


def test_of_a_conditional_the_larger_branch_counts_and_its_result_lives_on():
    lines = """\
  %i = s32[] parameter(0)
  %p = f32[1024]{0} parameter(1)
  %x = f32[1024]{0} reverse(%p), dimensions={0}
  %given = (f32[1024]{0}) tuple(%x)
  %chosen = (f32[1024]{0}) conditional(%i, %given, %given), \
branch_computations={%branch.2, %branch.8}
  %after = f32[SIZE]{0} custom-call(%p), custom_call_target="k"
  ROOT %result = f32[] custom-call(%chosen, %after), custom_call_target="k\""""
    computations = branch(2) + "\n" + branch(8)
    small = peak(lines.replace("SIZE", "256"), computations)
    assert (small.bytes, names(small)) == ((4 + 8 + 4) * KIB, {"x", "large.8", "result.8"})
    large = peak(lines.replace("SIZE", "4096"), computations)
    assert (large.bytes, names(large)) == ((4 + 16) * KIB, {"chosen", "after"})


def test_what_a_called_function_returns_is_counted_once():
    found = peak(
        """\
  %p = f32[1024]{0} parameter(0)
  %given = (f32[1024]{0}) tuple(%p)
  ROOT %result = (f32[1024]{0}) call(%given), to_apply=%branch.2""",
        branch(2),
    )
    assert found.bytes == (2 + 4) * KIB


@pytest.mark.parametrize(
    ("start", "done", "kib"),
    [
        (
            "(f32[1024]{0}, f32[1024]{0:S(1)}, u32[]{:S(2)}) copy-start(%x)",
            "f32[1024]{0} copy-done(%s)",
            4,
        ),
        # From the device to its VMEM: the copy is elsewhere.
        (
            "(f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%x)",
            "f32[1024]{0:S(1)} copy-done(%s)",
            0,
        ),
        (
            "(f32[1024]{0}, f32[4096]{0}) all-gather-start(%x), dimensions={0}",
            "f32[4096]{0} all-gather-done(%s)",
            16,
        ),
        (
            "(f32[1024]{0}, f32[1024]{0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "f32[1024]{0} collective-permute-done(%s)",
            4,
        ),
        (
            "((f32[1024]{0}), f32[512]{0}, s32[]{:S(2)}) slice-start(%x), slice={[0:512]}",
            "f32[512]{0} slice-done(%s)",
            2,
        ),
        ("f32[1024]{0} all-reduce-start(%x), to_apply=%add", "f32[1024]{0} all-reduce-done(%s)", 4),
        (
            "((f32[1024]{0}, f32[512]{0}), (f32[4096]{0}, f32[2048]{0})) "
            "all-gather-start(%x, %y), dimensions={0}",
            "(f32[4096]{0}, f32[2048]{0}) all-gather-done(%s)",
            24,
        ),
    ],
)
def test_what_is_started_has_its_result_from_then_on(start, done, kib):
    found = peak(f"""\
  %p = f32[1024]{{0}} parameter(0)
  %x = f32[1024]{{0}} reverse(%p), dimensions={{0}}
  %y = f32[512]{{0}} slice(%p), slice={{[0:512]}}
  %s = {start}
  %d = {done}
  ROOT %result = f32[] custom-call(%x, %y, %d), custom_call_target="k\"""")
    assert found.bytes == (4 + 2 + kib) * KIB


def _layers(x, w):
    return jax.lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, w)[0]


def _loss(w, x):
    return _layers(x, w).sum()


def _step(w, x):
    loss, gradient = jax.value_and_grad(_loss)(w, x)
    return w - 0.1 * gradient, loss


@pytest.mark.parametrize(
    ("function", "donated"), [(_loss, ()), (jax.value_and_grad(_loss), ()), (_step, (0,))]
)
def test_a_peak_is_near_what_the_compiler_allocates(function, donated):
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(6, 64, 64), (256, 64)]]
    compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    allocated = compiled.memory_analysis().temp_size_in_bytes
    assert allocated > 256 * 64 * 4
    # The walk packs perfectly, but does not know all of what can be overwritten.
    assert 0.9 * allocated < peak_of(Module(compiled.as_text())).bytes < 1.25 * allocated
