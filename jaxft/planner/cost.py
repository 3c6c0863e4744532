"""The work of one instruction of a compiled program: what it computes and moves."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxft.compiled.hlo import HBM, Array, Computation, Instruction, Module, arrays

# Values that are the same bytes under another name.
_VIEWS = ("bitcast", "get-tuple-element", "reshape", "convert", "copy", "transpose")
_FREE = (
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
    "opt-barrier iota add-dependency send recv send-done recv-done "
    "call-update async-update"
).split()


@dataclass(frozen=True, slots=True)
class Cost:
    """The work of one run of an instruction on one device.

    Attributes:
      flops: FLOPs of matrix products, a multiplication and an addition counted as two.
      bytes: Bytes to and from the device's main memory.
      cycles: The compiler's own estimate; 0 if it made none.
      passes: Products of bfloat16 that a TPU makes for each product that is asked for: of whole
        float32 six.
      dtype: Type at whose rate products are made, as `Chip.peak` takes it.
    """

    flops: float = 0
    bytes: float = 0
    cycles: float = 0
    passes: int = 1
    dtype: str = "bfloat16"


def cost_of(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    """Reads the cost of an instruction that calls no other program.

    Bytes are those of operands and results that lie in main memory, tiles padded: of an operand
    that is only sliced the slices, of a buffer that is updated in place the update.
    """
    if instruction.opcode in _FREE or _only_starts(module, instruction):
        return Cost()
    products = list(_products(module, computation, instruction))
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    dtypes = {product.dtype for product in products}
    return Cost(
        flops=sum(product.flops for product in products),
        bytes=_bytes_read(module, computation, instruction)
        + _bytes_written(module, computation, instruction),
        cycles=int(cycles[1]) if cycles else 0,
        passes=max((product.passes for product in products), default=1),
        dtype=dtypes.pop() if len(dtypes) == 1 else "bfloat16",
    )


def _only_starts(module: Module, instruction: Instruction) -> bool:
    """Whether a fusion starts a gather and no more: links bring its result, not the core."""
    body = module.fused(instruction)
    if body is None or body.instructions[body.root].target != "AsyncCollectiveStart":
        return False
    others = [i for i in body.instructions.values() if i.name != body.root]
    return all(i.opcode in ("parameter", "all-gather") or is_view(module, i) for i in others)


class _Product(NamedTuple):
    """A matrix product: its FLOPs, and `passes` and `dtype` of `Cost`."""

    flops: float
    passes: int
    dtype: str


def _products(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[_Product]:
    """Yields the products of an instruction, of a fusion those in its body."""
    body = module.fused(instruction)
    if body is not None:
        for inner in body.instructions.values():
            yield from _products(module, body, inner)
    elif flops := product_flops(computation, instruction):
        passes = _PASSES.get(_precision(instruction), 1)
        yield _Product(flops, passes, _rated(computation, instruction))


# By the precision that a product is asked for with.
_PASSES = {"": 1, "default": 1, "high": 3, "highest": 6}


def _precision(instruction: Instruction) -> str:
    found = re.search(r"operand_precision=\{(\w+)", instruction.rest)
    return found[1] if found else ""


# Types of 8 bits in XLA's spelling, by which chips have rates of their own. Where a chip has no
# such products, its compiler converts what is multiplied.
_RATED = {"s8": "int8", "f8e4m3fn": "float8", "f8e5m2": "float8"}


def _rated(computation: Computation, product: Instruction) -> str:
    operands = (computation.instructions[name] for name in product.operands[:2])
    rated = {_RATED.get(arrays(operand.shape)[0].dtype, "bfloat16") for operand in operands}
    return rated.pop() if len(rated) == 1 else "bfloat16"


# Instructions that start a copy between memories.
MOVES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")


def moved_bytes(instruction: Instruction) -> int:
    """Returns what an instruction of `MOVES` brings from one memory to another."""
    parts = [a for a in arrays(instruction.shape) if a.sizes and a.dtype != "u32"]
    return min((a.padded_bytes for a in parts if a.bytes > 4), default=0)


def in_hbm(shape: str) -> list[Array]:
    """Returns the arrays of a shape that lie in main memory."""
    return [array for array in arrays(shape) if array.space == HBM]


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a matrix product: `dot`, `convolution`, cuBLAS; 0 for what is none."""
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.target.startswith("__cublas$"):
        return _library_flops(computation, instruction)
    return 0.0


