"""The one table of published figures: what chips can do at their best, with sources.

All figures are of a chip, which is not always one jax device: `Chip.cores` says how many it is.
Rates are in bytes or operations a second, sizes in bytes; 0 stands for what is not published or
does not exist. One file because it is one table, beside the few functions that look things up.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

_GIB = 1 << 30
_GIGA, _TERA = 1e9, 1e12

# Where the figures come from. Pages of Google's documentation lie under
# https://docs.cloud.google.com/tpu/docs/, seen as of 2026-08; "scaling book" is
# https://jax-ml.github.io/scaling-book/tpus/; "compiler" is the limit that libtpu 0.0.50 names when
# a program does not fit (tests/test_planner_tpu.py asks it).
_BOOK = "scaling book"
# XLA's product of 8192 x 8192 matrices on v5e (docs.jax.dev, pallas/tpu/matmul.html); taken
# for all whose matrix unit is of 128 x 128.
_V5E_PRODUCTS = 0.923
_V4_PAPER = "Jouppi et al., https://arxiv.org/abs/2304.01433, table 4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Torus:
    """The links between the chips of a TPU slice (ICI).

    Attributes:
      dimensions: 2 or 3; a chip has two links in each.
      link: Rate of one link in one direction. Google names the sum over all links and both
        directions; a tenth is taken off it, as the scaling book does, for what transfers reach.
      pod: Chips along a side of the largest slice in two dimensions.
    """

    dimensions: int
    link: float
    pod: int = 16

    def wraps(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Returns for each dimension of a slice whether its last chip is linked with its first.

        Slices in two dimensions wrap where they are as long as a pod, those in three only if every
        dimension is a multiple of 4 (Google's pages v5e, v6e, v5p).
        """
        if self.dimensions == 3:
            return (all(size % 4 == 0 for size in shape),) * len(shape)
        return tuple(size == self.pod for size in shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The links between the GPUs of one NVLink domain.

    Attributes:
      size: GPUs in it.
      link: Rate of one GPU in one direction.
    """

    size: int
    link: float


# Figures of a chip that its cores share.
_RATES = ("bfloat16", "float32", "single", "int8", "float8", "bandwidth", "dcn", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      name: Name under which it is sold.
      kind: Regular expression found in `jax.Device.device_kind`.
      cores: jax devices of one chip.
      bfloat16: Dense matrix FLOP/s with 16-bit inputs and float32 sums.
      float32: FLOP/s of float32 matrix products at jax's default precision: one bfloat16 pass on
        TPU, TF32 on NVIDIA from Ampere on.
      single: FLOP/s of float32 without matrix units, which whole float32 products take on NVIDIA.
      int8: Dense matrix operations a second.
      float8: Dense matrix FLOP/s with 8-bit floats.
      memory: Device memory.
      usable: Part of it that is free for a program.
      bandwidth: Rate of the device memory.
      network: Links to the chips beside it.
      dcn: Rate to chips elsewhere, in one direction: data centre network, InfiniBand.
      host: Rate to the host's memory, in one direction.
      clock: Cycles a second of the TensorCore, in which the TPU compiler estimates.
      lanes: Columns of a TPU's matrix unit.
      kernel_memory: Bytes on the chip for a kernel that asks for none, as the compiler's refusal of
        larger ones says.
      kernel_cores: Cores of a jax device that share a kernel's blocks.
      offloads: Whether its SparseCores can gather and reduce-scatter beside the TensorCore.
      hops: Whether a reduce-scatter keeps the TensorCore from its products, and a copy to the next
        chip does not, so that gradients are better summed by copies.
      fuses: Whether attention's gradients are better made by one kernel, in five products, than by
        two, in seven. Published runs of MaxText have one on v6e and tpu7x (recipes of
        github.com/AI-Hypercomputer/tpu-recipes), and two on v5p, whose chips, as v4's, are two
        cores that share a kernel; v5e has one core like v6e.
      product_share: Share of the peak that large matrix products reach.
      host_memory: Memory of the host, the share of one chip in the largest machine sold.
      capability: Compute capability of an NVIDIA GPU that can be planned for.
      sources: Sources of the figures.
    """

    name: str
    kind: str
    cores: int = 1
    bfloat16: float
    float32: float
    single: float = 0
    int8: float = 0
    float8: float = 0
    memory: int
    usable: int = 0
    bandwidth: float = 0
    network: Torus | Switch | None = None
    dcn: float = 0
    host: float = 0
    clock: float = 0
    lanes: int = 0
    kernel_memory: int = 16 << 20
    kernel_cores: int = 1
    offloads: bool = False
    hops: bool = False
    fuses: bool = False
    product_share: float = 1.0
    host_memory: int = 0
    capability: str = ""
    sources: tuple[str, ...] = ()

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU that can be compiled for without having one."""
        return isinstance(self.network, Torus)

    @property
    def is_timed(self) -> bool:
        """Whether the times of any run on it can be estimated: rates and links are published."""
        return bool(self.bfloat16 and self.bandwidth and self.network)

    @property
    def limit(self) -> int:
        """Memory for a program: of GPUs, where drivers and libraries take a share, 92 %."""
        return self.usable or round(0.92 * self.memory)

    @property
    def core(self) -> "Chip":
        """The share of one jax device; links stay whole, as devices of a chip share them."""
        share = {name: getattr(self, name) / self.cores for name in _RATES}
        sizes = {
            name: getattr(self, name) // self.cores for name in ("memory", "usable", "host_memory")
        }
        return replace(self, cores=1, **share, **sizes)

    @property
    def exact(self) -> float:
        """FLOP/s of float32 products at jax's precision `highest`: six of bfloat16 on TPU.

        Of GPUs whose rate without matrix units is not known it is `float32`.
        """
        return self.bfloat16 / 6 if self.is_tpu else self.single or self.float32

    def peak(self, dtype: str) -> float:
        """Returns the rate of dense matrix products of a dtype by name; 0 if it has none."""
        names = {"float16": "bfloat16", "float8_e4m3fn": "float8", "float8_e5m2": "float8"}
        name = names.get(dtype, dtype)
        return getattr(self, name) if name in ("bfloat16", "float32", "int8", "float8") else 0


def _tpu(name: str, kind: str, teraflops: float, **figures) -> Chip:
    rate = teraflops * _TERA
    return Chip(name=name, kind=kind, bfloat16=rate, float32=rate, **figures)


def _gpu(
    name: str,
    kind: str,
    teraflops: float,
    gib: int,
    *,
    float32: float | None = None,
    int8: float = 0,
    eight_bits: bool = False,
    **figures,
) -> Chip:
    rounded = teraflops / 2 if float32 is None else float32
    # int8 and float8, where a GPU has both, are made at twice the rate of bfloat16.
    doubled = 2 * teraflops * _TERA if eight_bits else 0
    return Chip(
        name=name,
        kind=kind,
        bfloat16=teraflops * _TERA,
        float32=rounded * _TERA,
        int8=int8 or doubled,
        float8=doubled,
        memory=gib * _GIB,
        product_share=0.73,
        sources=(
            "NVIDIA data sheet, without the factor two of structured sparsity",
            "dcn: InfiniBand of one network card a GPU, 400 Gb/s (200 with A100), as Azure's ND "
            "machines have, of L4 an eighth of AWS g6.48xlarge's 100 Gb/s; host: PCIe 5 x16 (4 "
            "with A100 and L4), of GB200 NVLink-C2C, from memory",
            "product_share: about 720 of 989 TFLOP/s on H100, taken for all "
            "(newsletter.semianalysis.com, MI300X vs H100 vs H200, 2024-12)",
        ),
        **figures,
    )


_HOPPER: dict[str, Any] = {"single": 67 * _TERA, "eight_bits": True}

# The first whose `kind` is found wins.
CHIPS: tuple[Chip, ...] = (
    _tpu(
        "v2",
        r"^TPU v2$",
        45,
        cores=2,
        memory=16 * _GIB,
        usable=2 * round(7.48 * _GIB),
        bandwidth=700 * _GIGA,
        network=Torus(dimensions=2, link=56 * _GIGA),
        host=16 * _GIGA,
        clock=0.7 * _GIGA,
        lanes=128,
        product_share=_V5E_PRODUCTS,
        sources=(
            "Google v2 page; links, memory: Norrie et al., 10.1109/MM.2021.3058217",
            "usable: compiler",
        ),
    ),
    _tpu(
        "v3",
        r"^TPU v3$",
        123,
        cores=2,
        memory=32 * _GIB,
        usable=2 * round(15.48 * _GIB),
        bandwidth=900 * _GIGA,
        network=Torus(dimensions=2, link=63 * _GIGA, pod=32),
        host=16 * _GIGA,
        clock=0.94 * _GIGA,
        lanes=128,
        product_share=_V5E_PRODUCTS,
        sources=("Google v3 page", f"links, clock: {_V4_PAPER}", "usable: compiler"),
    ),
    _tpu(
        "v4i",
        r"^TPU v4 lite$",
        138,
        memory=8 * _GIB,
        bandwidth=614 * _GIGA,
        sources=("Jouppi et al., 10.1109/ISCA52012.2021.00010",),
    ),
    _tpu(
        "v4",
        r"^TPU v4$",
        275,
        int8=275 * _TERA,
        memory=32 * _GIB,
        usable=round(30.75 * _GIB),
        bandwidth=1200 * _GIGA,
        network=Torus(dimensions=3, link=45 * _GIGA),
        dcn=6.25 * _GIGA,
        host=16 * _GIGA,
        clock=1.05 * _GIGA,
        lanes=128,
        kernel_cores=2,
        product_share=_V5E_PRODUCTS,
        sources=("Google v4 page", f"clock: {_V4_PAPER}", f"links: {_BOOK}", "usable: compiler"),
    ),
    _tpu(
        "v5e",
        r"^TPU v5 ?(lite|e)$",
        197,
        int8=393 * _TERA,
        memory=16 * _GIB,
        usable=round(15.75 * _GIB),
        bandwidth=819 * _GIGA,
        network=Torus(dimensions=2, link=45 * _GIGA),
        dcn=3.125 * _GIGA,
        host=16 * _GIGA,
        clock=1.5 * _GIGA,
        lanes=128,
        host_memory=48 * _GIB,
        hops=True,
        fuses=True,
        product_share=_V5E_PRODUCTS,
        sources=("Google v5e page", f"links, clock, host, dcn: {_BOOK}", "usable: compiler"),
    ),
    _tpu(
        "v5p",
        r"^TPU v5p?$",
        459,
        int8=918 * _TERA,
        float8=459 * _TERA,
        memory=95 * _GIB,
        usable=round(95.73 * _GIB),
        bandwidth=2765 * _GIGA,
        network=Torus(dimensions=3, link=90 * _GIGA),
        dcn=6.25 * _GIGA,
        host=16 * _GIGA,
        clock=1.75 * _GIGA,
        lanes=128,
        kernel_cores=2,
        host_memory=112 * _GIB,
        offloads=True,
        product_share=_V5E_PRODUCTS,
        sources=(
            "Google v5p page, which rounds 95.7 GiB that programs can have down to 95",
            f"links, clock, host, dcn: {_BOOK}",
            "usable: compiler",
        ),
    ),
    _tpu(
        "v6e",
        r"^TPU v6 ?(lite|e)$",
        918,
        int8=1836 * _TERA,
        float8=918 * _TERA,
        memory=32 * _GIB,
        usable=round(31.24 * _GIB),
        bandwidth=1638 * _GIGA,
        network=Torus(dimensions=2, link=90 * _GIGA),
        dcn=12.5 * _GIGA,
        host=32 * _GIGA,
        # Not published. Four products of 256 x 256 in a cycle at v5p's clock give the peak.
        clock=1.75 * _GIGA,
        lanes=256,
        kernel_memory=32 << 20,
        host_memory=180 * _GIB,
        offloads=True,
        fuses=True,
        product_share=0.78,
        sources=(
            "Google v6e page",
            f"links, host, dcn: {_BOOK}",
            "usable: compiler",
            "product_share: 720 of 918 TFLOP/s in a profile of a step of Llama-3-8B "
            "(github.com/vlasenkoalexey/tpu_performance_autoresearch_wiki, experiment 28b)",
        ),
    ),
    _tpu(
        "tpu7x",
        r"^TPU ?v?7x?$",
        2307,
        cores=2,
        float8=4614 * _TERA,
        memory=192 * _GIB,
        usable=2 * round(94.74 * _GIB),
        bandwidth=7380 * _GIGA,
        network=Torus(dimensions=3, link=90 * _GIGA),
        dcn=12.5 * _GIGA,
        # Not published; PCIe 5 as in v6e.
        host=32 * _GIGA,
        # Not published. As v6e: a core of it has four products of 256 x 256 in a cycle.
        clock=2307 * _TERA / 2 / (4 * 256 * 256 * 2),
        lanes=256,
        kernel_memory=32 << 20,
        host_memory=240 * _GIB,
        fuses=True,
        product_share=0.83,
        sources=(
            "Google tpu7x page",
            "usable: compiler",
            "product_share: 956 of 1,153 TFLOP/s a core at 32768 "
            "(github.com/AI-Hypercomputer/accelerator-microbenchmarks, Ironwood)",
        ),
    ),
    # A slice of a GPU has no published peak; no figure is better than a wrong one.
    Chip(name="MIG", kind=r"\bMIG\b", bfloat16=0, float32=0, memory=0),
    _gpu(
        "gb200",
        r"\bGB200\b",
        2500,
        186,
        float32=1250,
        single=80 * _TERA,
        eight_bits=True,
        bandwidth=8000 * _GIGA,
        network=Switch(size=72, link=900 * _GIGA),
        dcn=50 * _GIGA,
        host=450 * _GIGA,
        capability="10.0",
    ),
    _gpu(
        "b200",
        r"\bB200\b",
        2250,
        180,
        float32=1100,
        single=75 * _TERA,
        eight_bits=True,
        bandwidth=8000 * _GIGA,
        network=Switch(size=8, link=900 * _GIGA),
        dcn=50 * _GIGA,
        host=64 * _GIGA,
        capability="10.0",
    ),
    _gpu("gh200-144", r"\bGH200 144G\b", 989.4, 144, bandwidth=4900 * _GIGA, **_HOPPER),
    _gpu("gh200", r"\bGH200\b", 989.4, 96, bandwidth=4000 * _GIGA, **_HOPPER),
    _gpu("h200-nvl", r"\bH200 NVL\b", 835.5, 141, eight_bits=True),
    _gpu(
        "h200",
        r"\bH200\b",
        989.4,
        141,
        **_HOPPER,
        bandwidth=4800 * _GIGA,
        network=Switch(size=8, link=450 * _GIGA),
        dcn=50 * _GIGA,
        host=64 * _GIGA,
        capability="9.0",
    ),
    _gpu("h100-nvl", r"\bH100 NVL\b", 835.5, 94, eight_bits=True),
    _gpu("h100-pcie", r"\bH100 PCIe\b", 756, 80, eight_bits=True),
    _gpu(
        "h100",
        r"\bH100\b",
        989.4,
        80,
        **_HOPPER,
        bandwidth=3350 * _GIGA,
        network=Switch(size=8, link=450 * _GIGA),
        dcn=50 * _GIGA,
        host=64 * _GIGA,
        capability="9.0",
    ),
    _gpu("h800", r"\bH800\b", 989.4, 80, eight_bits=True),
    _gpu(
        "a100",
        r"\bA100\b.*\b80GB\b",
        312,
        80,
        single=19.5 * _TERA,
        int8=624 * _TERA,
        bandwidth=2039 * _GIGA,
        network=Switch(size=8, link=300 * _GIGA),
        dcn=25 * _GIGA,
        host=32 * _GIGA,
        capability="8.0",
    ),
    _gpu(
        "a100-40",
        r"\bA100\b",
        312,
        40,
        single=19.5 * _TERA,
        int8=624 * _TERA,
        bandwidth=1555 * _GIGA,
        network=Switch(size=8, link=300 * _GIGA),
        dcn=25 * _GIGA,
        host=32 * _GIGA,
        capability="8.0",
    ),
    _gpu("a800", r"\bA800\b", 312, 80),
    _gpu("l40s", r"\bL40S\b", 362, 48, eight_bits=True),
    _gpu("l40", r"\bL40\b", 181, 48, eight_bits=True),
    _gpu(
        "l4",
        r"\bL4\b",
        121,
        24,
        single=30.3 * _TERA,
        eight_bits=True,
        bandwidth=300 * _GIGA,
        # No NVLink: by PCIe 4 x16, through the host.
        network=Switch(size=8, link=32 * _GIGA),
        dcn=1.56 * _GIGA,
        host=32 * _GIGA,
        capability="8.9",
    ),
    _gpu("a10g", r"\bA10G\b", 70, 24),
    _gpu("a10", r"\bA10\b", 125, 24),
    _gpu("a30", r"\bA30\b", 165, 24),
    _gpu("rtx-a6000", r"\bRTX A6000\b", 154.8, 48),
    _gpu("rtx-6000-ada", r"\bRTX 6000 Ada\b", 364.2, 48, float32=182.1),
    _gpu("rtx-5090", r"\bRTX 5090\b", 209.5, 32),
    _gpu("rtx-4090", r"\bRTX 4090\b", 165.2, 24),
    _gpu("rtx-3090", r"\bRTX 3090\b(?! Ti)", 71, 24),
    # No bfloat16 and no TF32 in hardware: the float16 rate, and the plain float32 one.
    _gpu("v100-sxm-32", r"\bV100-SXM\d-32GB\b", 125, 32, float32=15.7),
    _gpu("v100-sxm", r"\bV100-SXM", 125, 16, float32=15.7),
    _gpu("v100", r"\bV100\b", 112, 16, float32=14),
    _gpu("t4", r"\bT4\b", 65, 16, float32=8.1),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, or None where we know none."""
    for chip in CHIPS:
        if re.search(chip.kind, device_kind):
            return chip if chip.bfloat16 else None
    return None


def chip_named(name: str) -> Chip | None:
    """Returns the chip that is sold under a name such as `v5e` or `h100`, or None."""
    return next((chip for chip in CHIPS if chip.name == name and chip.bfloat16), None)
