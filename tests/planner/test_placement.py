"""Which devices, in which order, and what stands side by side: against every choice there is."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.placement import partition
from planner.placement.devices import choose, levels
from planner.placement.ordering import ordered
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan
from tests.factory import profile


def written(speeds: list[list[float]], *, across: float = 1e15, inside: float = 1e15, memory: int = 10**9) -> Cluster:
    """Return hosts with devices of the given speeds, each host on one link to a switch."""
    hosts = [f"h{i}" for i in range(len(speeds))]
    return Cluster(
        name="written",
        hosts=tuple(Host(name=host, cores=8, memory_bytes=10**12) for host in hosts),
        devices=tuple(
            Device(name=f"{host}d{j}", memory_bytes=memory, host=host, speed=speed)
            for host, own in zip(hosts, speeds, strict=True)
            for j, speed in enumerate(own)
        ),
        switches=("switch",),
        links=tuple(
            link
            for host in hosts
            for link in (
                Link(between=(host, host), latency_s=0.0, bandwidth_bytes_per_s=inside),
                Link(between=(host, "switch"), latency_s=0.0, bandwidth_bytes_per_s=across),
            )
        ),
    )


@given(st.lists(st.lists(st.sampled_from([1.0, 2.0]), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_the_fastest_devices_on_the_fewest_hosts(speeds: list[list[float]], data: st.DataObject) -> None:
    cluster = written(speeds)
    count = data.draw(st.integers(1, len(cluster.devices)))

    def price(chosen: tuple[Device, ...]) -> tuple[list[float], int]:
        return sorted(-device.speed for device in chosen), len({device.host for device in chosen})

    best = min(price(chosen) for chosen in combinations(cluster.devices, count))
    found = choose(cluster, count)
    assert price(found)[0] == best[0]
    if len({device.speed for device in cluster.devices}) == 1:
        assert price(found)[1] == best[1]
    assert list(found) == sorted(found, key=cluster.devices.index)


def test_one_stage_takes_the_fastest_device() -> None:
    cluster = written([[1.0, 1.0], [1.0, 3.0]])
    plan = get("single").spread(Question(profile([1.0, 1.0]), cluster, 4, 2, 2))
    assert plan.device_names == ("h1d1",)
    assert simulate(profile([1.0, 1.0]), plan, cluster).step_s == pytest.approx(2 * 4 / 3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_the_order_of_unequal_devices_is_exact(weights: list[int], data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=len(weights)))
    kinds = sorted(kinds)
    sorts = sorted(set(kinds))
    speeds = {kind: data.draw(st.sampled_from([1.0, 2.0, 3.0])) for kind in sorts}
    rooms = {kind: data.draw(st.integers(2, 20)) for kind in sorts}
    table, stages = partition.spans([float(w) for w in weights]), len(kinds)

    def filled(stage: int, kind: int) -> partition.Table:
        return table * (stages - stage) / rooms[sorts[kind]]

    def best(order: tuple[int, ...]) -> float:
        found = partition.cut(lambda s: table / speeds[order[s]], stages, lambda s: filled(s, sorts.index(order[s])))
        if found is None:
            return float("inf")
        return max(float((table / speeds[order[s]])[r.start, r.stop]) for s, r in enumerate(found))

    least = min(best(order) for order in set(permutations(kinds)))
    found = ordered([table / speeds[kind] for kind in sorts], [kinds.count(kind) for kind in sorts], filled)
    assert (found is None) == (least == float("inf"))
    if found is not None:
        assert sorted(sorts[kind] for kind in found) == kinds
        assert best(tuple(sorts[kind] for kind in found)) == least


def test_a_pipeline_gives_its_longest_layer_to_its_fastest_device() -> None:
    cluster = written([[1.0, 1.0, 4.0]])
    plan = get("gpipe").spread(Question(profile([1.0, 8.0, 1.0]), cluster, 3, 3, 3))
    assert [stage.devices for stage in plan.stages] == [("h0d0",), ("h0d2",), ("h0d1",)]


def spread(cluster: Cluster, mapping: str, *, messages: int, weights: int, m: int = 16, k: int = 8) -> Plan:
    costs = profile([1.0] * 8, message_bytes=messages, bytes_=[weights] * 8)
    return get("1f1b").spread(Question(costs, cluster, k, m, m, replicas=4, mapping=mapping))  # type: ignore[arg-type]


def test_both_mappings() -> None:
    cluster = written([[1.0] * 4, [1.0] * 4])
    stages, pipelines = (spread(cluster, way, messages=1, weights=1) for way in ("stages", "pipelines"))
    assert stages.stages[0].devices == ("h0d0", "h0d1", "h0d2", "h0d3")
    assert pipelines.stages[0].devices == ("h0d0", "h0d2", "h1d0", "h1d2")
    assert stages.holders == ((0, 2, 4, 6), (1, 3, 5, 7))
    for replica in range(4):
        rows = [stages.groups[2 * replica + stage][0] for stage in range(2)]
        assert rows == [f"h0d{replica}", f"h1d{replica}"]


@pytest.mark.parametrize(("messages", "weights"), [(10, 10_000), (10_000, 10), (0, 1000), (1000, 0)])
def test_the_mapping_is_the_quicker_one(messages: int, weights: int) -> None:
    """Gradients stay in a host where they are what costs, activations where those are."""
    cluster = written([[1.0] * 4, [1.0] * 4], across=1e4, inside=1e6)
    costs = profile([1.0] * 8, message_bytes=messages, bytes_=[weights] * 8)
    steps = {
        mapping: simulate(costs, spread(cluster, mapping, messages=messages, weights=weights), cluster).step_s
        for mapping in ("stages", "pipelines", "")
    }
    assert steps[""] == min(steps.values())
    assert steps["stages"] != steps["pipelines"]


def test_rails_of_a_host() -> None:
    cluster = written([[1.0] * 4, [1.0] * 4], across=2.0, inside=8.0)
    between = levels(cluster, cluster.devices)
    assert (between.rails, between.inside_seconds(8.0), between.across_seconds(8.0)) == (1, 1.0, 4.0)


@pytest.mark.parametrize("speeds", [[1.0, 4.0, 1.0, 1.0], [4.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 4.0]])
def test_pipedreams_partition_heeds_unequal_devices(speeds: list[float]) -> None:
    """Eight layers of 2 s: five on the device four times as fast take 2.5 s, one on each of the others 2 s.

    In two equal halves, as the partition would cut for alike devices, each micro-batch takes 4 s.
    """
    costs, cluster = profile([1.0] * 8), written([speeds])
    plan = get("pipedream-replicated").spread(Question(costs, cluster, 4, 32, 32))
    assert sorted(len(stage.layers) for stage in plan.stages) == [1, 1, 1, 5]
    assert simulate(costs, plan, cluster).step_s == pytest.approx(32 * 2.5)


@given(
    st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=1, max_size=4),
    st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=4, max_size=6),
    st.sampled_from(["pipedream", "1f1b"]),
)
def test_pipedreams_partition_is_no_slower_than_without_replicas(
    speeds: list[float], forward: list[float], schedule: str
) -> None:
    costs, cluster, k = profile(forward), written([speeds]), len(speeds)
    question = Question(costs, cluster, k, 12, 12)
    plans = [get(name).spread(question) for name in (f"{schedule}-replicated", schedule)]
    found, straight = (simulate(costs, plan, cluster).step_s for plan in plans)
    assert len(set(speeds)) == 1 or found <= straight * (1 + 1e-9)