def _sizes(computation: Computation, name: str) -> tuple[int, ...]:
    return arrays(computation.instructions[name].shape)[0].sizes


def _dot_flops(computation: Computation, dot: Instruction) -> float:
    return _product_flops(computation, dot, r"lhs_contracting_dims=\{([\d,]*)\}")


def _library_flops(computation: Computation, call: Instruction) -> float:
    """Counts a product that XLA for GPU leaves to cuBLAS, which says what it contracts."""
    return _product_flops(computation, call, r'"lhs_contracting_dimensions":\[([^\]]*)\]')


def _product_flops(computation: Computation, product: Instruction, contracted: str) -> float:
    """Counts 2 of each output and place of the left operand's dimensions that a pattern finds."""
    found = re.search(contracted, product.rest)
    left = _sizes(computation, product.operands[0])
    inner = math.prod(left[int(i)] for i in re.findall(r"\d+", found[1] if found else ""))
    return 2.0 * math.prod(arrays(product.shape)[0].sizes) * inner


def _convolution_flops(computation: Computation, convolution: Instruction) -> float:
    """Counts pairs of an output and a kernel's place that meet a number and not padding.

    XLA for TPU writes matrix products as convolutions, batches of them with dilated inputs.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    assert labels is not None
    inputs, kernel = (_sizes(computation, name) for name in convolution.operands[:2])
    outputs = arrays(convolution.shape)[0].sizes
    window = _window(convolution.rest)
    pairs = 1.0
    for place, digit in enumerate(c for c in sorted(labels[3]) if c.isdigit()):
        setting = {name: values[place] for name, values in window.items()}
        pairs *= _meetings(
            inputs[labels[1].index(digit)],
            kernel[labels[2].index(digit)],
            outputs[labels[3].index(digit)],
            **setting,
        )
    features = kernel[labels[2].index("i")] * outputs[labels[3].index("f")]
    batch = outputs[labels[3].index("b")]
    return 2.0 * pairs * features * batch


def _window(attributes: str) -> dict[str, list]:
    """Returns stride, padding before and dilations for each dimension of a convolution's window."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    settings = dict(part.split("=") for part in found[1].split()) if found else {}
    count = len(settings["size"].split("x")) if "size" in settings else 0

    def of(name: str, default: str) -> list[str]:
        return settings[name].split("x") if name in settings else [default] * count

    return {
        "stride": [int(x) for x in of("stride", "1")],
        "pad": [int(x.split("_")[0]) for x in of("pad", "0_0")],
        "dilation": [int(x) for x in of("lhs_dilate", "1")],
        "spread": [int(x) for x in of("rhs_dilate", "1")],
    }


def _meetings(
    inputs: int, kernel: int, outputs: int, *, stride: int, pad: int, dilation: int, spread: int
) -> int:
    if (kernel, stride, pad, dilation) == (1, 1, 0, 1):
        return min(outputs, inputs)
    last = (inputs - 1) * dilation
    return sum(
        0 <= (place := o * stride - pad + k * spread) <= last and place % dilation == 0
        for o in range(outputs)
        for k in range(kernel)
    )


