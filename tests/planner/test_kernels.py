"""Work of kernels by the shapes of their calls: pairs counted one by one, rows of groups."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxft.compiled.hlo import Computation, Instruction, Module
from jaxft.hardware.chips import chip_named
from jaxft.models.config import DeltaConfig, LayerKind
from jaxft.models.delta import Chunking, chunking
from jaxft.models.families import architecture_from_hf
from jaxft.planner.kernels import (
    EFFICIENCY,
    delta_traffic,
    efficiency,
    grouped_work,
    kernels_of,
    mean_visible_pairs,
    splash_flops,
)
from jaxft.planner.timeline import MATMUL, Rates
from tests.oracle.cases import CASES

ROWS, HEADS, LENGTH, SIZE = 2, 4, 64, 128
# Windows of 6 and none.
ALTERNATING = dataclasses.replace(
    architecture_from_hf(CASES["qwen2_layer_types"]).config, head_dim=SIZE
)


def visible(window: int, length: int = LENGTH) -> int:
    return sum(min(query + 1, window or length) for query in range(length))


def test_visible_pairs_are_right_to_half_a_token_of_each_query():
    for length in (1, 5, 64):
        exact = (visible(6, length) + visible(0, length)) / 2
        assert abs(mean_visible_pairs(ALTERNATING, length) - exact) <= length / 2


def test_layers_count_by_the_size_of_their_heads():
    """Four layers have windows and heads of 8, two have none and heads of 16."""
    config = architecture_from_hf(CASES["gemma4_text_gqa"]).config
    local, full = (mean_visible_pairs(config, LENGTH, head_dim=size) for size in (8, 16))
    plain = dataclasses.replace(config, kinds=(LayerKind(),), pattern=(0,), layers=1)
    assert local < full == mean_visible_pairs(plain, LENGTH)
    assert mean_visible_pairs(config, LENGTH) == pytest.approx((local + full) / 2)
    assert config.mean_head_dim == pytest.approx((4 * 8 + 2 * 16) / 6)
    assert config.head_dims == [8, 16]


def call(
    kernel: str,
    queries: int = LENGTH,
    *,
    dtype: str = "bf16",
    rows: tuple[int, ...] = (ROWS,),
    results: int = 1,
) -> tuple[Instruction, Computation]:
    """Returns the call of a kernel and the computation that it stands in."""

    def shape(dtype: str, *sizes: int) -> str:
        return f"{dtype}[{','.join(map(str, (*rows, *sizes)))}]"

    of_keys, of_queries = (shape(dtype, HEADS, n, SIZE) for n in (LENGTH, queries))
    of_values = shape(dtype, HEADS, LENGTH, SIZE // 2)
    segments = shape("s32", 8, 2 * LENGTH, 1)  # larger than what is multiplied
    sinks = f"{dtype}[{HEADS},{2 * LENGTH}]"
    result = f"({', '.join([of_queries] * results)})" if results > 1 else of_queries
    module = Module(f"""\
HloModule kernels

ENTRY %main (s: {segments}, b: {sinks}, q: {of_queries}, k: {of_keys}, v: {of_values}) -> \
{result} {{
  %s = {segments} parameter(0)
  %b = {sinks} parameter(1)
  %q = {of_queries} parameter(2)
  %k = {of_keys} parameter(3)
  %v = {of_values} parameter(4)
  ROOT %{kernel} = {result} custom-call(%s, %b, %q, %k, %v)
}}
""")
    main = module.computations["main"]
    return main.instructions[kernel], main


@pytest.mark.parametrize(
    ("kernel", "results", "products"),
    [
        ("splash_mha_fwd_residuals.1", 2, (1, 1)),
        # Two kernels of the backward pass make seven products, one with three results five.
        ("splash_mha_dkv.3", 2, (2, 2)),
        ("splash_mha_dq.2", 1, (2, 1)),
        ("splash_mha_dkv.3", 3, (3, 2)),
    ],
)
def test_a_kernel_multiplies_the_pairs_that_its_windows_leave(kernel, results, products):
    """With heads of queries and keys, and with those of values, which are narrower."""
    flops, size = splash_flops(*call(kernel, results=results), ALTERNATING)  # pyright: ignore
    pairs = mean_visible_pairs(ALTERNATING, LENGTH)
    assert size == SIZE
    of_keys, of_values = products
    numbers = of_keys * SIZE + of_values * SIZE // 2
    assert flops == pytest.approx(2 * ROWS * HEADS * pairs * numbers)


def test_a_device_with_a_part_of_a_row_has_its_share_of_the_queries():
    whole, half = (splash_flops(*call("splash_mha_fwd", n), ALTERNATING) for n in (64, 32))
    assert half[0] == whole[0] / 2  # pyright: ignore


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_dimension_of_one_row_may_be_left_out(dtype):
    of_rows, of_one = (
        splash_flops(*call("splash_mha_fwd", dtype=dtype, rows=rows), ALTERNATING)
        for rows in ((ROWS,), ())
    )
    assert of_one[0] == of_rows[0] / ROWS  # pyright: ignore


def grouped(kind: str, result: str, left: str, right: str) -> tuple[Instruction, Computation]:
    """Returns the call of a product of groups of rows, and the computation that it stands in."""
    origin = f'metadata={{op_name="jit(f)/transpose(jvp(jit({kind})))/pallas_call"}}'
    call = f'custom-call(%s, %a, %b), custom_call_target="tpu_custom_call", {origin}'
    module = Module(f"""\
