"""Groups of devices that split tensors: as quick as the slowest, as roomy as the smallest, and all of them copy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.costs.placed import Placed
from planner.costs.prices import PriceList
from planner.orders.operations import PULL, PUSH
from planner.search.plan_bounds import plan_bound, plan_lack
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerTimes, Profile, Split
from tests.factory import devices, profile, timings

FREE = Split(forward=0, backward=0)
"""Layers that split without a word between the devices."""


def unequal(
    speeds: Sequence[float] = (), memories: Sequence[int] = (), threads: Sequence[int] = (), bandwidth: float = 0.0
) -> Cluster:
    """Devices on one host, with what is given of each."""
    count = max(len(speeds), len(memories), len(threads))
    plain = devices(count, host_bandwidth=bandwidth)
    given_: dict[str, Sequence[float]] = {"speed": speeds, "memory_bytes": memories, "threads": threads}
    own = tuple(
        msgspec.structs.replace(device, **{field: each[i] for field, each in given_.items() if each})
        for i, device in enumerate(plain.devices)
    )
    return msgspec.structs.replace(plain, devices=own)


def over(groups: int, *, layers: int = 2, m: int = 1, **fields: object) -> Plan:
    """One stage of all layers on so many replicas of two devices each."""
    names = tuple(f"layer{i}" for i in range(layers))
    stage = Stage(layers=names, devices=tuple(f"d{i}" for i in range(2 * groups)))
    plan = Plan(strategy="gpipe", schedule="gpipe", stages=(stage,), microbatches=m, batch=m, tensor=2)
    return msgspec.structs.replace(plan, **fields)


@pytest.mark.parametrize("speeds", [(1.0, 0.25), (0.25, 1.0)])
def test_a_group_goes_at_the_pace_of_its_slowest(speeds: tuple[float, float]) -> None:
    """Two layers of 4 + 8 seconds and an update of 1, in halves: 13 seconds, at a quarter of the speed 52."""
    costs = profile([4.0] * 2, [8.0] * 2, split=FREE, optimizer_s=1.0)
    cluster = unequal(speeds)
    assert simulate(costs, over(1), cluster).step_s == pytest.approx(52.0)
    assert evaluate(Placed(costs, over(1), cluster)).step_s == pytest.approx(52.0)
    assert 48.0 <= plan_bound(Placed(costs, over(1), cluster)) <= 52.0


def test_of_a_group_each_action_takes_as_long_as_on_its_slowest() -> None:
    """One device has few threads, the other is slow: the forward is longer on the one, the backward on the other."""
    costs = profile([0.0], split=FREE)
    once = costs.layers[0].times[0]

    def times(threads: int, forward: float, backward: float) -> LayerTimes:
        return msgspec.structs.replace(once, threads=threads, forward=timings(forward), backward=timings(backward))

    layer = msgspec.structs.replace(costs.layers[0], times=(times(1, 12.0, 8.0), times(4, 2.0, 6.0)))
    costs = msgspec.structs.replace(costs, layers=(layer,))
    cluster = unequal(speeds=(1.0, 0.5), threads=(1, 4))
    # (12, 8) / 2 on the first, (2, 6) / 2 / 0.5 on the second
    assert simulate(costs, over(1, layers=1), cluster).step_s == pytest.approx(6.0 + 6.0)
    alone = [simulate(costs, over(1, layers=1), unequal((s, s), threads=(n, n))).step_s for s, n in ((1, 1), (0.5, 4))]
    assert alone == pytest.approx([6.0 + 4.0, 2.0 + 6.0])


@pytest.mark.parametrize("speeds", [(0.5, 0.5), (2.0, 2.0), (2.0, 0.5)])
def test_wires_are_as_quick_between_slow_devices(speeds: tuple[float, float]) -> None:
    """Two layers of 12 / 2 seconds over the speed; each pass all-reduces 1000 bytes of two in 1000 / 1000 seconds."""
    costs = profile([4.0] * 2, [8.0] * 2, split=Split(forward=1, backward=1))
    own = msgspec.structs.replace(unequal(speeds), links=devices(2, bandwidth=1000.0).links)
    step = 2 * (12.0 / 2 / min(speeds) + 2 * 1.0)
    placed = Placed(costs, over(1), own)
    assert simulate(costs, over(1), own).step_s == pytest.approx(step)
    assert evaluate(placed).step_s == pytest.approx(step)
    assert plan_bound(placed) <= step * (1 + 1e-9)


def test_wires_are_as_quick_in_a_quick_stage_as_in_a_slow_one() -> None:
    """One stage at half, one at twice the speed: 12 / 2 seconds over each, two all-reduces of 1 second each."""
    costs = profile([4.0] * 2, [8.0] * 2, split=Split(forward=1, backward=1))
    own = msgspec.structs.replace(unequal((0.5, 0.5, 2.0, 2.0)), links=devices(4, bandwidth=1000.0).links)
    stages = tuple(Stage(layers=(f"layer{s}",), devices=(f"d{2 * s}", f"d{2 * s + 1}")) for s in range(2))
    plan = over(1, stages=stages)
    assert simulate(costs, plan, own).step_s == pytest.approx(12.0 + 2.0 + 3.0 + 2.0)
    assert plan_bound(Placed(costs, plan, own)) <= 19.0


@pytest.mark.parametrize("synchronisation", ["all-reduce", "zero-2"])
def test_any_device_may_be_the_smallest(synchronisation: str) -> None:
    """Whichever of two replicas' four devices is small: what the plan holds is compared with it."""
    costs = profile([1.0] * 2, split=FREE)
    plan = over(2, m=4, synchronisation=synchronisation)
    found = set()
    for small in range(4):
        placed = Placed(costs, plan, unequal(memories=[8000 if i == small else 10**6 for i in range(4)]))
        assert not placed.even
        need, _ = evaluate(placed).worst(placed)
        outcome = simulate(costs, plan, placed.cluster)
        assert need == max(own.total / room for own, room in zip(outcome.peak, outcome.capacity_bytes, strict=True))
        assert not outcome.fits
        assert plan_lack(placed) <= need
        found.add(need)
    assert len(found) == 1


