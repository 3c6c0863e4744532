"""What instructions compute and move: closed forms, and forms in which XLA for TPU writes them."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest

from jaxft.compiled.hlo import Module
from jaxft.planner.cost import Cost, cost_of, moved_bytes, product_flops, totals


def flops_of(left: str, right: str, result: str, product: str) -> float:
    """Returns the FLOPs of a product of two parameters, `dot(%a, %b), …`."""
    module = Module(f"""\
HloModule product

ENTRY %main (a: {left}, b: {right}) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %product = {result} {product}
}}
""")
    main = module.computations["main"]
    return product_flops(main, main.instructions["product"])


def compiled_flops(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = Module(jax.jit(function).lower(*arguments).compile().as_text())
    return sum(
        product_flops(computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
    )


B, M, K, N = 16, 12, 20, 28


@pytest.mark.parametrize(
    ("left", "right", "result", "contracted"),
    [
        ((M, K), (K, N), (M, N), "lhs_contracting_dims={1}, rhs_contracting_dims={0}"),
        ((K, M), (K, N), (M, N), "lhs_contracting_dims={0}, rhs_contracting_dims={0}"),
        ((M, K), (N, K), (M, N), "lhs_contracting_dims={1}, rhs_contracting_dims={1}"),
        (
            (M, 4, 5),
            (4, 5, N),
            (M, N),
            "lhs_contracting_dims={1,2}, rhs_contracting_dims={0,1}",
        ),
        (
            (M, K),
            (K,),
            (M,),
            "lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        ),
        (
            (B, M, K),
            (B, K, N),
            (B, M, N),
            "lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
            "rhs_contracting_dims={1}",
        ),
        ((M,), (N,), (M, N), "lhs_contracting_dims={}, rhs_contracting_dims={}"),
    ],
)
def test_a_dot_is_two_operations_for_each_output_and_contracted_place(
    left, right, result, contracted
):
    texts = [f"bf16[{','.join(map(str, sizes))}]" for sizes in (left, right, result)]
    inner = math.prod(left) * math.prod(right) // math.prod(result)
    batch = B if len(left) == 3 and len(result) == 3 else 1
    expected = 2 * math.prod(result) * math.isqrt(inner // batch)
    assert flops_of(*texts, f"dot(%a, %b), {contracted}") == expected


T = "T(8,128)(2,1)"


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes"),
    [
        (f"{M},{K}", f"{K},{N}", f"{M},{N}", "dim_labels=bf_io->bf"),
        # Transposed operands and results.
        (f"{K},{M}", f"{K},{N}", f"{M},{N}", "dim_labels=fb_io->bf"),
        (f"{M},{K}", f"{N},{K}", f"{M},{N}", "dim_labels=bf_oi->bf"),
        (f"{M},{K}", f"{K},{N}", f"{N},{M}", "dim_labels=bf_io->fb"),
        # Dimensions of size 1 as a window.
        (f"1,{M},{K}", f"{K},{N},1", f"1,{M},{N}", "window={size=1}, dim_labels=0bf_io0->0bf"),
        # A part of the contracted dimension is the window's.
        (f"4,{M},5", f"4,5,{N}", f"{M},{N},1", "window={size=4}, dim_labels=0bf_0io->bf0"),
        (f"4,5,{M}", f"4,5,{N}", f"{M},{N},1", "window={size=4}, dim_labels=0fb_0io->bf0"),
        (f"4,{M},5", f"5,4,{N}", f"{M},{N},1", "window={size=4}, dim_labels=0bf_i0o->bf0"),
        # A part of the outputs is: a window that slides over one place, its padding left out.
        (
            f"{M},{K},1",
            f"4,7,{K}",
            f"{M},4,7",
            "window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f",
        ),
        # Both at once: heads among the outputs, and a contracted dimension in two.
        (
            f"{M},4,5,1",
            "4,7,4,5",
            f"{M},4,7,1",
            "window={size=4x4 pad=3_3x0_0 rhs_reversal=1x0}, dim_labels=b1f0_0o1i->b0f1",
        ),
    ],
)
def test_a_product_written_as_a_convolution_is_two_m_n_k(left, right, result, attributes):
    texts = [f"bf16[{sizes}]{{{T}}}" for sizes in (left, right, result)]
    assert flops_of(*texts, f"convolution(%a, %b), {attributes}") == 2 * M * N * K


def test_a_batch_written_as_a_dilated_convolution_counts_each_product_once():
    """Of the places of the kernel, each output meets one of the inputs that are 15 zeros apart."""
    window = "window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
    texts = f"bf16[{B},{M},{K}]", f"bf16[{B},{K},{N}]", f"bf16[{B},{M},{N}]"
    assert flops_of(*texts, f"convolution(%a, %b), {window}") == 2 * B * M * N * K


@pytest.mark.parametrize(
    ("attributes", "left", "right", "result", "pairs"),
    [
        # Along one dimension: pairs of an output and a place of the kernel, padding left out.
        ("window={size=3}", 10, 3, 8, 8 * 3),
        ("window={size=3 pad=1_1}", 10, 3, 10, 10 * 3 - 2),
        ("window={size=3 pad=2_0}", 10, 3, 10, 10 * 3 - 3),
        ("window={size=3 stride=2}", 9, 3, 4, 4 * 3),
        ("window={size=3 stride=2 pad=1_1}", 9, 3, 5, 5 * 3 - 2),
        ("window={size=2 rhs_dilate=3}", 10, 2, 7, 7 * 2),
        ("window={size=2 pad=2_2 rhs_dilate=3}", 10, 2, 11, 11 * 2 - 4),
        # Every second input is a zero that was put in.
        ("window={size=2 lhs_dilate=2}", 5, 2, 8, 8),
        ("window={size=1 pad=0_4}", 3, 1, 7, 3),
    ],
)
def test_a_convolution_counts_what_meets_a_number(attributes, left, right, result, pairs):
    texts = f"f32[2,{left},3]", f"f32[{right},3,5]", f"f32[2,{result},5]"
    call = f"convolution(%a, %b), {attributes}, dim_labels=b0f_0io->b0f"
    assert flops_of(*texts, call) == 2 * (2 * 3 * 5) * pairs


def test_the_window_is_the_dimension_of_the_kernel_that_its_labels_name():
    call = "convolution(%a, %b), window={size=2}, dim_labels=b0f_i0o->b0f"
    assert flops_of("f32[3,10,7]", "f32[7,2,5]", "f32[3,9,5]", call) == 2 * 3 * 9 * 2 * 7 * 5


def test_groups_of_a_convolution_see_their_part_of_features_or_batch():
    features = "convolution(%a, %b), window={size=1}, dim_labels=b0f_0io->b0f, "
    by_feature = features + "feature_group_count=3"
    assert flops_of("f32[8,4,6]", "f32[1,2,15]", "f32[8,4,15]", by_feature) == 2 * 8 * 4 * 2 * 15
    by_batch = features + "batch_group_count=2"
    assert flops_of("f32[8,4,3]", "f32[1,3,6]", "f32[4,4,6]", by_batch) == 2 * 4 * 4 * 3 * 6


def test_flops_of_a_grouped_convolution_are_those_that_xla_counts():
    def grouped(x, w):
        names = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, w, (1,), "VALID", batch_group_count=2, dimension_numbers=names
        )

    shapes = (8, 4, 3), (2, 3, 6)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    lowered = jax.jit(grouped).lower(*arguments)
    text = lowered.as_text(dialect="hlo").replace("ENTRY main.1 {", "ENTRY %main () -> f32[] {")
    main = Module(text).computations["main"]
    assert product_flops(main, main.instructions[main.root]) == lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("formula", "sizes"),
    [
        ("mk,kn->mn", {"m": 24, "k": 40, "n": 56}),
        ("mk,nk->nm", {"m": 24, "k": 40, "n": 56}),
        ("bmk,bkn->bmn", {"b": 3, "m": 24, "k": 40, "n": 56}),
        ("btngh,bsnh->bngts", {"b": 2, "t": 16, "s": 24, "n": 3, "g": 4, "h": 8}),
        ("btd,dnh->btnh", {"b": 2, "t": 16, "d": 24, "n": 3, "h": 8}),
        ("btnh,dnh->btd", {"b": 2, "t": 16, "d": 24, "n": 3, "h": 8}),
    ],
)
def test_a_compiled_einsum_is_two_operations_for_each_combination_of_indices(
    formula: str, sizes: Mapping[str, int]
):
    inputs = formula.split("->")[0].split(",")
    shapes = [tuple(sizes[index] for index in term) for term in inputs]
    found = compiled_flops(lambda a, b: jnp.einsum(formula, a, b), *shapes)
    assert found == 2 * math.prod(sizes.values())


def test_a_gradient_of_a_product_is_two_more():
    def loss(x, w):
        return jnp.sum(jnp.sin(x @ w))

    found = compiled_flops(jax.value_and_grad(loss, (0, 1)), (24, 40), (40, 56))
    assert found == 3 * 2 * 24 * 40 * 56


def cost(computations: str, entry: str) -> Cost:
    """Returns the cost of `%result` in a program; `entry` are the lines of its computation."""
    module = Module(f"HloModule step\n\n{computations}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n")
    main = module.computations["main"]
    return cost_of(module, main, main.instructions["result"])


def test_an_instruction_reads_its_operands_and_writes_its_result():
    entry = """\
  %a = f32[1024]{0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  ROOT %result = f32[1024]{0} add(%a, %b)"""
    assert cost("", entry) == Cost(flops=0, bytes=3 * 4096, cycles=0)


def test_a_dot_outside_of_a_fusion_has_both():
    entry = """\
  %a = bf16[128,256]{1,0} parameter(0)
  %b = bf16[256,512]{1,0} parameter(1)
  ROOT %result = bf16[128,512]{1,0} dot(%a, %b), \
lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    expected = 2 * (128 * 256 + 256 * 512 + 128 * 512)
    assert cost("", entry) == Cost(flops=2 * 128 * 256 * 512, bytes=expected)


def test_padding_of_tiles_is_moved_too():
    entry = """\
  %a = f32[9,100]{1,0:T(8,128)} parameter(0)
  ROOT %result = f32[9,100]{1,0:T(8,128)} negate(%a)"""
    assert cost("", entry).bytes == 2 * 4 * 16 * 128


@pytest.mark.parametrize(
    ("first", "second", "result", "arrays"),
    [
        ("", "S(1)", "", 2),
        ("S(1)", "S(1)", "", 1),
        ("S(1)", "S(1)", "S(1)", 0),
        ("", "", "S(1)", 2),
    ],
)
def test_what_lies_in_vmem_is_not_moved(first, second, result, arrays):
    entry = f"""\
  %a = f32[8,128]{{1,0:T(8,128){first}}} parameter(0)
  %b = f32[8,128]{{1,0:T(8,128){second}}} parameter(1)
  ROOT %result = f32[8,128]{{1,0:T(8,128){result}}} add(%a, %b)"""
    assert cost("", entry).bytes == arrays * 4096


@pytest.mark.parametrize(
    "line",
    [
        "bitcast(%a)",
        "get-tuple-element(%pair), index=0",
        "parameter(1)",
        "opt-barrier(%a)",
    ],
)
def test_other_names_of_the_same_bytes_cost_nothing(line):
    entry = f"""\
  %a = f32[1024]{{0}} parameter(0)
  %pair = (f32[1024]{{0}}, f32[1024]{{0}}) tuple(%a, %a)
  ROOT %result = f32[1024]{{0}} {line}"""
    assert cost("", entry) == Cost()


def test_products_in_fusions_of_fusions_are_added_up():
    computations = """\
%inner (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%outer (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  %f = f32[8,8]{1,0} fusion(%q), kind=kOutput, calls=%inner
  ROOT %e = f32[8,8]{1,0} dot(%f, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    entry = """\
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %result = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%outer, \
backend_config={"window_config":{"estimated_cycles":"1234"}}"""
    assert cost(computations, entry) == Cost(flops=2 * 2 * 8**3, bytes=2 * 256, cycles=1234)


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (("s8", "s8", "s32"), "int8"),
        (("f8e5m2", "f8e4m3fn", "bf16"), "float8"),
        (("bf16", "bf16", "f32"), "bfloat16"),
        (("s8", "bf16", "bf16"), "bfloat16"),
    ],
)
def test_products_are_made_at_the_rate_of_what_they_multiply(types, dtype):
    """In a fusion that decodes its operands or what it makes, those of the product itself."""
    left, right, sums = types
    computations = f"""\
%fused (p: bf16[64,128], q: {right}[256,128]) -> bf16[64,256] {{
  %p = bf16[64,128]{{1,0}} parameter(0)
  %codes = {left}[64,128]{{1,0}} convert(%p)
  %q = {right}[256,128]{{1,0}} parameter(1)
  %d = {sums}[64,256]{{1,0}} convolution(%codes, %q), dim_labels=bf_oi->bf
  ROOT %out = bf16[64,256]{{1,0}} convert(%d)
}}
"""
    entry = f"""\
  %a = bf16[64,128]{{1,0}} parameter(0)
  %b = {right}[256,128]{{1,0}} parameter(1)
  ROOT %result = bf16[64,256]{{1,0}} fusion(%a, %b), kind=kOutput, calls=%fused"""
    found = cost(computations, entry)
    assert (found.dtype, found.flops) == (dtype, 2 * 64 * 128 * 256)
    module = Module(f"HloModule step\n\n{computations}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n")
    flops, _ = totals(module, lambda *_: None)
    assert {name: count for name, count in flops.items() if count} == {dtype: found.flops}


@pytest.mark.parametrize(
    ("precision", "passes"),
    [
        ("", 1),
        (", operand_precision={default,default}", 1),
        (", operand_precision={high,high}", 3),
        (", operand_precision={highest,highest}", 6),
    ],
)
def test_a_product_takes_the_passes_of_its_precision_and_a_fusion_the_most(precision, passes):
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    alone = f"""\
  %a = f32[8,8]{{1,0}} parameter(0)
  ROOT %result = f32[8,8]{{1,0}} dot(%a, %a), {dot}{precision}"""
    assert cost("", alone).passes == passes
    bodies = f"""\
%inner (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  ROOT %d = f32[8,8]{{1,0}} dot(%p, %p), {dot}{precision}
}}

