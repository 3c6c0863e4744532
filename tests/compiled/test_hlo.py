"""Programs read from their text: shapes, lines, loops and branches."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxft.compiled.hlo import HBM, HOST, Instruction, Module, arrays, shape_bytes

# Memory on the chip, next to the core.
VMEM = 1


def trips_of(function, *arguments) -> list[int | None]:
    """Returns how often each loop of a function runs as XLA for CPU compiles it."""
    module = Module(jax.jit(function).lower(*arguments).compile().as_text())
    return [
        module.trips(computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]


@pytest.mark.parametrize(
    ("shape", "dtype", "sizes", "size"),
    [
        ("f32[3,5]{1,0}", "f32", (3, 5), 60),
        ("bf16[3,5]", "bf16", (3, 5), 30),
        ("pred[7]{0}", "pred", (7,), 7),
        ("s32[]", "s32", (), 4),
        ("c64[2]{0}", "c64", (2,), 16),
        ("f8e4m3fn[10]{0}", "f8e4m3fn", (10,), 10),
        ("f4e2m1fn[10]{0}", "f4e2m1fn", (10,), 5),
        ("s4[7]{0:E(4)}", "s4", (7,), 4),
        ("u2[5]{0}", "u2", (5,), 2),
        ("f32[<=8,4]{1,0}", "f32", (8, 4), 128),
        ("f32[0,4]{1,0}", "f32", (0, 4), 0),
    ],
)
def test_an_array_has_the_bytes_of_its_elements_packed(shape, dtype, sizes, size):
    [array] = arrays(shape)
    assert (array.dtype, array.sizes, array.bytes) == (dtype, sizes, size)
    assert array.space == HBM
    assert shape_bytes(shape) == size


@pytest.mark.parametrize(
    ("layout", "space"),
    [
        ("", HBM),
        ("{1,0:T(8,128)}", HBM),
        ("{1,0:T(8,128)S(1)}", VMEM),
        ("{1,0:T(8,128)(2,1)S(1)}", VMEM),
        ("{1,0:S(5)}", HOST),
    ],
)
def test_the_layout_names_the_memory(layout, space):
    assert [array.space for array in arrays(f"bf16[8,128]{layout}")] == [space]


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 8 * 128),
        ("f32[9,100]{1,0:T(8,128)}", 16 * 128),
        # The dimension that varies fastest is named first.
        ("f32[9,100]{0,1:T(8,128)}", 128 * 104),
        ("f32[3,9,100]{2,1,0:T(8,128)}", 3 * 16 * 128),
        ("f32[3,9,100]{0,1,2:T(8,128)}", 128 * 16 * 100),
        # A second pair orders elements within the tiles of the first and pads nothing.
        ("bf16[9,100]{1,0:T(8,128)(2,1)}", 16 * 128),
        ("f32[1000]{0:T(1024)}", 1024),
        ("f32[1,100]{1,0:T(1,128)}", 128),
        ("s8[1,4,4]{2,1,0:T(4,128)(4,1)S(1)}", 4 * 128),
        ("f32[9,100]{1,0}", 900),
        ("f32[9,100]", 900),
    ],
)
def test_tiles_pad_the_dimensions_that_vary_fastest(shape, elements):
    [array] = arrays(shape)
    width = {"f32": 4, "bf16": 2, "s8": 1}[array.dtype]
    assert array.padded_bytes == elements * width
    assert array.bytes == width * math.prod(array.sizes)


def test_a_tuple_is_all_of_its_arrays_in_order():
    shape = (
        "((f32[2]{0:T(128)}, s4[4]{0}), pred[], token[], u32[]{:T(128)}, "
        "/*index=5*/bf16[2,3]{1,0:T(8,128)(2,1)S(1)})"
    )
    found = arrays(shape)
    assert [array.dtype for array in found] == ["f32", "s4", "pred", "u32", "bf16"]
    assert [array.bytes for array in found] == [8, 2, 1, 4, 12]
    assert [array.space for array in found] == [HBM, HBM, HBM, HBM, VMEM]
    assert shape_bytes(shape) == 8 + 2 + 1 + 4 + 12


PROGRAM = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%fused (param_0: f32[4]) -> f32[4] {
  %param_0 = f32[4]{0} parameter(0)
  ROOT %neg.1 = f32[4]{0} negate(%param_0)
}

%one (a: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} parameter(0)
}

%two (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %c = f32[4]{0} custom-call(%b), custom_call_target="kernel", backend_config="{
first line (
}}
  not_an_instruction, either
", metadata={op_name="jit(f)/kernel"}
}

ENTRY %main (x: f32[4], y: f32[4], i: s32[]) -> (f32[4], f32[4]) {
  %y = f32[4]{0} parameter(1)
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(2)
  %copy.1 = f32[4]{0} copy(%x)
  %bitcast.2 = f32[4]{0} bitcast(%copy.1)
  %convert.3 = f32[4]{0} convert(f32[4]{0} %bitcast.2)
  %fusion.4 = f32[4]{0} fusion(%convert.3), kind=kLoop, calls=%fused
  %sum.5 = f32[4]{0} add(%fusion.4, %fusion.4)
  %several = f32[4]{0} conditional(%i, %x, %y), branch_computations={%one, %two}
  %p = pred[] constant(true)
  %either = f32[4]{0} conditional(%p, %x, %y), true_computation=%two, false_computation=%one
  ROOT %pair = (f32[4]{0}, f32[4]{0}) tuple(%sum.5, /*index=1*/%fusion.4)
}, execution_thread="main"
"""


