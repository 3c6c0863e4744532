"""The table of chips: complete where it has to be, and what devices get of a chip."""

import pytest

from jaxft.hardware.chips import CHIPS, Chip, Switch, Torus, chip_named, chip_of

NETWORKED = [chip for chip in CHIPS if chip.network]
# Not offered in several slices, nor with links to anything beside their own slice.
WITHOUT_DCN = ("v2", "v3")


def chip(name: str) -> Chip:
    found = chip_named(name)
    assert found is not None
    return found


def test_names_are_unique():
    names = [one.name for one in CHIPS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("one", NETWORKED, ids=lambda one: one.name)
def test_a_chip_that_can_be_planned_for_has_all_figures(one):
    assert isinstance(one.network, Torus if one.kind.startswith("^TPU") else Switch)
    assert one.network.link > 0 and one.bandwidth > 0 and one.host > 0
    assert (one.dcn > 0) != (one.name in WITHOUT_DCN)
    assert one.sources and all(len(source) > 8 for source in one.sources)
    assert 0.5 < one.product_share < 1
    # One byte takes as much as some hundred operations on all of them, and links are slower.
    assert 20 < one.bfloat16 / one.bandwidth < 1000
    assert one.host < one.bandwidth and one.network.link < one.bandwidth


@pytest.mark.parametrize("one", [one for one in NETWORKED if one.is_tpu], ids=lambda one: one.name)
def test_a_tpu_has_what_its_compiler_counts_in(one):
    assert one.lanes in (128, 256) and one.clock > 0.5e9
    # What a program can have is what is there, but for the firmware's part; of v5p Google's page
    # rounds down.
    assert 0.93 < one.usable / one.memory < (1.01 if one.name == "v5p" else 1)
    # The published peak is what its matrix units of lanes x lanes make in a cycle: two operations
    # for each place of a whole number of them.
    units = one.bfloat16 / one.clock / (2 * one.lanes**2)
    assert units / one.cores == pytest.approx(round(units / one.cores), rel=0.03)
    assert one.float32 == one.bfloat16
    assert any("usable: compiler" in source for source in one.sources)


@pytest.mark.parametrize(
    ("name", "published"),
    [("v4", 600), ("v5e", 400), ("v5p", 1200), ("v6e", 800), ("tpu7x", 1200)],
)
def test_a_link_is_a_tenth_less_than_its_part_of_what_google_names(name, published):
    """Google's pages add up the links of a chip and both of their directions, in GB/s."""
    network = chip(name).network
    assert isinstance(network, Torus)
    links = 2 * network.dimensions
    assert network.link == pytest.approx(0.9 * published * 1e9 / (2 * links))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v4 lite", "v4i"),
        ("TPU v4", "v4"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("Tesla V100-SXM2-16GB", "v100-sxm"),
        ("Tesla V100-PCIE-16GB", "v100"),
    ],
)
def test_a_device_kind_is_found_first_by_its_own_chip(kind, name):
    found = chip_of(kind)
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    "kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 3090 Ti", "TPU v5x", "cpu"]
)
def test_a_part_of_a_chip_or_another_one_is_none_of_them(kind):
    assert chip_of(kind) is None


def test_a_name_is_found_if_there_is_a_peak():
    assert chip("v5e").name == "v5e"
    assert chip_named("v5") is None and chip_named("MIG") is None and chip_named("V5E") is None


@pytest.mark.parametrize("name", ["v2", "v3", "tpu7x"])
def test_devices_of_a_chip_halve_what_they_share(name):
    whole, core = chip(name), chip(name).core
    assert (whole.cores, core.cores) == (2, 1)
    shared = "bfloat16 float32 int8 float8 bandwidth dcn host memory usable host_memory".split()
    for field in shared:
        assert 2 * getattr(core, field) == getattr(whole, field), field
    # Links are those of the chip; clock, lanes and shares of a peak are each device's.
    kept = "name kind network clock lanes product_share sources".split()
    for field in kept:
        assert getattr(core, field) == getattr(whole, field), field


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "h100"])
def test_a_chip_that_is_one_device_is_its_own_core(name):
    assert chip(name).core == chip(name)


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("v5e", "bfloat16", 197),
        ("v5e", "float16", 197),
        ("v5e", "float32", 197),
        ("v5e", "int8", 393),
        ("v5e", "float8_e4m3fn", 0),
        ("v6e", "float8_e5m2", 918),
        ("tpu7x", "float8_e4m3fn", 4614),
        ("tpu7x", "int8", 0),
        ("h100", "float8_e4m3fn", 1978.8),
        ("h100", "float32", 494.7),
        ("v5e", "float64", 0),
        # Fields that are no rates of products.
        ("v5e", "memory", 0),
        ("v5e", "name", 0),
    ],
)
def test_a_peak_is_that_of_a_type_and_0_where_there_is_none(name, dtype, teraflops):
    assert chip(name).peak(dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("shape", "wraps"),
    [
        ((16, 16), (True, True)),
        ((8, 16), (False, True)),
        ((8, 8), (False, False)),
        ((4, 4), (False, False)),
        ((1, 1), (False, False)),
    ],
)
def test_slices_in_two_dimensions_wrap_where_they_are_16_long(shape, wraps):
    assert Torus(dimensions=2, link=1).wraps(shape) == wraps


@pytest.mark.parametrize(
    ("shape", "wraps"),
    [
        ((4, 4, 4), True),
        ((4, 8, 12), True),
        ((16, 20, 28), True),
        ((2, 4, 4), False),
        ((2, 2, 1), False),
        ((4, 4, 6), False),
    ],
)
def test_slices_in_three_dimensions_wrap_if_all_are_multiples_of_four(shape, wraps):
    assert Torus(dimensions=3, link=1).wraps(shape) == (wraps,) * 3