%outer (q: f32[8,8]) -> f32[8,8] {{
  %q = f32[8,8]{{1,0}} parameter(0)
  %f = f32[8,8]{{1,0}} fusion(%q), kind=kOutput, calls=%inner
  ROOT %e = f32[8,8]{{1,0}} dot(%f, %q), {dot}
}}
"""
    entry = """\
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %result = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%outer"""
    assert cost(bodies, entry).passes == passes


@pytest.mark.parametrize(
    ("shape", "start", "moved"),
    [
        ("(f32[32]{0:S(5)}, f32[32]{0}, u32[])", "copy-start", 128),
        # Of a slice the part: neither its place nor what it is cut from.
        ("((f32[32]{0}, s32[]), f32[8]{0}, u32[])", "dynamic-slice-start", 32),
        ("(s32[], u32[])", "slice-start", 0),
    ],
)
def test_a_copy_between_memories_moves_its_smallest_array(shape, start, moved):
    module = Module(
        f"HloModule m\n\nENTRY %main () -> f32[] {{\n  ROOT %s = {shape} {start}()\n}}\n"
    )
    assert moved_bytes(module.computations["main"].instructions["s"]) == moved


SLICED = """\
%take (stack: f32[32,1024], i: s32[], other: f32[1024]) -> f32[1024] {
  %stack = f32[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,1024}
  %flat = f32[1024]{0} bitcast(%row)
  %other = f32[1024]{0} parameter(2)
  ROOT %sum = f32[1024]{0} add(%flat, %other)
}
"""
SLICING = """\
  %a = f32[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1024]{0} parameter(2)
  ROOT %result = f32[1024]{0} fusion(%a, %i, %b), kind=kLoop, calls=%take"""


def test_of_an_operand_that_a_fusion_only_slices_the_slice_is_read():
    index = 4
    assert cost(SLICED, SLICING).bytes == 3 * 4096 + index


def test_of_an_operand_that_is_sliced_and_used_whole_the_whole_is_read():
    both = SLICED.replace(
        "  ROOT %sum = f32[1024]{0} add(%flat, %other)",
        "  %all = f32[1024]{0} reduce(%stack, %zero), dimensions={0}, to_apply=%add\n"
        "  ROOT %sum = f32[1024]{0} add(%flat, %all)",
    )
    # `other` is then read by nothing.
    assert cost(both, SLICING).bytes == 32 * 4096 + 4096 + 4


def test_two_slices_of_an_operand_are_both_read_but_no_more_than_there_is():
    def twice(rows: int) -> str:
        return f"""\
