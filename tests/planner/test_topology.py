"""Names of slices and clusters: what is sold, and what is said of what is not."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies

from jaxft.errors import ConfigError
from jaxft.hardware.chips import chip_named
from jaxft.planner import topology
from jaxft.planner.topology import Topology, next_larger, parse, sizes_sold, sold_shape


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(name)
    [problem] = caught.value.problems
    assert repr(name) in problem
    return problem


@pytest.mark.parametrize(
    ("name", "chip", "shape", "slices", "chips"),
    [
        ("v5e:4x4", "v5e", (4, 4), 1, 16),
        ("v5e:16", "v5e", (4, 4), 1, 16),
        ("v5e:1x1", "v5e", (1, 1), 1, 1),
        ("v5litepod-256", "v5e", (16, 16), 1, 256),
        ("2xv5e:16x16", "v5e", (16, 16), 2, 512),
        ("4xv5p-64", "v5p", (2, 4, 4), 4, 128),
        ("v5p-64", "v5p", (2, 4, 4), 1, 32),
        ("v5p:64", "v5p", (4, 4, 4), 1, 64),
        ("v5p:2x2x6", "v5p", (2, 2, 6), 1, 24),
        ("v6e-8", "v6e", (2, 4), 1, 8),
        ("V6E-8", "v6e", (2, 4), 1, 8),
        ("v4-8", "v4", (2, 2, 1), 1, 4),
        ("v3-8", "v3", (2, 2), 1, 4),
        ("v2-512", "v2", (16, 16), 1, 256),
        ("tpu7x-128", "tpu7x", (4, 4, 4), 1, 64),
        ("v7x-8", "tpu7x", (2, 2, 1), 1, 4),
        ("ironwood:4x4x8", "tpu7x", (4, 4, 8), 1, 128),
    ],
)
def test_a_tpu_is_named_by_layout_or_by_count(name, chip, shape, slices, chips):
    found = parse(name)
    assert (found.name, found.chip.name, found.local) == (name, chip, False)
    assert (found.shape, found.slices, found.chips) == (shape, slices, chips)


@pytest.mark.parametrize(
    ("name", "chip", "chips"),
    [
        ("h100:64", "h100", 64),
        ("h100-8", "h100", 8),
        ("a100-40:8", "a100-40", 8),
        ("a100:8", "a100", 8),
        ("gb200:72", "gb200", 72),
        ("H200:8", "h200", 8),
    ],
)
def test_gpus_are_counted(name, chip, chips):
    found = parse(name)
    assert (found.chip.name, found.chips, found.device_count) == (chip, chips, chips)
    assert (found.slices, found.sold_as, found.can_compile) == (1, "", False)


# Google's pages of v4 and v5p; N of v5p-N counts cores.
SOLD = [
    (8, (2, 2, 1)),
    (16, (2, 2, 2)),
    (32, (2, 2, 4)),
    (64, (2, 4, 4)),
    (128, (4, 4, 4)),
    (256, (4, 4, 8)),
    (384, (4, 4, 12)),
    (512, (4, 8, 8)),
    (768, (4, 8, 12)),
    (1024, (8, 8, 8)),
    (1152, (4, 12, 12)),
    (1536, (8, 8, 12)),
    (2048, (8, 8, 16)),
    (3456, (12, 12, 12)),
    (4096, (8, 16, 16)),
    (6912, (12, 12, 24)),
    (7680, (12, 16, 20)),
    (12288, (16, 16, 24)),
    (17920, (16, 20, 28)),
]


@pytest.mark.parametrize(("cores", "shape"), SOLD)
def test_slices_of_v5p_have_the_layouts_that_are_sold(cores, shape):
    found = parse(f"v5p-{cores}")
    assert found.shape == shape
    assert (found.chips, found.device_count) == (cores // 2, cores // 2)
    assert found.sold_as == f"v5p-{cores}"


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        (1, (1, 1)),
        (4, (2, 2)),
        (8, (2, 4)),
        (16, (4, 4)),
        (32, (4, 8)),
        (64, (8, 8)),
        (128, (8, 16)),
        (256, (16, 16)),
    ],
)
def test_slices_of_v5e_and_v6e_have_the_layouts_that_are_sold(count, shape):
    for chip in ("v5e", "v6e"):
        found = parse(f"{chip}-{count}")
        assert (found.shape, found.chips, found.sold_as) == (shape, count, f"{chip}-{count}")


@pytest.mark.parametrize(
    ("chip", "smallest", "largest"),
    [
        ("v2", 4, 256),
        ("v3", 4, 1024),
        ("v4", 4, 4096),
        ("v5e", 1, 256),
        ("v5p", 4, 8960),
        ("v6e", 1, 256),
        ("tpu7x", 4, 9216),
    ],
)
def test_sizes_go_up_to_the_largest_slice_and_each_has_its_layout(chip, smallest, largest):
    found = chip_named(chip)
    assert found is not None
    sizes = sizes_sold(found)
    assert (sizes[0], sizes[-1]) == (smallest, largest) and sizes == sorted(set(sizes))
    for size in sizes:
        shape = sold_shape(found, size)
        assert shape is not None
        assert Topology("", found, shape).chips == size and list(shape[:2]) == sorted(shape[:2])
    assert sold_shape(found, largest + 64) is None


@pytest.mark.parametrize(
    ("name", "devices", "sold_as"),
    [
        # A v4 or v5p is one device with both cores, the others are a device for each core.
        ("v4-8", 4, "v4-8"),
        ("v3-8", 8, "v3-8"),
        ("tpu7x-128", 128, "tpu7x-128"),
        ("2xtpu7x-128", 256, "tpu7x-128"),
        ("v5e:16", 16, "v5e-16"),
        ("v5e:2x8", 16, ""),
        ("v5p:8x4x4", 128, ""),
    ],
)
def test_devices_of_jax_and_the_name_it_is_sold_under(name, devices, sold_as):
    found = parse(name)
    assert (found.device_count, found.sold_as, found.can_compile) == (devices, sold_as, True)


def test_local_is_what_this_machine_has():
    found = parse("local")
    assert (found.local, found.chip.name, found.chip.bfloat16) == (True, "cpu", 0)
    assert (found.shape, found.slices, found.device_count) == ((8,), 1, 8)
    assert found.can_compile and list(found.devices()) == jax.devices()


def test_local_tpus_are_laid_out_by_their_coordinates(monkeypatch):
    devices = [
        SimpleNamespace(device_kind="TPU v5 lite", coords=(x, y, 0), slice_index=number)
        for number in range(2)
        for y in range(4)
        for x in range(2)
    ]
    monkeypatch.setattr(topology.jax, "devices", lambda: devices)
    found = parse("local")
    assert (found.chip.name, found.shape, found.slices) == ("v5e", (2, 4), 2)
    assert found.device_count == len(devices)


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:4y4", ":4x4", "4x4", "v5p 64", "-8", "v5e:-4"]
)
def test_what_is_no_name_comes_with_examples(name):
    problem = refused(name)
    for example in ("v5e:4x4", "v5p-64", "2xv5e:16x16", "h100:64", "local"):
        assert example in problem


@pytest.mark.parametrize(
    ("name", "nearest"), [("v6:4x4", "v6e"), ("tpu7-8", "tpu7x"), ("h1000:8", "h100")]
)
def test_an_unknown_chip_offers_the_nearest(name, nearest):
    problem = refused(name)
    assert f"Did you mean {nearest!r}?" in problem
    assert "known are v2, v3, v4, v5e, v5p, v6e, tpu7x, gb200" in problem


@pytest.mark.parametrize("name", ["t4:4", "v4i:4", "MIG:1"])
def test_a_chip_whose_links_are_not_known_is_refused(name):
    problem = refused(name)
    asked = name.split(":")[0]
    assert f"no links of {asked!r}" in problem or f"no chip {asked!r}" in problem
    assert asked not in problem.split("known are")[1].split()


@pytest.mark.parametrize(
    ("name", "what", "nearest", "layout"),
    [
        ("v5e-12", "12 chips", "v5e-8, v5e-16, v5e-32", "v5e:AxB"),
        ("v6e:512", "512 chips", "v6e:64, v6e:128, v6e:256", "v6e:AxB"),
        ("v5p-100", "100 cores, two a chip", "v5p-64, v5p-128, v5p-256", "v5p:AxBxC"),
        # One half of a chip.
        ("v5p-9", "9 cores, two a chip", "v5p-8, v5p-16, v5p-32", "v5p:AxBxC"),
        ("v5p:50", "50 chips", "v5p:32, v5p:64, v5p:128", "v5p:AxBxC"),
        ("v3-4", "4 cores, two a chip", "v3-8, v3-32, v3-64", "v3:AxB"),
        ("tpu7x-0", "0 cores, two a chip", "tpu7x-8, tpu7x-16, tpu7x-32", "tpu7x:AxBxC"),
    ],
)
def test_an_unknown_size_lists_the_nearest(name, what, nearest, layout):
    problem = refused(name)
    assert f"has no slice of {what}." in problem
    assert f"The nearest are {nearest};" in problem
    assert f"given as {layout}." in problem


@pytest.mark.parametrize(
    ("name", "dimensions", "example"),
    [
        ("v5e:4x4x4", 2, "v5e:4x4"),
        ("v5p:4x4", 3, "v5p:4x4x4"),
        ("tpu7x:2x2x1x1", 3, "tpu7x:4x4x4"),
    ],
)
def test_a_wrong_number_of_dimensions_is_named(name, dimensions, example):
    problem = refused(name)
    assert f"have {dimensions} dimensions, such as {example}." in problem


def test_sizes_are_one_at_least_and_no_more_than_a_pod():
    assert "1 or more" in refused("v5e:0x4")
    assert "1024 chips; a slice of v5e has 256 at most" in refused("v5e:32x32")


@pytest.mark.parametrize("name", ["v5e:3x4", "v5e:1x4", "v5p:4x5x4"])
def test_a_layout_that_hosts_do_not_fill_is_refused(name):
    assert "a host has 2 x 2 chips" in refused(name)


@pytest.mark.parametrize("name", ["h100:8x8", "h100:0", "2xh100:8"])
def test_gpus_have_no_layout(name):
    assert "GPUs are counted, those of all machines together, such as h100:8" in refused(name)


@pytest.mark.parametrize("name", ["v5e:4xx4", "2xv5e:4x4x", "v5e:", "v5e:x4", "h100"])
def test_what_is_no_name_of_a_slice_is_refused(name):
    assert "expected a slice such as v5e:4x4" in refused(name)


def test_chips_with_a_hyphen_are_known_or_not_as_others_are():
    assert "no links of 'rtx-4090' are known" in refused("rtx-4090:8")
    assert "Did you mean 'a100-40'?" in refused("a100-80:8")
    assert "Did you mean 'v6e'?" in refused("v9e:4x4")


@pytest.mark.parametrize("name", ["h100:9999999", "999999xv5e:4x4", "300xv5e:4x4"])
def test_more_than_any_cluster_is_refused(name):
    assert "at most" in refused(name)


def test_slices_are_joined_only_where_they_can_be():
    assert "one slice of v5e or more" in refused("0xv5e:4x4")
    assert "slices of v3 cannot be joined" in refused("2xv3:4x4")
    assert parse("1xv3:4x4").slices == 1


@pytest.mark.parametrize(
    ("name", "larger", "chips"),
    [
        ("v5e:4x4", "v5e:4x8", 32),
        ("h100:8", "h100:16", 16),
        ("v5e:2x6", "v5e:4x8", 32),
        ("v5e-1", "v5e:2x2", 4),
        ("v5p-64", "v5p:4x4x4", 64),
        ("v5p-384", "v5p:8x8x8", 512),
        ("2xv5e:8x8", "2xv5e:8x16", 256),
    ],
)
def test_the_next_larger_slice_is_twice_as_large_or_more(name, larger, chips):
    found = next_larger(parse(name))
    assert found is not None
    assert (found.name, found.chips) == (larger, chips)
    assert parse(found.name) == found


@pytest.mark.parametrize("name", ["v5e:16x16", "v5p-17920", "h100:8192", "local"])
def test_there_is_none_larger_than_the_largest_nor_of_what_is_here(name):
    assert next_larger(parse(name)) is None


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that records what it is asked for, at a path; libtpu is not installed."""
    asked = []
    found = importlib.util.find_spec

    def answer(platform, topology_name, **options):
        asked.append((platform, topology_name, options))
        return SimpleNamespace(devices=[object()])

    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else found(name, *a)
    )
    monkeypatch.setattr(topologies, "get_topology_desc", answer)
    topology._tpu_devices.cache_clear()
    yield asked
    topology._tpu_devices.cache_clear()


