"""What collectives take and load: closed forms on small clusters, and laws that hold on all."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.costs import collectives
from planner.costs.collectives import ALL_REDUCE, HALF, Choice, over
from planner.costs.flows import Flow, together
from planner.costs.patterns import circles
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.values.blocks import WORTH_A_COLLECTIVE, blocks
from planner.values.cluster import AllReduce, Cluster, Device, Host, Link
from planner.values.cluster_file import read
from planner.values.profile import Profile, Value
from profiles import shipped
from tests.factory import SIZES, devices, profile


def hosts_of(hosts: int, each: int, *, latency_s: float = 0.0, nic: float = 10.0, rails: bool = False) -> Cluster:
    """Hosts of devices on links of 100 bytes/s to the host, with one NIC each or one for every device."""
    own = {f"h{h}": [f"d{h * each + i}" for i in range(each)] for h in range(hosts)}
    links = [((name, host), 100.0) for host, names in own.items() for name in names]
    links += [((end, "s"), nic) for host, names in own.items() for end in (names if rails else [host])]
    return Cluster(
        name="hosts",
        hosts=tuple(Host(name=host, cores=1, memory_bytes=1) for host in own),
        devices=tuple(Device(name=name, memory_bytes=1, host=host) for host, names in own.items() for name in names),
        switches=("s",),
        links=tuple(Link(between=b, latency_s=latency_s, bandwidth_bytes_per_s=v) for b, v in links),
    )


def names(cluster: Cluster) -> tuple[str, ...]:
    return tuple(device.name for device in cluster.devices)


def ways(cluster: Cluster, size: float, passes: int = ALL_REDUCE) -> dict[str, float]:
    return {way.name: way.seconds(size) for way in over(cluster, (names(cluster),), passes).collectives}


def loads(flows: tuple[Flow, ...]) -> dict[int, float]:
    found: dict[int, float] = {}
    for path, size in flows:
        for number in path:
            found[number] = found.get(number, 0.0) + size
    return found


# Closed forms.


def test_a_ring_inside_one_host() -> None:
    """2 (n - 1) rounds of bytes / n, and half of them to scatter or to gather (Patarasu and Yuan, 2009)."""
    cluster = devices(5, latency_s=1.0, bandwidth=100.0)
    assert ways(cluster, 500.0) == {"ring": pytest.approx(2 * 4 * (1.0 + 1.0))}
    assert collectives.half(cluster, names(cluster), 500.0) == pytest.approx(8.0)
    assert collectives.all_reduce(cluster, names(cluster)[:1], 500.0) == 0.0


@pytest.mark.parametrize(("hosts", "fullest"), [(2, 1.0), (3, 1.5), (4, 2.0), (8, 2.0)])
def test_a_tree_between_hosts(hosts: int, fullest: float) -> None:
    """Up and down two links' latency per level; the fullest NIC carries two halves, three, and from four hosts four."""
    cluster = hosts_of(hosts, 1, latency_s=1.0)
    found = ways(cluster, 500.0)
    assert found["tree"] == pytest.approx(2 * math.ceil(math.log2(hosts)) * 4.0 + fullest * 500.0 / 10.0)
    assert found["ring"] == pytest.approx(2 * (hosts - 1) * (4.0 + 500.0 / hosts / 10.0))


def test_a_ring_over_hosts_passes_each_nic_once() -> None:
    """4 hosts of 4: every NIC carries 2 x 15/16 of the bytes each way, however many devices are behind it."""
    assert ways(hosts_of(4, 4), 800.0)["ring"] == pytest.approx(2 * 15 / 16 * 800.0 / 10.0)


def test_a_nic_for_every_device() -> None:
    """4 hosts of 4 with 4 rails: four rings, each with a quarter of the bytes over a NIC of its own.

    Hierarchical: 3/4 of the bytes in each direction inside (100 bytes/s), then 2 x 3/4 of a quarter between hosts.
    """
    found = ways(hosts_of(4, 4, rails=True), 800.0)
    assert found["ring"] == pytest.approx(2 * 15 / 16 * 200.0 / 10.0)
    assert found["hierarchical"] == pytest.approx(2 * 3 / 4 * 800.0 / 100.0 + 2 * 3 / 4 * 200.0 / 10.0)


def test_several_nics_of_one_host() -> None:
    """Two NICs between a host and the switch: each carries half of what one would."""
    cluster = hosts_of(2, 2)
    second = tuple(link for link in cluster.links if "s" in link.between)
    twice = msgspec.structs.replace(cluster, links=(*cluster.links, *second))
    assert ways(cluster, 800.0)["ring"] == pytest.approx(2 * ways(twice, 800.0)["ring"])


