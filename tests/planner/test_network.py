"""Times of collectives against the closed forms of the scaling book, and against links counted.

https://jax-ml.github.io/scaling-book/sharding/: V bytes, n chips, W bytes a second over one link in
one direction.
"""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxft.compiled.collectives import Collective
from jaxft.hardware.chips import Switch, Torus, chip_named
from jaxft.planner.network import HOP_SECONDS, Network

# So much that nobody notices how long a message is under way.
V = 1 << 40


class Device:
    """What a network asks of a device."""

    def __init__(self, coords: tuple[int, ...], slice_index: int = 0):
        self.coords = coords
        self.slice_index = slice_index


def network(chip: str, shape: tuple[int, ...], slices: int = 1, cores: int = 1) -> Network:
    """Returns a torus whose devices are numbered with the last dimension first."""
    found = chip_named(chip)
    assert found is not None
    places = [
        Device((*place, 0, 0)[:3], number)
        for number in range(slices)
        for place in itertools.product(*map(range, shape))
        for _ in range(cores)
    ]
    devices = np.empty(len(places), object)
    devices[:] = places
    return Network(found, Mesh(devices, ("all",)), shape)


def collective(kind: str, groups, size: int = V, **fields) -> Collective:
    groups = tuple(tuple(map(int, group)) for group in groups)
    return Collective(
        kind=kind,
        axes=("all",),
        group_size=fields.pop("group_size", len(groups[0]) if groups else 1),
        count=1,
        arrays=(size,),
        groups=groups,
        **fields,
    )


def link(chip: str) -> float:
    found = chip_named(chip)
    assert found is not None and isinstance(found.network, Torus | Switch)
    return found.network.link


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


# Chip, slice, the dimensions along which groups lie, and links that carry a device's share.
GATHERED = [
    # A ring: both directions.
    ("v5e", (16, 16), (0,), 2),
    ("v5e", (16, 16), (1,), 2),
    ("v5p", (4, 4, 8), (2,), 2),
    # A line: its end has one link.
    ("v5e", (4, 8), (0,), 1),
    ("v5e", (4, 8), (1,), 1),
    ("v5p", (2, 2, 4), (2,), 1),
    # Wrapped along one dimension only.
    ("v5e", (8, 16), (0,), 1),
    ("v5e", (8, 16), (1,), 2),
    ("v5e", (8, 16), (0, 1), 3),
    # Several rings, and several lines, at once.
    ("v6e", (16, 16), (0, 1), 4),
    ("v6e", (4, 4), (0, 1), 2),
    ("v5p", (4, 4, 8), (0, 2), 4),
    ("v5p", (4, 4, 8), (0, 1, 2), 6),
    ("v4", (2, 2, 4), (0, 1, 2), 3),
]


def along(shape: tuple[int, ...], dimensions: tuple[int, ...]) -> np.ndarray:
    """Returns the groups of all devices that differ in some dimensions alone."""
    others = [i for i in range(len(shape)) if i not in dimensions]
    size = math.prod(shape[i] for i in dimensions)
    return numbers(shape).transpose(*others, *dimensions).reshape(-1, size)


@pytest.mark.parametrize(("chip", "shape", "dimensions", "links"), GATHERED)
@pytest.mark.parametrize(
    ("kind", "times"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)]
)
def test_a_torus_gathers_over_all_links_that_a_group_has(
    chip, shape, dimensions, links, kind, times
):
    groups = along(shape, dimensions)
    n = groups.shape[1]
    seconds = network(chip, shape).seconds(collective(kind, groups))
    assert seconds == pytest.approx(times * V * (n - 1) / n / (links * link(chip)), rel=1e-4)


def test_a_part_of_a_ring_is_a_line():
    groups = numbers((16, 16)).reshape(-1, 8)
    seconds = network("v5e", (16, 16)).seconds(collective("all-gather", groups))
    assert seconds == pytest.approx(V * 7 / 8 / link("v5e"), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "dimensions", "hops"),
    [((16, 16), (0,), 8), ((4, 8), (1,), 7), ((16, 16), (0, 1), 16), ((4, 8), (0, 1), 10)],
)
def test_of_little_data_the_hops_take_the_time(shape, dimensions, hops):
    """Half of a ring, or all of a line, is the way to the farthest chip."""
    tiny = collective("all-gather", along(shape, dimensions), 1)
    assert network("v5e", shape).seconds(tiny) == pytest.approx(hops * HOP_SECONDS, rel=1e-3)