@pytest.mark.parametrize(
    ("name", "asked_for", "wrap", "options"),
    [
        ("v5e:4x4", "v5e:4x4", (False, False, False), {}),
        ("v5e:16x16", "v5e:16x16", (True, True, False), {}),
        ("2xv5e:8x16", "v5e:8x16", (False, True, False), {"num_slices": 2}),
        ("v5p-128", "v5p:4x4x4", (True, True, True), {}),
        ("v4-8", "v4:2x2x1", (False, False, False), {"chip_config_name": "megacore"}),
    ],
)
def test_devices_are_asked_for_with_the_links_they_have(compiler, name, asked_for, wrap, options):
    devices = parse(name).devices()
    assert parse(name).devices() is devices  # asked for once
    expected = {"chips_per_host_bounds": (2, 2, 1), "wrap": wrap, **options}
    assert compiler == [("tpu", asked_for, expected)]


def test_one_chip_has_a_host_of_its_own(compiler):
    parse("v5e:1x1").devices()
    assert compiler[0][2]["chips_per_host_bounds"] == (1, 1, 1)


def test_without_libtpu_it_says_what_to_install(monkeypatch, compiler):
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    with pytest.raises(ConfigError, match=r"pip install 'jax\[tpu\]', or set TPU_LIBRARY_PATH"):
        parse("v5e:4x4").devices()
    assert not compiler