def _bytes_read(module: Module, computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dynamic-slice":
        return sum(array.padded_bytes for array in in_hbm(instruction.shape))
    body = module.fused(instruction)
    passed = set(_passed_on(instruction).values())
    total = 0.0
    for number, operand in enumerate(instruction.operands):
        if number in passed:
            continue
        shape = computation.instructions[operand].shape
        size = sum(array.padded_bytes for array in in_hbm(shape))
        if instruction.opcode == "dynamic-update-slice" and number == 0:
            continue
        if body is not None and size and number in body.parameters:
            size = min(size, _used(module, body, body.parameters[number].name))
        total += size
    return total


def _passed_on(instruction: Instruction) -> dict[int, int]:
    """Returns which results are operands handed on: those of a collective that runs beside."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?)\}, calls", instruction.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", found[1]) if found else []
    return {int(result or 0): int(operand) for result, operand in pairs}


def _used(module: Module, body: Computation, name: str) -> float:
    """Returns the bytes of a value that the body of a fusion looks at."""
    whole = sum(array.padded_bytes for array in arrays(body.instructions[name].shape))
    total = 0.0
    for user in body.users[name]:
        inner = module.fused(user)
        if is_view(module, user):
            total += _used(module, body, user.name) if body.users[user.name] else whole
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(array.padded_bytes for array in arrays(user.shape))
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif inner is not None:
            number = user.operands.index(name)
            total += _used(module, inner, inner.parameters[number].name)
        else:
            return whole
    return min(whole, total)


def is_view(module: Module, instruction: Instruction) -> bool:
    """Whether a value is the bytes of its operand under another name, type or layout."""
    body = module.fused(instruction)
    if body is None:
        return instruction.opcode in _VIEWS
    return len(instruction.operands) == 1 and all(
        inner.opcode == "parameter" or inner.opcode in _VIEWS
        for inner in body.instructions.values()
    )


def _bytes_written(module: Module, computation: Computation, instruction: Instruction) -> float:
    body = module.fused(instruction)
    if body is None:
        whole = in_hbm(instruction.shape)
        if whole and instruction.opcode == "dynamic-update-slice":
            return _written(module, computation, instruction.name, whole)
        return sum(array.padded_bytes for array in whole)
    root = body.instructions[body.root]
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    results = arrays(instruction.shape)
    if len(parts) != len(results):
        return sum(array.padded_bytes for array in in_hbm(instruction.shape))
    passed = _passed_on(instruction)
    return sum(
        _written(module, body, part, [result])
        for number, (part, result) in enumerate(zip(parts, results, strict=True))
        if result.space == HBM and number not in passed
    )


def _written(module: Module, body: Computation, name: str, whole: list[Array]) -> float:
    """Returns the bytes of a result, of one that is updated in place those of the update."""
    made = body.instructions[name]
    while made.operands and is_view(module, made):
        made = body.instructions[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        update = body.instructions[made.operands[1]].shape
        return sum(array.padded_bytes for array in arrays(update))
    inner = module.fused(made)
    if inner is not None:
        return _written(module, inner, inner.root, whole)
    return sum(array.padded_bytes for array in whole)


def totals(module: Module, kernels: Any) -> tuple[Mapping[str, float], float]:
    """Returns FLOPs of matrix products by `Cost.dtype`, and bytes of main memory.

    Both of one step on a device. `kernels` says what a kernel is, as `planner.timeline.Simulator`
    takes it.
    """

    def visit(name: str, times: float) -> tuple[Mapping[str, float], float]:
        computation = module.computations[name]
        flops, moved = defaultdict[str, float](float), 0.0
        for instruction in computation.instructions.values():
            ran = called(module, computation, instruction)
            for inner, runs in ran:
                more = visit(inner, times * runs)
                for dtype, count in more[0].items():
                    flops[dtype] += count
                moved += more[1]
            if instruction.opcode in MOVES:
                moved += times * moved_bytes(instruction)
            if ran or instruction.opcode.endswith(("-start", "-done")):
                continue
            cost = cost_of(module, computation, instruction)
            kernel = kernels(instruction, computation)
            flops[cost.dtype] += times * (cost.flops + (kernel.flops if kernel else 0.0))
            moved += times * cost.bytes
        return flops, moved

    return visit(module.entry, 1.0)


def called(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[str, float]]:
    """Returns what an instruction runs, and how often; of branches each for its share."""
    if instruction.opcode == "while":
        trips = module.trips(computation, instruction)
        return [(instruction.called("body")[0], 1 if trips is None else trips)]
    if instruction.opcode == "conditional":
        branches = module.branches(instruction)
        return [(branch, 1 / len(branches)) for branch in branches]
    if instruction.opcode == "call":
        return [(name, 1) for name in instruction.called("to_apply")]
    return []