def test_any_device_may_be_the_slow_one() -> None:
    """The replica that it is in makes the other wait, wherever in it it stands."""
    costs = profile([4.0] * 2, split=FREE)
    for slow in range(4):
        placed = Placed(costs, over(2, m=2), unequal([0.5 if i == slow else 1.0 for i in range(4)]))
        assert evaluate(placed).step_s == pytest.approx(16.0)
        assert simulate(costs, placed.plan, placed.cluster).step_s == pytest.approx(16.0)


def test_replicas_whose_second_devices_have_other_links_are_not_alike() -> None:
    costs = profile([4.0] * 2, split=FREE)
    cluster = unequal([1.0] * 4, bandwidth=100.0)
    slow = msgspec.structs.replace(cluster.links[-1], bandwidth_bytes_per_s=1.0)
    worse = msgspec.structs.replace(cluster, links=(*cluster.links[:-1], slow))
    plan = over(2, m=2, host_optimizer=True)
    assert Placed(costs, plan, cluster).even
    assert not Placed(costs, plan, worse).even


def test_all_devices_of_a_group_update_on_their_host() -> None:
    """Half of 1000 bytes each: gradients down and parameters up in 500 / 250 seconds, over links of their own.

    Reading and writing 2 x 500 + 500 + 2 x 1000 bytes each takes the memory's 100 bytes/s for 70 seconds, and its 1000
    bytes each way at a time 10.
    """
    costs = profile([0.0], split=FREE)
    cluster = unequal([1.0] * 2, bandwidth=250.0)
    host = Host(name="h", cores=2, memory_bytes=10**9, memory_bytes_per_s=100.0)
    slow = msgspec.structs.replace(cluster, hosts=(host,))
    plan = over(1, layers=1, host_optimizer=True)
    fast = msgspec.structs.replace(host, memory_bytes_per_s=1e15)
    quick = msgspec.structs.replace(cluster, hosts=(fast,))
    for own, step in ((quick, 2.0 + 2.0), (slow, 10.0 + 70.0 + 10.0)):
        placed = Placed(costs, plan, own)
        assert simulate(costs, plan, own).step_s == pytest.approx(step)
        assert evaluate(placed).step_s == pytest.approx(step)
        assert plan_bound(placed) <= step * (1 + 1e-9)
        assert evaluate(placed).host_bytes == {"h": 2 * (500.0 + 500.0 + 1000.0)}