def test_libtpu_that_is_installed_is_enough(monkeypatch, compiler):
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    assert len(parse("v5e:4x4").devices()) == 1


def test_gpus_are_only_estimated():
    with pytest.raises(ConfigError, match=r"no compiler for h100:8 here, only an estimate"):
        parse("h100:8").devices()


@pytest.mark.parametrize(
    ("holder", "who"), [(4321, "process 4321"), (0, "another process"), (None, "another process")]
)
def test_who_keeps_the_lock_of_libtpu_is_named(monkeypatch, compiler, holder, who):
    def locked(**options):
        raise RuntimeError("ABORTED: The TPU is already in use; remove /tmp/libtpu_lockfile")

    monkeypatch.setattr(topologies, "get_topology_desc", locked)
    monkeypatch.setattr(topology, "lock_holder", lambda path: holder)
    with pytest.raises(ConfigError) as caught:
        parse("v5e:4x4").devices()
    assert f"libtpu cannot be used: {who} keeps its lock /tmp/libtpu_lockfile" in str(caught.value)
    assert "ALLOW_MULTIPLE_LIBTPU_LOAD=1" in str(caught.value)


def test_what_the_compiler_says_of_a_layout_is_passed_on(monkeypatch, compiler):
    def unknown(**options):
        raise ValueError("INVALID_ARGUMENT: no such thing\n  at a long list of places")

    monkeypatch.setattr(topologies, "get_topology_desc", unknown)
    with pytest.raises(ConfigError) as caught:
        parse("v5e:2x6").devices()
    assert str(caught.value) == (
        "libtpu gives no devices for v5e:2x6: INVALID_ARGUMENT: no such thing"
    )