%take (stack: f32[4,1024], i: s32[]) -> f32[{rows},1024] {{
  %stack = f32[4,1024]{{1,0}} parameter(0)
  %view = f32[4,1024]{{1,0}} bitcast(%stack)
  %first = f32[{rows},1024]{{1,0}} slice(%view), slice={{[0:{rows}], [0:1024]}}
  %last = f32[{rows},1024]{{1,0}} slice(%view), slice={{[{4 - rows}:4], [0:1024]}}
  ROOT %sum = f32[{rows},1024]{{1,0}} add(%first, %last)
}}
"""

    def entry(rows: int) -> str:
        return f"""\
  %a = f32[4,1024]{{1,0}} parameter(0)
  ROOT %result = f32[{rows},1024]{{1,0}} fusion(%a), kind=kLoop, calls=%take"""

    assert cost(twice(1), entry(1)).bytes == 2 * 4096 + 4096
    assert cost(twice(3), entry(3)).bytes == 4 * 4096 + 3 * 4096


def test_a_slice_in_a_fusion_inside_a_fusion_is_found():
    nested = (
        SLICED
        + """
%around (stack: f32[32,1024], i: s32[], other: f32[1024]) -> f32[1024] {
  %stack.1 = f32[32,1024]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %other.1 = f32[1024]{0} parameter(2)
  ROOT %f = f32[1024]{0} fusion(%stack.1, %i.1, %other.1), kind=kLoop, calls=%take
}
"""
    )
    assert cost(nested, SLICING.replace("%take", "%around")).bytes == 3 * 4096 + 4


def test_a_dynamic_slice_reads_and_writes_the_slice():
    entry = """\
  %a = f32[32,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %result = f32[1,1024]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,1024}"""
    assert cost("", entry).bytes == 2 * 4096


def test_an_update_in_place_moves_the_update():
    entry = """\
  %a = f32[32,1024]{1,0} parameter(0)
  %b = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %result = f32[32,1024]{1,0} dynamic-update-slice(%a, %b, %i, %i)"""
    indices = 2 * 4
    assert cost("", entry).bytes == 2 * 4096 + indices


@pytest.mark.parametrize("opcode", ["copy", "convert", "transpose"])
def test_a_copy_of_what_was_updated_moves_all_of_it(opcode):
    entry = f"""\
  %a = f32[32,1024]{{1,0}} parameter(0)
  %b = f32[1,1024]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %updated = f32[32,1024]{{1,0}} dynamic-update-slice(%a, %b, %i, %i)
  ROOT %result = f32[32,1024]{{0,1}} {opcode}(%updated)"""
    assert cost("", entry).bytes == 2 * 32 * 4096


def test_an_update_in_vmem_reads_the_update_alone():
    entry = """\
  %a = f32[32,1024]{1,0:S(1)} parameter(0)
  %b = f32[1,1024]{1,0} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
  ROOT %result = f32[32,1024]{1,0:S(1)} dynamic-update-slice(%a, %b, %i, %i)"""
    assert cost("", entry).bytes == 4096


UPDATED = """\
%put (stack: f32[32,1024], row: f32[1024], i: s32[]) -> f32[32,1024] {
  %stack = f32[32,1024]{1,0} parameter(0)
  %row = f32[1024]{0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %twice = f32[1024]{0} add(%row, %row)
  %update = f32[1,1024]{1,0} bitcast(%twice)
  ROOT %put.1 = f32[32,1024]{1,0} dynamic-update-slice(%stack, %update, %i, %zero)
}
"""
UPDATING = """\
  %a = f32[32,1024]{1,0} parameter(0)
  %b = f32[1024]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %result = f32[32,1024]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%put"""


def test_an_update_in_place_at_the_root_of_a_fusion_moves_the_update():
    assert cost(UPDATED, UPDATING).bytes == 2 * 4096 + 4


def test_of_several_results_each_counts_as_it_is_written():
    both = UPDATED.replace("  ROOT %put.1", "  %put.1").replace(
        "%i, %zero)\n",
        "%i, %zero)\n  ROOT %both = (f32[32,1024]{1,0}, f32[1024]{0}) tuple(%put.1, %twice)\n",
    )
    tuple_shape = "(f32[32,1024]{1,0}, f32[1024]{0})"
    entry = UPDATING.replace("%result = f32[32,1024]{1,0}", f"%result = {tuple_shape}")
    assert cost(both, entry).bytes == 3 * 4096 + 4
    in_vmem = entry.replace("f32[1024]{0})", "f32[1024]{0:S(1)})")
    assert cost(both, in_vmem).bytes == 2 * 4096 + 4


def test_a_fusion_of_views_is_a_view():
    """XLA for TPU nests a change of type or layout in a fusion of its own."""
    views = """\
%viewed (v: f32[32,1024]) -> f32[32,1024] {
  %v = f32[32,1024]{1,0} parameter(0)
  ROOT %same = f32[32,1024]{1,0} bitcast(%v)
}

"""
    inside = "  %view = f32[32,1024]{1,0} fusion(%stack), kind=kLoop, calls=%viewed\n"
    sliced = SLICED.replace("  %i =", inside + "  %i =").replace("slice(%stack", "slice(%view")
    assert cost(views + sliced, SLICING).bytes == 3 * 4096 + 4
    updated = UPDATED.replace("  ROOT %put.1", "  %put.1").replace(
        "%i, %zero)\n",
        "%i, %zero)\n  ROOT %r = f32[32,1024]{1,0} fusion(%put.1), kind=kLoop, calls=%viewed\n",
    )
    assert cost(views + updated, UPDATING).bytes == 2 * 4096 + 4


def test_what_a_fusion_hands_on_is_not_moved():
    """So does a fusion beside which a collective runs: with what the collective reads."""
    computations = """\
%beside (a: f32[1024], b: f32[2048]) -> (f32[1024], f32[2048]) {
  %a = f32[1024]{0} parameter(0)
  %b = f32[2048]{0} parameter(1)
  %sum = f32[1024]{0} add(%a, %a)
  %last = f32[2048]{0} custom-call(%b), custom_call_target="ContinueGather"
  ROOT %both = (f32[1024]{0}, f32[2048]{0}) tuple(%sum, %last)
}
"""
    entry = """\
  %a = f32[1024]{0} parameter(0)
  %b = f32[2048]{0} parameter(1)
  ROOT %result = (f32[1024]{0}, f32[2048]{0}) fusion(%a, %b), kind=kCustom, \
output_to_operand_aliasing={{1}: (1, {})}, calls=%beside"""
    assert cost(computations, entry).bytes == 2 * 4096


STARTED = """\
%start (a: f32[1024]) -> (f32[1024], f32[4096]) {
  %a = f32[1024]{0} parameter(0)
BETWEEN  %g = f32[4096]{0} all-gather(WHAT), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %r = (f32[1024]{0}, f32[4096]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
"""


@pytest.mark.parametrize(
    ("between", "what", "moves"),
    [("", "%a", False), ("  %n = f32[1024]{0} negate(%a)\n", "%n", True)],
)
def test_a_fusion_that_starts_a_gather_and_no_more_moves_nothing(between, what, moves):
    """As XLA for v5e writes one: its result is what other chips will have sent."""
    computations = STARTED.replace("BETWEEN", between).replace("WHAT", what)
    entry = """\
  %a = f32[1024]{0} parameter(0)
  ROOT %result = (f32[1024]{0}, f32[4096]{0}) fusion(%a), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%start"""
    assert (cost(computations, entry).bytes > 0) == moves


def test_a_product_that_is_left_to_cublas_counts():
    """XLA for GPU writes `[128,64] x [64,256]` as a call that says what it contracts."""
    numbers = '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
    attributes = f'custom_call_target="__cublas$gemm", backend_config={numbers}'
    result = "(bf16[128,256]{1,0}, s8[1024]{0})"
    lines = f"""
ENTRY %main (a: bf16[128,64], b: bf16[64,256]) -> (bf16[128,256], s8[1024]) {{
  %a = bf16[128,64]{{1,0}} parameter(0)
  %b = bf16[64,256]{{1,0}} parameter(1)
  ROOT %c = {result} custom-call(bf16[128,64]{{1,0}} %a, bf16[64,256]{{1,0}} %b), {attributes}
}}
"""
    module = Module("HloModule test\n" + lines)
    entry = module.computations[module.entry]
    assert product_flops(entry, entry.instructions["c"]) == 2 * 128 * 64 * 256