def test_latency_is_that_of_the_hops() -> None:
    """Each chunk passes the hops of its ring one after the other: two latencies inside a host, four between two."""
    assert ways(hosts_of(2, 2, latency_s=1.0), 0.0)["ring"] == pytest.approx(2 * 3 * (2 + 4) / 2)


def test_groups_at_the_same_time_share_the_network() -> None:
    """Four tensor ranks reduce with their likes on another host over one NIC each way: four times as long as one."""
    cluster = hosts_of(2, 4)
    one, all_four = (
        over(cluster, groups, ALL_REDUCE).seconds(100.0)
        for groups in ((("d0", "d4"),), tuple((f"d{i}", f"d{i + 4}") for i in range(4)))
    )
    assert (one, all_four) == (pytest.approx(100.0 / 10.0), pytest.approx(4 * 100.0 / 10.0))


def test_messages_at_the_same_time_share_the_network() -> None:
    cluster = hosts_of(2, 4, latency_s=0.5)
    flows = [Flow(cluster.path(f"d{i}", f"d{i + 4}"), 100.0) for i in range(4)]
    assert together(cluster, flows[:1]) == cluster.transfer_seconds(flows[0].path, 100.0)
    assert together(cluster, flows) == pytest.approx(4 * 100.0 / 10.0)


@pytest.mark.parametrize(("count", "rings"), [(2, 1), (3, 2), (4, 4), (6, 2), (7, 4), (8, 6)])
def test_rings_of_a_cube_mesh(count: int, rings: int) -> None:
    """A DGX-1's GPUs have six NVLinks each: all eight make six rings, which are edge-disjoint."""
    cluster = read(shipped.clusters()["dgx1-v100"])
    found = circles(cluster, names(cluster)[:count])
    assert len(found) == rings
    on: dict[tuple[str, str], int] = {}
    for order in found:
        for pair in zip(order, (*order[1:], order[0]), strict=True):
            on[pair] = on.get(pair, 0) + 1
    for pair, number in on.items():
        (link,) = (cluster.link_of(n) for n in cluster.path(*pair))
        assert number * 22.4e9 <= link.bandwidth_bytes_per_s * (1 + 1e-9)


# Measured.


def measured(count: int, points: tuple[tuple[int, float], ...], on: int) -> Cluster:
    return msgspec.structs.replace(devices(count, bandwidth=1.0), all_reduces=(AllReduce(devices=on, points=points),))


def test_a_measured_all_reduce_is_of_so_many_devices() -> None:
    """Two devices were measured: of two it is the curve, half of it to gather; of three it follows from the links."""
    cluster = measured(3, ((100, 7.0), (200, 9.0)), on=2)
    assert collectives.all_reduce(cluster, ("d0", "d1"), 150.0) == 8.0
    assert collectives.half(cluster, ("d0", "d1"), 150.0) == 4.0
    assert collectives.all_reduce(cluster, ("d0", "d1", "d2"), 150.0) == pytest.approx(4 * 50.0)


def test_a_measured_all_reduce_is_inside_one_host() -> None:
    cluster = hosts_of(2, 1)
    curved = msgspec.structs.replace(cluster, all_reduces=(AllReduce(devices=2, points=((100, 7.0),)),))
    assert collectives.all_reduce(curved, ("d0", "d1"), 50.0) == collectives.all_reduce(cluster, ("d0", "d1"), 50.0)


def test_processes_of_one_host_are_alike() -> None:
    """Measured over two CPU processes; over four a ring has three times the rounds, of as many bytes each."""
    host = Host(name="h", cores=4, memory_bytes=4)
    curve = AllReduce(devices=2, points=((0, 1.0), (100, 3.0)))
    link = Link(between=("h", "h"), latency_s=0.0, bandwidth_bytes_per_s=1.0)
    cluster = Cluster(name="c", hosts=(host,), links=(link,), all_reduces=(curve,), elastic=True).take(4)
    assert collectives.all_reduce(cluster, names(cluster), 100.0) == pytest.approx(3 * 2.0)