def test_a_group_copies_over_its_slowest_link() -> None:
    """The second device's link is ten times slower: it has the group's update wait for 500 bytes each way."""
    costs = profile([0.0], split=FREE)
    cluster = unequal([1.0] * 2, bandwidth=250.0)
    slow = msgspec.structs.replace(cluster.links[-1], bandwidth_bytes_per_s=25.0)
    fast = Host(name="h", cores=2, memory_bytes=10**9, memory_bytes_per_s=1e15)
    cluster = msgspec.structs.replace(cluster, hosts=(fast,), links=(*cluster.links[:-1], slow))
    assert simulate(costs, over(1, layers=1, host_optimizer=True), cluster).step_s == pytest.approx(20.0 + 20.0)


def test_updates_on_unequal_hosts_take_as_long_as_each_host_needs() -> None:
    """Two replicas on hosts of their own, one with a slow memory: each row has its own price, and the step the last."""
    costs = profile([0.0])
    hosts = tuple(
        Host(name=f"h{i}", cores=1, memory_bytes=10**9, memory_bytes_per_s=rate) for i, rate in enumerate((1e15, 100.0))
    )
    cluster = Cluster(
        name="c",
        hosts=hosts,
        devices=tuple(Device(name=f"d{i}", host=f"h{i}", memory_bytes=10**9) for i in range(2)),
        links=(
            Link(between=("h0", "h1"), latency_s=0.0, bandwidth_bytes_per_s=1e15),
            *(Link(between=(f"d{i}", f"h{i}"), latency_s=0.0, bandwidth_bytes_per_s=1e15) for i in range(2)),
        ),
    )
    plan = over(1, layers=1, m=2, host_optimizer=True, tensor=1)
    # 1000 bytes of gradients down, 1000 of parameters up, 2 x 1000 + 1000 + 2 x 2000 read and written
    assert simulate(costs, plan, cluster).step_s == pytest.approx(10.0 + 70.0 + 10.0)


def test_servers_serve_all_devices_of_a_group() -> None:
    """Each of four workers in two groups pulls and pushes three shards, a quarter each of its half of 1000 bytes."""
    costs = profile([1.0], split=FREE, optimizer_s=1.0)
    servers = tuple(f"d{i}" for i in range(4))
    plan = over(2, layers=1, m=2, synchronisation="parameter-server", servers=servers)
    prices = PriceList(Placed(costs, plan, devices(4)))
    for op, row in itertools.product((PULL, PUSH), range(2)):
        flows = prices.transfer(op, 0, row, row).flows
        assert [flow.bytes for flow in flows] == [125.0] * 6
    # each server updates a quarter of the whole model
    assert prices.applying(0) == pytest.approx(0.25)


@given(
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    st.lists(st.sampled_from([20_000, 10**6]), min_size=4, max_size=4),
    st.sampled_from(["", "host_optimizer", "offload"]),
    st.sampled_from([1, 2]),
)
def test_bounds_of_unequal_groups_stay_below(speeds: list[float], memories: list[int], saving: str, depth: int) -> None:
    costs: Profile = profile([2.0, 3.0], [3.0, 5.0], split=Split(forward=1, backward=2), optimizer_s=1.0)
    cluster = unequal(speeds, memories, bandwidth=500.0)
    wires = devices(4, bandwidth=2000.0).links
    cluster = msgspec.structs.replace(cluster, links=(*wires, *cluster.links[1:]))
    replicas = 2 // depth
    own = (("layer0",), ("layer1",)) if depth == 2 else (("layer0", "layer1"),)
    names = [f"d{i}" for i in range(4)]
    stages = tuple(
        Stage(layers=layers, devices=tuple(names[2 * s : 2 * s + 2] if replicas == 1 else names))
        for s, layers in enumerate(own)
    )
    plan = Plan(strategy="gpipe", schedule="gpipe", stages=stages, microbatches=4, batch=4, tensor=2)
    plan = msgspec.structs.replace(plan, **({saving: True} if saving else {}))
    placed = Placed(costs, plan, cluster)
    found, simulated = evaluate(placed), simulate(costs, plan, cluster)
    assert plan_bound(placed) <= found.step_s * (1 + 1e-9)
    assert found.step_s <= simulated.step_s * (1 + 1e-9)
    assert plan_lack(placed) <= found.worst(placed)[0] * (1 + 1e-9)
    assert (found.worst(placed)[0] <= 1) == simulated.fits