def test_cores_of_a_chip_that_are_apart_share_its_links():
    both = network("tpu7x", (4, 4, 4), cores=2)
    whole, apart = np.arange(128).reshape(1, 128), np.arange(0, 128, 2).reshape(1, 64)
    of_all, of_half = (both.seconds(collective("all-gather", g)) for g in (whole, apart))
    assert of_half == pytest.approx(2 * of_all * (63 / 64) / (127 / 128), rel=1e-3)


def test_devices_of_one_chip_are_one_place():
    both = network("tpu7x", (4, 4, 4), cores=2)
    groups = np.arange(128).reshape(1, 128)
    seconds = both.seconds(collective("all-gather", groups))
    assert seconds == pytest.approx(V * 127 / 128 / (6 * link("tpu7x")), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "shift", "hops"),
    [
        ((16, 16), 1, 1),
        ((16, 16), 3, 3),
        # The other way round is nearer.
        ((16, 16), 15, 1),
        ((16, 16), 13, 3),
        ((16, 16), 8, 8),
    ],
)
def test_a_permute_takes_as_long_as_its_hops_on_a_ring(shape, shift, hops):
    pairs = [(i, 16 * (i // 16) + (i + shift) % 16) for i in range(256)]
    seconds = network("v5e", shape).seconds(collective("collective-permute", pairs))
    assert seconds == pytest.approx(hops * V / link("v5e"), rel=1e-4)


def test_a_permute_is_as_slow_as_its_busiest_link():
    net = network("v5e", (4, 8))
    for pairs, messages in (
        ([(0, 1)], 1),
        ([(0, 8 + 1)], 1),  # round a corner, on two links
        ([(0, 2), (1, 2)], 2),  # both pass from chip 1 to chip 2
        ([(0, 2), (2, 0)], 1),  # the two directions of a link do not share it
    ):
        seconds = net.seconds(collective("collective-permute", pairs))
        assert seconds == pytest.approx(messages * V / link("v5e"), rel=1e-4)


def test_a_ring_on_a_line_goes_back_the_way_it_came():
    """The message from the last chip to the first has each link's other direction to itself."""
    pairs = [(i, (i + 1) % 8) for i in range(8)]
    seconds = network("v5e", (4, 8)).seconds(collective("collective-permute", pairs))
    assert seconds == pytest.approx(V / link("v5e"), rel=1e-4)


def test_a_message_takes_its_time_for_each_hop():
    net = network("v5e", (4, 8))
    for pair, hops in (((0, 9), 2), ((0, 7), 7), ((0, 31), 10)):
        tiny = net.seconds(collective("collective-permute", [pair], 1))
        assert tiny == pytest.approx(hops * HOP_SECONDS, rel=1e-3)


def busiest(shape: tuple[int, ...], wraps: tuple[bool, ...]) -> float:
    """Sends one unit from each chip to each, along one dimension after the other.

    Returns the most that one link carries in one direction; of two ways of one length each has a
    half.
    """
    carried: dict[tuple, float] = collections.Counter()
    everywhere = list(itertools.product(*map(range, shape)))
    for source, target in itertools.product(everywhere, everywhere):
        at = list(source)
        for i, size in enumerate(shape):
            ahead = target[i] - at[i]
            ways = [(ahead, 1.0)]
            if wraps[i]:
                up, down = ahead % size, ahead % size - size
                near = min(up, -down)
                ways = [way for way in (up, down) if abs(way) == near]
                ways = [(way, 1 / len(ways)) for way in ways]
            for way, share in ways:
                step = 1 if way > 0 else -1
                for k in range(abs(way)):
                    place = [*at]
                    place[i] = (at[i] + step * k) % size
                    carried[i, step, *place] += share
            at[i] = target[i]
    return max(carried.values())


@pytest.mark.parametrize(
    ("chip", "shape", "dimensions"),
    [
        ("v5p", (4, 4, 8), (0,)),
        ("v5p", (4, 4, 8), (2,)),
        ("v5p", (4, 4, 8), (0, 2)),
        ("v5p", (4, 4, 8), (0, 1)),
        ("v5e", (16, 16), (0,)),
        ("v5e", (4, 4), (0,)),
        ("v5e", (2, 4), (0,)),
        ("v5e", (4, 8), (1,)),
        ("v5e", (4, 8), (0, 1)),
    ],
)
def test_an_all_to_all_takes_as_long_as_its_busiest_link(chip, shape, dimensions):
    groups = along(shape, dimensions)
    net = network(chip, shape)
    found = chip_named(chip)
    assert found is not None and isinstance(found.network, Torus)
    wraps = found.network.wraps(shape)
    size = groups.shape[1]
    sides = tuple(shape[i] for i in dimensions)
    load = busiest(sides, tuple(wraps[i] for i in dimensions)) * V / size
    seconds = net.seconds(collective("all-to-all", groups))
    assert seconds == pytest.approx(load / link(chip), rel=1e-4)


def test_each_core_of_a_chip_sends_its_part_of_an_all_to_all():
    one, two = (network("tpu7x", (4, 4, 4), cores=cores) for cores in (1, 2))
    exchanged = one.seconds(collective("all-to-all", [range(64)]))
    # A chip has as much for each other chip, from each of its cores.
    assert two.seconds(collective("all-to-all", [range(128)])) == pytest.approx(exchanged, rel=1e-4)


def test_an_all_to_all_of_a_large_ring_is_a_quarter_of_an_all_gather():
    """The scaling book's: V is what all devices of the ring have together."""
    net, groups = network("v5e", (16, 16)), along((16, 16), (0,))
    gathered = net.seconds(collective("all-gather", groups))
    exchanged = net.seconds(collective("all-to-all", groups, V // 16))
    assert exchanged / gathered == pytest.approx(16 / 15 / 4, rel=1e-4)


@pytest.mark.parametrize(("kind", "times"), [("all-gather", 1), ("all-reduce", 2)])
def test_between_slices_each_chip_has_its_share_of_the_data_centres_network(kind, times):
    net = network("v5e", (4, 4), slices=4)
    one = collective(kind, [], group_size=4, across_slices=True)
    seconds = net.seconds(one)
    assert seconds == pytest.approx(times * V * 3 / 4 / 3.125e9, rel=1e-4)


def test_devices_of_one_chip_share_the_way_to_other_slices():
    one = collective("all-reduce", [], group_size=2, across_slices=True)
    whole = network("v6e", (4, 4), slices=2).seconds(one)
    shared = network("tpu7x", (4, 4, 4), slices=2, cores=2).seconds(one)
    # Both chips have 100 Gbit/s.
    assert shared == pytest.approx(2 * whole, rel=1e-4)


def gpus(chip: str, count: int) -> Network:
    found = chip_named(chip)
    assert found is not None
    devices = np.empty(count, object)
    devices[:] = [Device(()) for _ in range(count)]
    return Network(found, Mesh(devices, ("all",)))


@pytest.mark.parametrize(("chip", "domain"), [("h100", 8), ("b200", 8), ("gb200", 72)])
def test_gpus_of_one_domain_exchange_over_nvlink(chip, domain):
    groups = np.arange(2 * domain).reshape(2, domain)
    seconds = gpus(chip, 2 * domain).seconds(collective("all-gather", groups))
    assert seconds == pytest.approx(V * (domain - 1) / domain / link(chip), rel=1e-4)


def test_one_gpu_of_each_domain_exchange_over_infiniband():
    groups = np.arange(64).reshape(8, 8).T
    for kind, times in (("all-gather", 1), ("all-reduce", 2)):
        seconds = gpus("h100", 64).seconds(collective(kind, groups))
        assert seconds == pytest.approx(times * V * 7 / 8 / 50e9, rel=1e-4)


def test_gpus_of_several_whole_domains_are_bound_by_what_enters_one():
    """Of V each domain has an eighth, and the others come in by the eight ways of its GPUs."""
    seconds = gpus("h100", 64).seconds(collective("all-gather", [range(64)]))
    assert V * 7 / 8 / (8 * 50e9) < seconds < V / (8 * 50e9)


def test_nvlink_binds_where_it_is_slower_than_all_ways_out():
    """Of a GB200's domain of 72 each GPU receives less from outside than over its own links."""
    seconds = gpus("gb200", 144).seconds(collective("all-gather", [range(144)]))
    assert seconds == pytest.approx(V * 143 / 144 / 900e9, rel=1e-4)


def test_a_permute_of_gpus_is_as_slow_as_the_pair_that_leaves_its_domain():
    ring = [(i, (i + 1) % 16) for i in range(16)]
    seconds = gpus("h100", 16).seconds(collective("collective-permute", ring))
    assert seconds == pytest.approx(V / 50e9, rel=1e-4)
    inside = [(i, 8 * (i // 8) + (i + 1) % 8) for i in range(16)]
    seconds = gpus("h100", 16).seconds(collective("collective-permute", inside))
    assert seconds == pytest.approx(V / 450e9, rel=1e-4)


def test_a_group_that_is_named_over_slices_sends_what_its_slice_has():
    """Each of 16 devices of a slice sends a 16th of the payload; within the slice it is a sum."""
    net = network("v5e", (4, 4), slices=2)
    group = np.arange(32).reshape(1, 32)
    one = dataclasses.replace(collective("all-reduce", group), across_slices=True)
    inside = dataclasses.replace(
        one, across_slices=False, groups=(tuple(range(16)),), group_size=16
    )
    between = 2 * V * 31 / 32 / 16 / net.chip.dcn
    assert net.seconds(one) == pytest.approx(between + net.seconds(inside), rel=1e-6)


@pytest.mark.parametrize("kind", ["all-to-all", "ragged-all-to-all"])
def test_gpus_send_those_elsewhere_what_is_theirs_each_by_its_own_way(kind):
    def seconds(chip: str, count: int, groups: list) -> float:
        return gpus(chip, count).seconds(collective(kind, groups))

    assert seconds("h100", 16, [range(8), range(8, 16)]) == pytest.approx(V * 7 / 8 / 450e9)
    # Half of what each has is for the other domain.
    assert seconds("h100", 16, [range(16)]) == pytest.approx(V / 2 / 50e9)
    assert seconds("h100", 16, [(0, 1, 8, 9), (2, 3, 4, 10)]) == pytest.approx(V / 2 / 50e9)
    # Of 73 one is elsewhere: the links inside have more to do.
    assert seconds("gb200", 144, [range(73)]) == pytest.approx(V * 72 / 73 / 900e9)


def test_the_group_with_the_fewest_ways_out_is_waited_for():
    groups = [(0, 1, 8, 9), (2, 3, 4, 10)]
    seconds = gpus("h100", 16).seconds(collective("all-gather", groups))
    assert seconds == pytest.approx(V * 3 / 4 / (2 * 50e9))


@pytest.mark.parametrize("kind", ["all-gather", "all-to-all"])
@pytest.mark.parametrize("count", [8, 16])
def test_a_small_message_of_gpus_takes_the_time_of_one(kind, count):
    tiny = collective(kind, [range(count)], 1)
    assert gpus("h100", 16).seconds(tiny) == pytest.approx(HOP_SECONDS, rel=1e-3)


def test_where_no_network_is_known_exchanges_take_no_time():
    one = gpus("h100", 16)
    one = dataclasses.replace(one, chip=dataclasses.replace(one.chip, network=None))
    assert one.seconds(collective("all-gather", [range(16)])) == 0


@pytest.mark.parametrize(
    ("groups", "size", "leaves"),
    [
        ([range(8), range(8, 16)], 8, False),
        ([range(16)], 16, True),
        ([(0, 1), (7, 8)], 2, True),  # one of them does
        ([], 8, False),
        ([], 9, True),
    ],
)
def test_what_leaves_a_domain_goes_over_the_slow_network(groups, size, leaves):
    one = collective("all-gather", groups, group_size=size)
    assert gpus("h100", 16).leaves(one) is leaves
    assert not network("v5e", (4, 4)).leaves(one)
    between = dataclasses.replace(one, across_slices=True)
    assert network("v5e", (4, 4), slices=2).leaves(between)
    assert gpus("h100", 16).leaves(between)


def test_two_chips_of_each_slice_sum_what_they_have_first():
    net = network("v5e", (4, 4), slices=2)
    one = dataclasses.replace(collective("all-reduce", [(0, 1, 16, 17)]), across_slices=True)
    inside = net.seconds(collective("all-reduce", [(0, 1)]))
    assert net.seconds(one) == pytest.approx(2 * V * 3 / 4 / 2 / net.chip.dcn + inside)