def test_pairs_of_a_cube_mesh_differ() -> None:
    """Of a DGX-1, GPUs 0 and 1 were measured, with one NVLink between them; 0 and 3 have two, and no measurement."""
    cluster = read(shipped.clusters()["dgx1-v100"])
    pairs = {
        pair: over(cluster, (pair,), ALL_REDUCE).quickest(2.0**30) for pair in [("gpu0", "gpu1"), ("gpu0", "gpu3")]
    }
    assert [way.name for way in pairs.values()] == ["measured", "ring"]
    assert pairs["gpu0", "gpu3"].seconds(2.0**30) == pytest.approx(pairs["gpu0", "gpu1"].seconds(2.0**30) / 2, rel=0.02)


def test_the_slowest_of_groups_of_two_kinds() -> None:
    """Of two pairs of a DGX-1 one has one NVLink and was measured, the other has two and goes by its links."""
    cluster = read(shipped.clusters()["dgx1-v100"])
    pairs = (("gpu0", "gpu1"), ("gpu2", "gpu3"))
    single = [over(cluster, (pair,), ALL_REDUCE) for pair in pairs]
    both = over(cluster, pairs, ALL_REDUCE)
    for size in (2.0**10, 2.0**20, 2.0**30):
        assert both.seconds(size) == max(one.seconds(size) for one in single)
        assert both.flows(size) == tuple(flow for one in single for flow in one.flows(size))


# Laws.

CLUSTERS = st.builds(
    hosts_of,
    st.integers(1, 6),
    st.integers(1, 4),
    latency_s=st.sampled_from([0.0, 0.25]),
    nic=st.sampled_from([5.0, 10.0, 200.0]),
    rails=st.booleans(),
)


@given(CLUSTERS, st.sampled_from([ALL_REDUCE, HALF]), st.data())
def test_every_device_sends_and_receives_what_it_must(cluster: Cluster, passes: int, data: st.DataObject) -> None:
    """Out of, and into, every device at least (n - 1) / n of the bytes per pass, whatever the pattern.

    (A lower bound of any reduce-scatter and of any all-gather: Patarasu and Yuan, 2009, lemma 1.)
    """
    group = tuple(data.draw(st.permutations(names(cluster))))
    choice = Choice(cluster, (group,), passes)
    least = passes * (len(group) - 1) / len(group)
    for way in choice.collectives:
        hops = choice._hops(way.name)
        out = dict.fromkeys(group, 0.0)
        into = dict.fromkeys(group, 0.0)
        for path, share in hops:
            first, last = (cluster.link_of(path[at]).between for at in (0, -1))
            out[first[0]] += share
            into[last[0]] += share
        # A tree's root and leaves send less than the others, but all together no less.
        for sent in (out, into):
            assert sum(sent.values()) >= least * len(group) * (1 - 1e-9)
            if way.name != "tree":
                assert min(sent.values()) >= least * (1 - 1e-9)


@given(CLUSTERS, st.floats(1.0, 1e4))
def test_what_the_links_carry_takes_no_longer_than_the_collective(cluster: Cluster, size: float) -> None:
    choice = over(cluster, (names(cluster),), ALL_REDUCE)
    carried = loads(choice.flows(size))
    busiest = max((size / cluster.link_of(n).bandwidth_bytes_per_s for n, size in carried.items()), default=0.0)
    assert busiest <= choice.seconds(size) * (1 + 1e-9)


@given(st.integers(2, 6), st.integers(1, 4), st.sampled_from([ALL_REDUCE, HALF]), st.floats(0.0, 1e4))
def test_more_nics_are_never_slower(hosts: int, each: int, passes: int, size: float) -> None:
    one, rails = (hosts_of(hosts, each, rails=rails) for rails in (False, True))
    assert over(rails, (names(rails),), passes).seconds(size) <= over(one, (names(one),), passes).seconds(size) * (
        1 + 1e-9
    )


@given(st.integers(2, 12), st.sampled_from([ALL_REDUCE, HALF]), st.floats(0.0, 1e4))
def test_one_host_has_one_level(each: int, passes: int, size: float) -> None:
    """Devices on one host reduce around a ring, also where they have NICs."""
    cluster = hosts_of(1, each, latency_s=0.5)
    found = over(cluster, (names(cluster),), passes)
    assert [way.name for way in found.collectives] == ["ring"]
    assert found.seconds(size) == pytest.approx(passes * (each - 1) * (1.0 + size / each / 100.0))