HloModule kernels

ENTRY %main (s: s32[8], a: {left}, b: {right}) -> {result} {{
  %s = s32[8] parameter(0)
  %a = {left} parameter(1)
  %b = {right} parameter(2)
  ROOT %found = {result} {call}
}}
""")
    main = module.computations["main"]
    return main.instructions["found"], main


def test_a_product_of_groups_is_of_the_rows_that_come_to_a_device():
    """All where it has all 4 experts; of 2, with room for the worst case, half on average."""
    config = architecture_from_hf(CASES["mixtral_tied"]).config
    assert config.experts is not None
    assert (config.experts.count, config.experts.chosen) == (4, 2)
    v5p = chip_named("v5p")
    assert v5p is not None
    rows, inner, outer = 4096, 512, 1024
    x, dy, w = (
        f"bf16[{a},{b}]" for a, b in ((rows, inner), (rows, outer), (f"{{}},{outer}", inner))
    )
    for experts, used in ((4, 1.0), (2, 0.5)):
        calls = (
            grouped("gmm", dy, x, w.format(experts)),
            grouped("gmm", x, dy, w.format(experts)),
            grouped("tgmm", w.format(experts), dy, x),
        )
        for call_ in calls:
            flops, done, moved = grouped_work(*call_, config, v5p)  # pyright: ignore
            assert flops == 2 * used * rows * inner * outer
            assert flops < done < 1.5 * flops
            assert moved > 2 * (used * rows * (inner + outer) + experts * inner * outer)
            kernel = kernels_of(config, v5p, Rates())(*call_)
            assert kernel is not None and (kernel.kind, kernel.flops) == (MATMUL, flops)
            assert kernel.seconds >= done / v5p.bfloat16


def test_another_kernel_is_not_counted():
    assert splash_flops(*call("gmm.1"), ALTERNATING) is None
    v6e = chip_named("v6e")
    assert v6e is not None
    assert kernels_of(ALTERNATING, v6e, Rates())(*call("gmm.1")) is None


COMPILED = Path(__file__).parents[2] / "benchmarks/results/2026-11-29-delta.jsonl"


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_what_the_delta_rule_moves_is_what_its_compiled_program_does(name):
    """Forward and backward, of a row of 4,096 tokens; on v5p what a chunk makes passes memory."""
    chip = chip_named(name)
    assert chip is not None
    records = map(json.loads, COMPILED.read_text().splitlines())
    [found] = [
        record
        for record in records
        if record.get("slice", "").startswith(f"{name}:")
        and Chunking(record["chunk"], record["span"]) == chunking("tpu")
    ]
    size, heads, keys = (found[key] for key in ("size", "heads", "keys"))
    traffic = delta_traffic(
        DeltaConfig(keys, heads, size, size, 4),
        found["length"],
        2,
        "tpu",
        values=heads,
        keys=keys,
        stays=chip.kernel_cores == 1,
    )
    assert found["length"] * sum(traffic) == pytest.approx(found["moved_bytes"], rel=0.15)


def test_small_heads_leave_a_matrix_unit_idle():
    v6e, h100 = chip_named("v6e"), chip_named("h100")
    assert v6e is not None and h100 is not None
    assert efficiency(v6e, v6e.lanes) == efficiency(v6e, 2 * v6e.lanes) == EFFICIENCY
    assert efficiency(v6e, v6e.lanes // 4) == EFFICIENCY / 4
    assert efficiency(dataclasses.replace(v6e, lanes=0), 64) == EFFICIENCY