def test_a_program_is_its_computations_in_the_order_of_their_lines():
    module = Module(PROGRAM)
    assert (module.entry, module.partitions) == ("main", 4)
    assert list(module.computations) == ["fused", "one", "two", "main"]
    main = module.computations["main"]
    assert list(main.instructions)[:4] == ["y", "x", "i", "copy.1"]
    assert main.root == "pair" and module.computations["one"].root == "a"
    assert {n: p.name for n, p in main.parameters.items()} == {0: "x", 1: "y", 2: "i"}
    assert Module("HloModule jit_f\n").partitions == 1


def test_a_line_is_taken_apart():
    pair = Module(PROGRAM).computations["main"].instructions["pair"]
    assert pair == Instruction(
        "pair",
        "(f32[4]{0}, f32[4]{0})",
        "tuple",
        ("sum.5", "fusion.4"),
        "",
        "%sum.5, /*index=1*/%fusion.4",
    )


def test_texts_in_an_instruction_may_hold_line_breaks():
    two = Module(PROGRAM).computations["two"]
    assert list(two.instructions) == ["b", "c"]
    call = two.instructions["c"]
    assert (call.opcode, call.operands, call.target) == ("custom-call", ("b",), "kernel")
    assert "not_an_instruction, either" in call.rest
    assert call.origin == "jit(f)/kernel"


def test_what_an_instruction_does_not_name_is_empty():
    module = Module(PROGRAM)
    copy = module.computations["main"].instructions["copy.1"]
    assert (copy.origin, copy.target, copy.called("calls")) == ("", "", [])
    assert module.fused(copy) is None


def test_the_body_of_a_fusion_is_found():
    module = Module(PROGRAM)
    fusion = module.computations["main"].instructions["fusion.4"]
    assert module.fused(fusion) is module.computations["fused"]


def test_a_value_is_followed_through_copies_to_its_source():
    main = Module(PROGRAM).computations["main"]
    assert main.source("convert.3") == "x"
    assert main.source("x") == "x"
    assert main.source("fusion.4") == "fusion.4"


def test_users_are_those_that_read_a_value_each_once():
    users = Module(PROGRAM).computations["main"].users
    assert [user.name for user in users["fusion.4"]] == ["sum.5", "pair"]
    assert [user.name for user in users["x"]] == ["copy.1", "several", "either"]
    assert users["pair"] == []


def test_bytes_of_what_a_computation_does_not_define_are_refused():
    main = Module(PROGRAM).computations["main"]
    assert main.bytes_of("x") == 16
    with pytest.raises(ValueError, match=r"main: the operand 'neg\.1' is not defined"):
        main.bytes_of("neg.1")


def test_branches_are_found_in_both_forms():
    module = Module(PROGRAM)
    main = module.computations["main"].instructions
    assert module.branches(main["several"]) == ["one", "two"]
    assert module.branches(main["either"]) == ["two", "one"]


def test_branches_of_a_compiled_choice_are_computations_of_it():
    def choose(i, x):
        return jax.lax.switch(i, [jnp.sin, lambda v: v @ v, lambda v: v.T @ v], x)

    text = jax.jit(choose).lower(1, jnp.ones((8, 8))).compile().as_text()
    module = Module(text)
    [found] = [
        module.branches(instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "conditional"
    ]
    assert len(found) == 3 and set(found) <= set(module.computations)


@pytest.mark.parametrize("length", [2, 7])
def test_a_scan_of_known_length_is_counted(length):
    def repeated(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=length, unroll=1)[0]

    assert trips_of(repeated, jnp.ones((8, 8))) == [length]


@pytest.mark.parametrize(("first", "last"), [(0, 5), (3, 5), (-2, 9)])
def test_a_loop_with_constant_ends_is_counted(first, last):
    def repeated(x):
        return jax.lax.fori_loop(first, last, lambda i, c: c @ c + i, x)

    assert trips_of(repeated, jnp.ones((8, 8))) == [last - first]


def test_loops_in_loops_are_counted_each():
    def nested(x):
        def outer(c, _):
            c = jax.lax.fori_loop(0, 3, lambda i, d: d @ d + i, c)
            return jax.lax.scan(lambda d, _: (jnp.sin(d @ d), None), c, length=11)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    assert sorted(trips_of(nested, jnp.ones((8, 8)))) == [3, 5, 11]


def test_a_loop_whose_length_is_data_is_not_counted():
    def repeated(n, x):
        return jax.lax.fori_loop(0, n, lambda i, c: c @ c + i, x)

    def until(x):
        return jax.lax.while_loop(lambda c: c[0, 0] < 100, lambda c: c @ c, x)

    def until_both(x):
        return jax.lax.while_loop(lambda c: (c[0, 0] < 9) & (c[1, 1] < 9), lambda c: c @ c, x)

    assert trips_of(repeated, 3, jnp.ones((8, 8))) == [None]
    assert trips_of(until, jnp.ones((8, 8))) == [None]
    assert trips_of(until_both, jnp.ones((8, 8))) == [None]