@settings(max_examples=30)
@given(st.integers(5, 12), st.integers(1, 3), st.booleans(), st.sampled_from([ALL_REDUCE, HALF]), st.floats(0.0, 1e4))
def test_a_few_hosts_stand_for_all(hosts: int, each: int, rails: bool, passes: int, size: float) -> None:
    """Of many hosts that are alike four tell the seconds: the flows of all of them load no link more."""
    cluster = hosts_of(hosts, each, rails=rails)
    choice = over(cluster, (names(cluster),), passes)
    quickest = choice.quickest(size)
    full = choice._phases(quickest.name, [collectives._group(collectives.patterns.by_host(cluster, names(cluster)))])
    written_out = sum(collectives._timed(cluster, phase).seconds(size) for phase in full)
    assert written_out == pytest.approx(quickest.seconds(size))


@given(CLUSTERS, st.data())
def test_an_all_reduce_is_two_halves_around_a_ring(cluster: Cluster, data: st.DataObject) -> None:
    size = data.draw(st.floats(0.0, 1e4))
    assert ways(cluster, size).get("ring", 0.0) == pytest.approx(2 * ways(cluster, size, HALF).get("ring", 0.0))


@pytest.mark.parametrize(("strategy", "times"), [("data-parallel", 2), ("zero-1", 2), ("zero-2", 2), ("zero-3", 3)])
@pytest.mark.parametrize("n", [2, 4, 7])
def test_bytes_of_a_step(strategy: str, times: int, n: int) -> None:
    """Of all parameters, (n - 1) / n leave every device so many times (arXiv 1910.02054, section 7)."""
    costs, cluster = profile([1.0] * 3, bytes_=[WORTH_A_COLLECTIVE] * 3), devices(n)
    plan = get(strategy).spread(Question(costs, cluster, n, n, n))
    priced = costs_of(Placed(costs, plan, cluster), Linked(unroll(plan)))
    moved = sum(flow.bytes for kind in priced.transfer_kind if kind >= 0 for flow in priced.kinds[kind].flows)
    assert moved == pytest.approx(n * times * (n - 1) / n * 3 * WORTH_A_COLLECTIVE)


# Blocks.


def residual(count: int, bytes_: int) -> Profile:
    """Blocks of three layers with a skip around the last two."""
    chain = profile([1.0] * 3 * count, bytes_=[bytes_] * 3 * count)
    skips = tuple(
        Value(name=f"s{b}", source=3 * b, targets=(3 * b + 2,), bytes_at=tuple((n, n) for n in SIZES), gradient=True)
        for b in range(count)
    )
    return msgspec.structs.replace(chain, values=(*chain.values, *skips))


def test_residual_blocks() -> None:
    """The skip is inside; a cut between two layers that one value crosses ends a block."""
    assert blocks(residual(3, 100), range(9)) == (range(3), range(3, 6), range(6, 9))


def test_blocks_by_name() -> None:
    names = ["embed", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp", "head"]
    costs = profile([1.0] * 6, names=names, bytes_=[WORTH_A_COLLECTIVE] * 6)
    assert blocks(costs, range(6)) == (range(1), range(1, 3), range(3, 5), range(5, 6))
    assert blocks(costs, range(2, 4)) == (range(2, 3), range(3, 4))


def test_small_layers_are_gathered_together() -> None:
    costs = profile([1.0] * 5, bytes_=[WORTH_A_COLLECTIVE // 2, WORTH_A_COLLECTIVE, 0, WORTH_A_COLLECTIVE, 0])
    assert blocks(costs, range(5)) == (range(2), range(2, 5))
    assert blocks(profile([1.0] * 3, bytes_=[0, 0, 0]), range(3)) == (range(3),)


@given(
    st.lists(st.sampled_from([0, 10, WORTH_A_COLLECTIVE, 100 * WORTH_A_COLLECTIVE]), min_size=1, max_size=12), st.data()
)
def test_blocks_are_the_stage(bytes_: list[int], data: st.DataObject) -> None:
    """They cover the stage in order, and none is without parameters while another has some."""
    costs = profile([1.0] * len(bytes_), bytes_=bytes_)
    start = data.draw(st.integers(0, len(bytes_) - 1))
    layers = range(start, data.draw(st.integers(start + 1, len(bytes_))))
    found = blocks(costs, layers)
    assert [i for block in found for i in block] == list(layers)
    sizes = [sum(bytes_[i] for i in block) for block in found]
    assert len(found) == 1 or min(sizes) > 0


def test_residual_blocks_of_resnet50() -> None:
    """16 bottleneck blocks, the first with the stem, and the classifier (He et al., arXiv 1512.03385, table 1)."""
    resnet = shipped.read(shipped.profiles()["resnet50"])
    assert len(blocks(resnet, range(len(resnet.layers)))) == 17
