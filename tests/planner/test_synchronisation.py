"""How replicas agree, to the last digit on cases that can be counted by hand: seconds, bytes and staleness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.basis.errors import USAGE, PlanError
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.prices import PriceList
from planner.orders import schedules, synchronisation
from planner.orders.action import Action, Row, parse
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.placement.tables import byte_spans
from planner.programs.lowering import lower, unroll
from planner.programs.program import Program
from planner.programs.proof import prove
from planner.programs.waits import Linked
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.simulate.staleness import staleness
from planner.values.blocks import WORTH_A_COLLECTIVE
from planner.values.cluster import Cluster
from planner.values.hardware import Device, Host, Link
from planner.values.plan import Plan, Stage, windows
from planner.values.profile import Profile, Split, Value
from planner.values.trace import KINDS
from tests.factory import SIZES, devices, pipeline, profile, shared_cores


def spread(strategy: str, costs: Profile, k: int, m: int, *, batch: int | None = None, **question: Any) -> Plan:
    return get(strategy).spread(Question(costs, devices(k), k, m, batch or m, **question))


def joined(one: str, other: str, bandwidth: float, *, shared: bool = True) -> Link:
    return Link(between=(one, other), latency_s=0.0, bandwidth_bytes_per_s=bandwidth, shared=shared)


def hosts(sizes: list[tuple[str, int]], *, nic: float, inside: float, shared: bool = True, at: str = "host") -> Cluster:
    """Hosts at one switch, of so many devices each; their own link to the switch is the device's, host's or NIC's."""
    ends = {"device": "{}0", "host": "{}", "nic": "nic-{}"}
    links = [joined(ends[at].format(name), "switch", nic, shared=shared) for name, _ in sizes]
    names = [(name, f"{name}{i}") for name, count in sizes for i in range(count)]
    links += [joined(device, name, inside) for name, device in names if inside]
    links += [joined(name, f"nic-{name}", 1e15) for name, _ in sizes if at == "nic"]
    return Cluster(
        name="hosts",
        hosts=tuple(Host(name=name, cores=count, memory_bytes=10**13) for name, count in sizes),
        devices=tuple(Device(name=device, host=name, memory_bytes=10**12) for name, device in names),
        switches=("switch", *(f"nic-{name}" for name, _ in sizes if at == "nic")),
        links=tuple(links),
    )


def static(costs: Profile, plan: Plan, row: int = 0) -> dict[str, float]:
    """Bytes by kind on a device before the first action."""
    placed = Placed(costs, plan, devices(len(plan.device_names)))
    return dict(zip(KINDS, MemoryModel(placed, Linked(unroll(plan))).static[row].tolist(), strict=True))


# Gradients that are reduced.


@pytest.mark.parametrize(("k", "latency"), [(1, 0.0), (2, 0.0), (2, 1.0), (4, 0.0), (4, 3.0), (5, 3.0)])
def test_a_data_parallel_step(k: int, latency: float) -> None:
    """Forwards and backwards of a replica's share, then one all-reduce of 1000 bytes."""
    cluster = devices(k, latency_s=latency, bandwidth=1000.0)
    costs = profile([1.0], [2.0])
    ring = 2 * (k - 1) * (latency + 1.0 / k)
    step = simulate(costs, spread("data-parallel", costs, k, 3 * k), cluster).step_s
    assert step == pytest.approx(3 * (1.0 + 2.0) + ring)


@pytest.mark.parametrize(
    ("bucket_bytes", "seconds", "left"),
    [
        (0, 0.5, 1.5),  # all at once, behind the backward
        (1000, 0.5, 0.5),  # the first layer's is left: the others hide behind the backwards of the layers before them
        (1001, 0.5, 0.5),  # the last two layers' together
        (2001, 0.5, 1.5),  # all three in one bucket
        (1000, 10.0, 3 + 30.0 - 9.0),  # one after the other behind the last layer's backward
        (1001, 10.0, 6 + 30.0 - 9.0),
    ],
)
def test_buckets_overlap_the_backward(bucket_bytes: int, seconds: float, left: float) -> None:
    """Three layers of three seconds backward and 1000 bytes each, `seconds` per all-reduce of a layer."""
    costs = profile([1.0] * 3, [3.0] * 3)
    cluster = devices(2, bandwidth=1000.0 / seconds)
    plan = msgspec.structs.replace(spread("data-parallel", costs, 2, 4), bucket_bytes=bucket_bytes)
    outcome = simulate(costs, plan, cluster)
    assert outcome.step_s == pytest.approx(2 * (3.0 + 9.0) + left)


@pytest.mark.parametrize("r", [2, 4])
def test_bytes_that_are_sharded(r: int) -> None:
    """Two layers: 2000 bytes of parameters, 2000 of gradients, 4000 of optimizer state."""
    costs = profile([1.0] * 2)
    held = {way: static(costs, spread(way, costs, r, r)) for way in ("data-parallel", "zero-1", "zero-2", "zero-3")}
    of = {way: tuple(h[kind] for kind in ("parameters", "gradients", "optimizer")) for way, h in held.items()}
    assert of == {
        "data-parallel": (2000, 2000, 4000),
        "zero-1": (2000, 2000, 4000 / r),
        "zero-2": (2000, 2000 / r, 4000 / r),
        "zero-3": (2000 / r, 2000 / r, 4000 / r),
    }


def test_what_is_gathered_in_passing() -> None:
    """A forward under ZeRO-3 needs two neighbouring blocks whole, one in use and one on its way."""
    costs = profile([1.0] * 3, bytes_=[WORTH_A_COLLECTIVE, 3 * WORTH_A_COLLECTIVE, 2 * WORTH_A_COLLECTIVE])
    whole, shards = (simulate(costs, spread(way, costs, 4, 4), devices(4)).peak[0] for way in ("zero-2", "zero-3"))
    difference = dict(zip(KINDS, (b - a for a, b in zip(whole.bytes, shards.bytes, strict=True)), strict=True))
    assert difference["parameters"] == -6 * WORTH_A_COLLECTIVE * 3 / 4
    assert difference["transient"] + difference["communication"] == 5 * WORTH_A_COLLECTIVE


@pytest.mark.parametrize(("way", "m"), [("zero-1", 4), ("zero-2", 4), ("zero-3", 4)])
def test_a_sharded_step(way: str, m: int) -> None:
    """One layer of 1000 bytes on two replicas: a half ring moves 500 bytes in half a second.

    ZeRO-1: reduce-scatter once and gather once. ZeRO-2: reduce-scatter after both backwards, and gather once. ZeRO-3:
    gather for the first forward (the others overlap what is before them), reduce-scatter after each backward.
    """
    costs = profile([1.0], [2.0], optimizer_s=0.5)
    step = simulate(costs, spread(way, costs, 2, m), devices(2, bandwidth=1000.0)).step_s
    computing = 2 * 3.0 + 0.25
    moving = {"zero-1": 0.5 + 0.5, "zero-2": 2 * 0.5 + 0.5, "zero-3": 0.5 + 2 * 0.5}[way]
    assert step == pytest.approx(computing + moving)


@pytest.mark.parametrize("way", ["all-reduce", "zero-1", "zero-2", "zero-3"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "pipedream", "pipedream-2bw", "interleaved", "chimera"])
def test_replicated_pipelines_are_proved(schedule: str, way: str) -> None:
    costs = profile([1.0] * 4, message_bytes=10, optimizer_s=0.5)
    plan = spread(schedule, costs, 4, 8, replicas=2, synchronisation=way)
    lower(plan)
    cluster = devices(4, bandwidth=1e3)
    assert evaluate(Placed(costs, plan, cluster)).step_s == pytest.approx(simulated_step(Placed(costs, plan, cluster)))


def test_shards_are_gathered_for_the_next_forward() -> None:
    """Without a flush too, a forward waits for the parameters that its update has changed.

    The update stands behind the next backward, and the gather before that one's own reduction.
    """
    costs = profile([1.0] * 2)
    plan = spread("pipedream", costs, 4, 8, replicas=2, synchronisation="zero-1")
    row = [str(action) for action in lower(plan).rows[1] if not action.op.startswith(("SEND", "RECV", "LOAD"))]
    assert row[:5] == ["1F0", "1B0", "1REDUCE_ASYNC0", "1F1", "1B1"]
    assert row[5:9] == ["1OPTIMIZER0", "1UNSHARD_F2", "1REDUCE_ASYNC1", "1F2"]
    slow, quick = (simulated_step(Placed(costs, plan, devices(4, bandwidth=b))) for b in (1000.0, 1e15))
    # Per micro-batch, of which each replica has four, a gather of half a second; the reduce-scatter hides.
    assert slow - quick == pytest.approx(4 * 0.5)


# Parameters that are served.


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_the_servers_link(workers: int) -> None:
    """The server works too; the others pull and push 1000 bytes each.

    Whether they share the host's link or each pair has all of it: everything passes the server's own port, each way.
    """
    costs = profile([1.0], [2.0])
    k = workers + 1
    plan = msgspec.structs.replace(spread("parameter-server", costs, k, k), servers=("d0",))
    shared, own = (simulate(costs, plan, devices(k, bandwidth=1000.0, shared=s)).step_s for s in (True, False))
    assert shared == pytest.approx(3.0 + 2 * workers)
    assert own == pytest.approx(3.0 + 2 * workers)


def test_every_device_serves_its_shard() -> None:
    """Three workers, each with two thirds of its parameters elsewhere: 3 x 2 shards of 1000 / 3 bytes over one link."""
    costs = profile([1.0], [2.0], optimizer_s=0.9)
    plan = spread("parameter-server", costs, 3, 3)
    assert plan.servers == ("d0", "d1", "d2")
    assert simulate(costs, plan, devices(3, bandwidth=1000.0, shared=True)).step_s == pytest.approx(3 + 2 * 2 + 0.3)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_a_servers_port_carries_its_shard_to_all_others(k: int) -> None:
    """Each of k servers sends and receives (k - 1) / k of 1000 bytes, however many pairs have links of their own."""
    costs = profile([1.0], [2.0])
    plan = spread("parameter-server", costs, k, k)
    cluster = devices(k, bandwidth=1000.0)
    expected = pytest.approx(3.0 + 2 * (k - 1) / k)
    assert simulate(costs, plan, cluster).step_s == expected
    assert evaluate(Placed(costs, plan, cluster)).step_s == expected
    crossed = [
        Link(between=(f"d{a}", f"d{b}"), latency_s=0.0, bandwidth_bytes_per_s=1000.0, shared=False)
        for a in range(k)
        for b in range(a)
    ]
    mesh = msgspec.structs.replace(cluster, links=tuple(crossed))
    assert simulate(costs, plan, mesh).step_s == pytest.approx(3.0 + 2 / k), "each pair has ports of its own"


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("servers", [(), ("d0",), ("d0", "d1")])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", "chimera"])
def test_serving_is_never_quicker_than_the_fast_interpreter_says(
    schedule: str, servers: tuple[str, ...], shared: bool
) -> None:
    """What a search rules plans out by stays a bound, with central servers too; of one stage both say the same."""
    costs = profile([1.0] * 4, message_bytes=10, optimizer_s=0.1)
    cluster = devices(8, bandwidth=1e3, shared=shared)
    for k, replicas in ((4, 2), (8, 8)):
        if schedule == "chimera" and k == 8:
            continue
        plan = spread(
            "parameter-server" if k == 8 else schedule,
            costs,
            k,
            8,
            replicas=replicas if k < 8 else 1,
            synchronisation="parameter-server",
        )
        placed = Placed(costs, msgspec.structs.replace(plan, servers=servers or plan.servers), cluster)
        fast, slow = evaluate(placed).step_s, simulated_step(placed)
        assert fast <= slow * (1 + 1e-9)
        if k == 8:
            assert fast == pytest.approx(slow)


def test_servers_are_devices_of_the_plan() -> None:
    plan = spread("parameter-server", profile([1.0]), 2, 2)
    with pytest.raises(ValueError, match="servers"):
        msgspec.structs.replace(plan, servers=("elsewhere",))
    with pytest.raises(ValueError, match="servers"):
        msgspec.structs.replace(plan, servers=())


def test_the_host_serves() -> None:
    """Central storage: 1000 bytes each way over the device's own link, 7000 in the host's memory for the update."""
    cluster = devices(2, host_bandwidth=1000.0)
    hosts = (msgspec.structs.replace(cluster.hosts[0], memory_bytes_per_s=7000.0),)
    cluster = msgspec.structs.replace(cluster, hosts=hosts)
    costs = profile([1.0], [2.0])
    outcome = simulate(costs, spread("central-storage", costs, 2, 4), cluster)
    assert outcome.step_s == pytest.approx(1.0 + 2 * 3.0 + 1.0 + 1.0)
    assert dict(zip(KINDS, outcome.peak[0].bytes, strict=True))["optimizer"] == 0


@pytest.mark.parametrize("bandwidth", [1e15, 1000.0])
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_nobody_waits_for_the_others(workers: int, bandwidth: float) -> None:
    """Updates take turns, so workers come one after the other: between a pull and its push all others push once."""
    costs = profile([1.0], [2.0], optimizer_s=0.1 * workers)
    plan = spread("parameter-server-async", costs, workers, workers)
    outcome = simulate(costs, plan, devices(workers, bandwidth=bandwidth))
    assert staleness(outcome) == pytest.approx(workers - 1)
    if bandwidth > 1000.0:
        assert outcome.step_s == pytest.approx(3.0 + 0.1)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "chimera"])
def test_asynchronous_workers_flush_their_own_pipelines(schedule: str) -> None:
    """A step of a replica takes as long as with a server that all wait for; the next one follows it."""
    costs = profile([1.0] * 2, [2.0] * 2)
    plans = [spread(schedule, costs, 4, 8, replicas=2, synchronisation=way) for way in ("parameter-server",) * 2]
    plans[1] = msgspec.structs.replace(plans[0], synchronisation="parameter-server-async")
    one, other = (simulate(costs, plan, devices(4)) for plan in plans)
    assert other.step_s == pytest.approx(one.step_s)
    assert [p.total for p in other.peak] == pytest.approx([p.total for p in one.peak])


# Pipelines without a flush.


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [4, 6])
@pytest.mark.parametrize(
    ("schedule", "lags"),
    [
        ("pipedream", lambda p, s: p - 1 - s),
        ("pipedream-vertical", lambda p, s: p - 1),
        ("pipedream-2bw", lambda p, s: 1),
        ("1f1b", lambda p, s: 0),
    ],
)
def test_staleness_of_pipelines(schedule: str, lags: Callable[[int, int], int], p: int, m: int) -> None:
    """As defined: a gradient lacks what its stage has been given since the version that it is computed with.

    Each is one less than the versions that the stage keeps. Steps that fill or drain the pipeline do not count.
    """
    plan, _ = pipeline(schedule, p, m)
    outcome = simulate(profile([1.0] * p), plan, devices(p))
    assert staleness(outcome) == pytest.approx(sum(lags(p, s) for s in range(p)) / p)
    assert [schedules.get(schedule).versions(s, (1,) * p) - 1 for s in range(p)] == [lags(p, s) for s in range(p)]


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-vertical", "pipedream-2bw"])
@pytest.mark.parametrize("m", [4, 7])
def test_a_full_pipeline_never_waits(schedule: str, m: int) -> None:
    """Stages that are equal: a step takes the time of its computing alone."""
    costs = profile([1.0] * 4, [2.0] * 4)
    outcome = simulate(costs, pipeline(schedule, 4, m)[0], devices(4))
    assert outcome.step_s == pytest.approx(m * 3.0)
    assert outcome.bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "versions"),
    [("pipedream", [3, 2, 1, 0]), ("pipedream-2bw", [1] * 4), ("pipedream-vertical", [3] * 4), ("1f1b", [0] * 4)],
)
def test_versions_of_parameters(schedule: str, versions: list[int]) -> None:
    """Beside its parameters, stage s of p keeps as many older ones as it has stale micro-batches."""
    plan, _ = pipeline(schedule, 4, 8)
    costs = profile([1.0] * 4)
    assert [static(costs, plan, row)["versions"] for row in range(4)] == [1000 * n for n in versions]
    assert [static(costs, plan, row)["parameters"] for row in range(4)] == [1000] * 4


# Stages with replicas of their own.


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream"])
def test_a_stage_of_two_devices(schedule: str) -> None:
    """The slow stage has two devices that take its micro-batches in turn, and all-reduce 1000 bytes in one second."""
    plan = Plan(
        strategy="uneven",
        schedule=schedule,
        stages=(Stage(layers=("layer0",), devices=("d0", "d1")), Stage(layers=("layer1",), devices=("d2",))),
        microbatches=4,
        batch=4,
    )
    rows = lower(plan).rows
    dealt = [
        [a.microbatch for a in row if a.op == "F" and a.microbatch is not None and a.microbatch < 4] for row in rows
    ]
    assert dealt == [[0, 2], [1, 3], [0, 1, 2, 3]]
    costs = profile([2.0, 1.0])
    quick, slow = (simulate(costs, plan, devices(3, bandwidth=b)) for b in (1e15, 1000.0))
    if schedule == "gpipe":  # F0 and F1 on two devices, F2 and F3 behind them; the last stage is 4 x (1 + 1) busy
        assert quick.step_s == pytest.approx(2 + 4 + 4 + 2)
        assert slow.step_s == pytest.approx(quick.step_s + 1.0)
    reduced = [e for e in slow.trace.events if e.op.startswith("REDUCE") and e.work > 0]
    assert {e.device for e in reduced} == {0, 1}
    assert {e.end - e.ready for e in reduced} == {1.0}
    assert {(e.op, e.lane) for e in reduced} == {
        ("REDUCE_ASYNC", "link") if schedule == "pipedream" else ("REDUCE_GRAD", "compute")
    }


@pytest.mark.parametrize(
    ("bandwidth", "period"), [(1e15, 4.0), (1000.0, 4.0), (250.0, 4.0), (200.0, 5.0), (100.0, 10.0)]
)
def test_a_replicated_stage_takes_the_larger_of_its_computing_and_its_reduction(
    bandwidth: float, period: float
) -> None:
    """PipeDream's stage of two devices: two micro-batches in 4 s of computing, or in the seconds of their all-reduce.

    As its partition reckons (arXiv 1806.03377, section 3.2): 1/m max(T, 2 (m - 1) |w| / m / B) per micro-batch.
    """
    stages = (Stage(layers=("layer0",), devices=("d0", "d1")), Stage(layers=("layer1",), devices=("d2",)))
    plan = Plan(strategy="uneven", schedule="pipedream", stages=stages, microbatches=8, batch=8)
    costs, cluster = profile([2.0, 0.5]), devices(3, bandwidth=bandwidth)
    step = pytest.approx(plan.microbatches / 2 * period, rel=0.01)
    assert simulate(costs, plan, cluster).step_s == step
    assert evaluate(Placed(costs, plan, cluster)).step_s == step


@settings(max_examples=30)
@given(
    st.sampled_from(["1f1b-replicated", "pipedream-replicated"]),
    st.lists(st.sampled_from([1.0, 2.0, 5.0, 9.0]), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([2, 4, 6, 12]),
)
@example("pipedream-replicated", [1.0, 5.0, 1.0], 5, 6)  # the first stage has what the middle one's replicas wait for
def test_pipedreams_plans_run(strategy: str, forward: list[float], k: int, m: int) -> None:
    """Whatever replicas its optimizer chooses: the plan is proved, and both interpreters agree."""
    costs = profile(forward, message_bytes=100)
    cluster = devices(k, bandwidth=1e3)
    plan = get(strategy).spread(Question(costs, cluster, k, m, m))
    assert len(plan.device_names) <= k
    program = lower(plan)
    forwards = [a for row in program.rows for a in row if a.op == "F"]
    assert len(forwards) == len(set(forwards)) == len(plan.stages) * m * windows(plan)
    assert evaluate(Placed(costs, plan, cluster)).step_s == pytest.approx(simulated_step(Placed(costs, plan, cluster)))


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-2bw"])
def test_without_a_flush_links_bound_a_step(schedule: str) -> None:
    """Four replicas of a stage on one slow link: reductions hide behind computing until the link is full."""
    costs = profile([1.0], [1.0])
    plan = spread(schedule, costs, 4, 8, replicas=4)
    placed = Placed(costs, plan, devices(4, bandwidth=500.0, shared=True))
    reductions = 2 if schedule == "pipedream" else 1
    carried = reductions * 4 * (2 * 3 / 4 * 1000) / 500.0
    assert evaluate(placed).step_s == pytest.approx(max(carried, 2 * 2.0 + carried * (schedule == "pipedream-2bw")))
    assert evaluate(placed).step_s <= simulated_step(placed) * (1 + 1e-9)


# Stages of PipeDream whose replicas take micro-batches in turn (1F1B-RR) and reduce beside computing.


def taking_turns(replicas: tuple[int, ...], m: int, schedule: str = "pipedream") -> Plan:
    """A layer per stage; stages stand behind each other on d0, d1, ..."""
    names = iter(range(sum(replicas)))
    stages = tuple(
        Stage(layers=(f"layer{s}",), devices=tuple(f"d{next(names)}" for _ in range(r))) for s, r in enumerate(replicas)
    )
    return Plan(strategy="own", schedule=schedule, stages=stages, microbatches=m, batch=m)


@pytest.mark.parametrize("m", [4, 8, 12, 23])
@pytest.mark.parametrize(
    ("replicas", "passes", "reduction", "expected"),
    [
        # The first stage takes 2 s per micro-batch, the three replicas of the second 6 s for three of them. They come
        # to a turn's reduction 2 s after each other, and the first of them updates behind its next backward, 6 s after
        # its last one: for 2 s the reduction hides altogether.
        ((1, 3), (1.0, 3.0), 0.0, 2.0),
        ((1, 3), (1.0, 3.0), 2.0, 2.0),
        # Longer ones delay turn k + 2 of the first replica (6 s), whose gradient lets the first stage go on with one
        # backward and forward for each of two replicas (4 s), of which the last one (6 s) ends turn k + 3: three turns
        # of three micro-batches take D + 16 s.
        ((1, 3), (1.0, 3.0), 5.0, (5.0 + 16.0) / 9),
        # From 8 s on, one reduction follows the other.
        ((1, 3), (1.0, 3.0), 8.0, 8.0 / 3),
        ((1, 3), (1.0, 3.0), 12.0, 4.0),
        # Both stages take 4 s per micro-batch: 8 s for two, and 12 s for three. Each waits for its own reduction only.
        ((2, 3), (4.0, 6.0), 0.0, 4.0),
        ((2, 3), (4.0, 6.0), 4.0, 4.0),
        ((2, 3), (4.0, 6.0), 30.0, 30.0 / 2),
        # A stage alone: no messages tie its replicas together, so that D hides for the whole turn of 4 s.
        ((2, 1), (2.0, 0.5), 3.9, 2.0),
        ((2, 1), (2.0, 0.5), 5.0, 2.5),
    ],
)
def test_replicas_that_take_turns_do_not_wait_for_each_other(
    replicas: tuple[int, ...], passes: tuple[float, ...], reduction: float, expected: float, m: int
) -> None:
    """Seconds per micro-batch; a reduction of turn k is waited for behind the backward of turn k + 1.

    `passes` are each stage's forward, and as much backward. A ring of r devices takes 2 (r - 1) / r of its bytes' time:
    the bandwidth is such that every reduction takes `reduction` seconds, messages nothing.
    """
    plan = taking_turns(replicas, m)
    bytes_ = [1200 * r // (2 * (r - 1)) if r > 1 else 0 for r in replicas]
    costs = profile(passes, bytes_=bytes_)
    placed = Placed(costs, plan, devices(sum(replicas), bandwidth=1200 / reduction if reduction else 1e15))
    assert evaluate(placed).step_s == pytest.approx(m * expected)
    assert simulated_step(placed) == pytest.approx(m * expected)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda r: len(set(r)) > 1 and sum(r) <= 8),
    st.integers(1, 16),
    st.sampled_from(["pipedream", "pipedream-vertical"]),
)
@example([1, 3, 4], 3, "pipedream")  # replica 0's third backward cannot be sent before replica 2's first one
@example([1, 6, 5, 5, 6], 34, "pipedream-vertical")  # nor may a receive go before what its sender's turn waits for
def test_replicas_that_take_turns_pass_both_orders_of_messages(replicas: list[int], m: int, schedule: str) -> None:
    """Each reduction is joined by all and waited for by an update; both interpreters agree."""
    plan = taking_turns(tuple(replicas), m, schedule)
    program = lower(plan)
    assert lower(plan, in_turn="per device") == program
    assert sum(a.op == "OPTIMIZER" for row in program.rows for a in row) == len(replicas) * m * windows(plan)
    placed = Placed(profile([1.0, 3.0, 2.0, 1.5, 1.0][: len(replicas)]), plan, devices(sum(replicas), bandwidth=1e3))
    assert evaluate(placed).step_s == pytest.approx(simulated_step(placed))


def test_a_reduction_that_nothing_waits_for_is_found() -> None:
    rows = lower(taking_turns((1, 2), 4)).rows
    last = next(a for a in reversed(rows[1]) if a.op == "REDUCE_ASYNC")
    rows = tuple(tuple(a for a in row if a[:2] != (1, "OPTIMIZER") or a[2] != last.microbatch) for row in rows)
    with pytest.raises(PlanError, match=f"nothing waits for {last}"):
        prove(Program.of(rows), 4 * windows(taking_turns((1, 2), 4)))


@pytest.mark.parametrize(("replicas", "lags"), [((2, 1), (2, 0)), ((3, 1), (2, 0)), ((1, 3), (3, 1)), ((2, 3), (3, 1))])
@pytest.mark.parametrize("m", [4, 5, 7, 12])
def test_staleness_of_replicas(replicas: tuple[int, ...], lags: tuple[int, ...], m: int) -> None:
    """A stage's own updates that a gradient lacks: those of the other micro-batches in flight.

    One more where the replicas' updates stand behind the next backward. It does not depend on M.
    """
    costs = profile([2.0, 0.5])
    outcome = simulate(costs, taking_turns(replicas, m), devices(sum(replicas), bandwidth=1e3))
    assert staleness(outcome) == pytest.approx(sum(lags) / 2)


@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("m", [4, 5, 7, 12])
def test_staleness_of_replicas_that_use_the_input_stage_s_version(r: int, m: int) -> None:
    """The input stage lacks 2 of its own updates; these are 2 r micro-batches, and up to r - 1 of its own turn.

    The other stage updates with every micro-batch, so it lacks so many: between 2 r and 3 r - 1, each as often.
    """
    outcome = simulate(profile([2.0, 0.5]), taking_turns((r, 1), m, "pipedream-vertical"), devices(r + 1))
    assert staleness(outcome) == pytest.approx((2 + 2 * r + (r - 1) / 2) / 2, rel=0.01)


@pytest.mark.parametrize(("schedule", "p"), [("pipedream", 1), ("pipedream", 3), ("pipedream-vertical", 3)])
def test_staleness_of_whole_pipelines(schedule: str, p: int) -> None:
    """Replicas of a whole pipeline reduce beside computing, too: one update more than without them."""
    costs = profile([1.0] * p)
    alone = simulate(costs, spread(schedule, costs, p, 6), devices(p))
    several = simulate(costs, spread(schedule, costs, 2 * p, 12, replicas=2), devices(2 * p))
    assert staleness(several) == pytest.approx(staleness(alone) + 1)


def test_waiting_for_a_reduction_beside_computing_is_synchronising() -> None:
    """Reductions of 6 s, computing of 4 s for each: two of three devices wait for a third of the time."""
    costs, plan = profile([2.0, 0.5], bytes_=[1000, 0]), taking_turns((2, 1), 48)
    slow, quick = (simulate(costs, plan, devices(3, bandwidth=b)) for b in (1000 / 6, 1000 / 0.1))
    assert slow.synchronising == pytest.approx(2 / 3 * 2 / 6)
    assert slow.bubble == pytest.approx(1 / 3 * 4 / 6)
    assert quick.synchronising == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("r", [2, 4])
@pytest.mark.parametrize("reduction", [1.0, 2.0, 2.5, 3.5])
def test_pipedream_of_one_stage_is_data_parallelism_without_a_flush(r: int, reduction: float) -> None:
    """PipeDream's partition of one layer: all devices hold it, and reduce once per micro-batch of each.

    A micro-batch takes 2 s of computing, beside which the reduction of the one before goes on: what it takes longer is
    waited for. Each gradient lacks the one whose reduction goes on beside it.
    """
    costs = profile([1.0], [1.0])
    cluster = devices(r, bandwidth=2 * (r - 1) / r * 1000 / reduction)
    plan = get("pipedream-replicated").spread(Question(costs, cluster, r, 4 * r, 4 * r))
    assert [len(stage.devices) for stage in plan.stages] == [r]
    outcome, period = simulate(costs, plan, cluster), max(2.0, reduction)
    assert outcome.step_s == pytest.approx(4 * period)
    assert evaluate(Placed(costs, plan, cluster)).step_s == pytest.approx(4 * period)
    assert outcome.synchronising == pytest.approx((period - 2.0) / period)
    assert outcome.bubble == pytest.approx(0.0, abs=1e-9)
    assert staleness(outcome) == 1


def test_cores_that_compute_hide_no_reduction() -> None:
    """Four processes on four cores: 2 s of computing and a ring of 1.5 s on them per micro-batch of each."""
    machine = msgspec.structs.replace(shared_cores(4), links=devices(1, bandwidth=1000.0).links).take(4)
    costs = profile([1.0], [1.0], machine=machine)
    plan = get("pipedream").spread(Question(costs, machine, 4, 16, 16, replicas=4))
    outcome = simulate(costs, plan, machine)
    assert outcome.step_s == pytest.approx(4 * 3.5)
    assert evaluate(Placed(costs, plan, machine)).step_s == pytest.approx(4 * 3.5)
    assert outcome.synchronising == pytest.approx(1.5 / 3.5)


def test_waiting_for_a_replica_that_has_not_come_is_no_synchronising() -> None:
    """A slow replica posts its reduction late: until then the others wait for it, not for the network."""
    plan = taking_turns((2, 1), 24)
    cluster = devices(3, bandwidth=1000 / 0.1)
    slower = msgspec.structs.replace(cluster.devices[1], speed=0.25)
    cluster = msgspec.structs.replace(cluster, devices=(cluster.devices[0], slower, cluster.devices[2]))
    outcome = simulate(profile([2.0, 0.5], bytes_=[1000, 0]), plan, cluster)
    assert outcome.step_s == pytest.approx(12 * (4 * 4 + 0.05), rel=0.02)
    assert outcome.synchronising < 0.01


# Values and parameters that cross stages.


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "naive"])
def test_tied_parameters_are_all_reduced(schedule: str) -> None:
    """The first and the last stage add up 1000 bytes of gradients in one second, behind the step's last backward."""
    plain, tied = (profile([1.0] * 4, tied=t) for t in ((), (("w", "layer0", "layer3"),)))
    cluster = devices(4, bandwidth=1000.0)
    one, other = (simulate(c, spread(schedule, c, 4, 4), cluster) for c in (plain, tied))
    assert other.plan.tied == ((0, 3),)
    assert other.step_s == pytest.approx(one.step_s + 1.0)
    assert [e.device for e in other.trace.events if e.op == "REDUCE_TIED"] == [0, 3]


def test_tied_parameters_within_a_stage_cost_nothing() -> None:
    tied = profile([1.0] * 4, tied=(("w", "layer0", "layer1"),))
    assert spread("gpipe", tied, 2, 4).tied == ()


@pytest.mark.parametrize(
    ("how", "op", "moved"),
    [
        ("all-reduce", "REDUCE_GRAD", 2 * 1400 / 2),  # n - 1 of n parts there, and back
        ("zero-1", "REDUCE_GRAD", 1400 / 2),
        ("zero-1", "UNSHARD_F", 1400 / 2),
        ("central-storage", "PUSH", 1400.0),
        ("central-storage", "PULL", 1400.0),
    ],
)
def test_what_layers_of_one_stage_share_is_reduced_and_gathered_once(how: str, op: str, moved: float) -> None:
    """Two layers of 1000 bytes, 600 of which are the same: a stage of both has 1400, on 2 replicas at 1 byte/s."""
    found = {}
    for shared in (600, 0):
        costs = profile([1.0] * 2, bytes_=[1000] * 2, tied=(("w", "layer0", "layer1"),), tied_bytes=shared)
        plan = spread("gpipe", costs, 2, 2, replicas=2, synchronisation=how)
        placed = Placed(costs, plan, devices(2, bandwidth=1.0, host_bandwidth=1.0))
        found[shared] = PriceList(placed).transfer(op, 0, 0, 0).seconds
    assert found[600] == pytest.approx(moved)
    assert found[0] == pytest.approx(moved * 2000 / 1400), "of which nothing is known, all counts"


def test_a_shared_gradient_is_ready_with_the_first_of_its_layers() -> None:
    """The layer's own 400 bytes are ready behind the second's backward, those that both have behind the first's."""
    costs = profile([1.0] * 2, [2.0] * 2, bytes_=[1000] * 2, tied=(("w", "layer0", "layer1"),), tied_bytes=600)
    assert costs.held_bytes(range(2), "gradient_bytes", first=True) == [1000.0, 400.0]
    assert costs.held_bytes(range(2), "parameter_bytes") == [400.0, 1000.0]
    assert costs.held_bytes(range(1, 2), "parameter_bytes") == [1000.0]
    gradients, parameters = byte_spans(costs)
    assert (gradients[0, 1], gradients[1, 2], gradients[0, 2], parameters[0, 2]) == (1000.0, 1000.0, 1400.0, 1400.0)


def test_replicas_of_tied_stages() -> None:
    """Every row joins: all of them end up with the same average over replicas of the sum over stages."""
    tied = profile([1.0] * 2, tied=(("w", "layer0", "layer1"),))
    plan = spread("gpipe", tied, 4, 4, replicas=2)
    lower(plan)
    outcome = simulate(tied, plan, devices(4, bandwidth=1000.0))
    assert sorted(e.device for e in outcome.trace.events if e.op == "REDUCE_TIED") == [0, 1, 2, 3]


def test_replicas_of_tied_stages_meet_in_their_own_pipeline() -> None:
    """Rows 0 and 1 are one pipeline, 2 and 3 the other: two all-reduces, each of two rows."""
    tied = profile([1.0] * 2, tied=(("w", "layer0", "layer1"),))
    of = Linked(lower(spread("gpipe", tied, 4, 4, replicas=2)))
    ties = [i for i, action in enumerate(of.actions) if action.op == "REDUCE_TIED"]
    posts = of.posts[ties].tolist()
    assert of.row[ties].tolist() == [0, 1, 2, 3]
    assert posts[0] == posts[1] != posts[2] == posts[3]
    assert of.parties[posts].tolist() == [2] * 4


@pytest.mark.parametrize("replicas", [(1, 3), (3, 1), (2, 1, 3)])
def test_tied_stages_with_different_numbers_of_replicas(replicas: tuple[int, ...]) -> None:
    """All rows of both stages join once, with a part of their stage's average each: a ring of all of them.

    4 rows, 1000 bytes, a link of 1000 bytes/s: 2 x 3/4 s; of 2 + 3 rows (the middle stage stays out) 2 x 4/5 s.
    """
    count, last = len(replicas), f"layer{len(replicas) - 1}"
    plain, tied = (profile([1.0] * count, tied=t) for t in ((), (("w", "layer0", last),)))
    cluster = devices(sum(replicas), bandwidth=1000.0)
    plan = msgspec.structs.replace(taking_turns(replicas, 6, "1f1b"), tied=((0, count - 1),))
    of = Linked(lower(plan))
    joining = [of.row[i] for i, action in enumerate(of.actions) if action.op == "REDUCE_TIED"]
    assert joining == [*plan.holders[0], *plan.holders[-1]]
    assert set(of.parties[of.posts[[a.op == "REDUCE_TIED" for a in of.actions]]].tolist()) == {len(joining)}
    one, other = simulate(plain, msgspec.structs.replace(plan, tied=()), cluster), simulate(tied, plan, cluster)
    assert other.step_s == pytest.approx(one.step_s + 2 * (len(joining) - 1) / len(joining))


@pytest.mark.parametrize("schedule", ["pipedream", "pipedream-vertical", "pipedream-2bw"])
def test_nothing_is_shared_between_stages_without_a_flush(schedule: str) -> None:
    """A shared parameter's gradient is there when all its stages had a micro-batch: they update before that."""
    costs = profile([1.0] * 4, tied=(("w", "layer0", "layer3"),))
    with pytest.raises(PlanError, match="stages 0 and 3 share parameters, and without a flush"):
        spread(schedule, costs, 4, 8)
    whole = spread("pipedream-replicated", costs, 4, 8)
    assert [len(stage.devices) for stage in whole.stages] == [4], "its partition does not cut between them"
    assert len(spread("1f1b", costs, 4, 8).stages) == 4


def test_tied_stages_of_one_host_stay_in_it() -> None:
    """Two pipelines of two stages, each on a host with a NIC of 1 GB/s; both stages share 1 GB.

    Both stages reduce 1 GB over the NIC in a ring of two, 1 GB each way: 2 s together, from the moment at which the
    last stage has its gradients (5 ms: 2 micro-batches forward and backward behind the first stage's forward).
    Each pipeline adds up 1 GB within its host, over links of 100 GB/s: 10 ms. 2.015 s, not 3.005 s with another 1 GB
    over the NIC.
    """
    costs = profile([1e-3] * 2, [1e-3] * 2, message_bytes=0, bytes_=[10**9] * 2, tied=(("w", "layer0", "layer1"),))
    cluster = hosts([("a", 2), ("b", 2)], nic=1e9, inside=1e11)
    plan = get("gpipe").spread(Question(costs, cluster, 4, 4, 4, replicas=2, mapping="pipelines"))
    assert [stage.devices for stage in plan.stages] == [("a0", "b0"), ("a1", "b1")]
    placed = Placed(costs, plan, cluster)
    assert simulated_step(placed) == pytest.approx(2.015)
    assert evaluate(placed).step_s == pytest.approx(2.015)


def test_a_device_with_both_tied_stages_adds_up_alone() -> None:
    """Chimera's outer rows have the first and the last stage: after the reduction over copies nothing is to be sent."""
    tied = profile([1.0] * 4, bytes_=[10**6] * 4, tied=(("w", "layer0", "layer3"),))
    plan = spread("chimera", tied, 4, 4)
    prices = PriceList(Placed(tied, plan, devices(4)))
    assert plan.tied == ((0, 3),)
    assert [prices.transfer("REDUCE_TIED", 0, row, row).seconds for row in (0, 3)] == [0.0, 0.0]


def test_a_stage_that_does_not_add_up_is_found() -> None:
    tied = profile([1.0] * 2, tied=(("w", "layer0", "layer1"),))
    program = lower(spread("gpipe", tied, 4, 4, replicas=2))
    rows = [[a for a in row if d < 3 or a.op != "REDUCE_TIED"] for d, row in enumerate(program.rows)]
    with pytest.raises(PlanError, match="0REDUCE_TIED lacks a stage that shares parameters"):
        prove(Program.of(rows), 4)


@pytest.mark.parametrize("at", ["device", "host", "nic"])
@pytest.mark.parametrize("servers", [("a0",), ("a0", "c0"), ("a0", "b0", "c0", "d0")])
def test_a_servers_own_link_carries_all_that_it_serves(at: str, servers: tuple[str, ...]) -> None:
    """Four hosts of one worker each, at a switch over links of 1 GB/s that are not shared, 100 MB of parameters.

    Each of n servers sends 100 / n MB to 3 others at a pull, and gets as much at a push: 0.3 s / n each way, whether
    the link is the device's, its host's, or its NIC's; and computing takes 2 x 2 ms x 2 samples.
    """
    costs = profile([1e-3] * 2, [1e-3] * 2, bytes_=[5 * 10**7] * 2)
    cluster = hosts([(name, 1) for name in "abcd"], nic=1e9, inside=0.0, shared=False, at=at)
    plan = Plan(
        strategy="own",
        schedule="1f1b",
        stages=(Stage(layers=("layer0", "layer1"), devices=("a0", "b0", "c0", "d0")),),
        microbatches=8,
        batch=8,
        synchronisation="parameter-server",
        servers=servers,
    )
    placed = Placed(costs, plan, cluster)
    derived = 2 * 0.3 / len(servers) + 8e-3
    assert simulated_step(placed) == pytest.approx(derived)
    assert evaluate(placed).step_s == pytest.approx(derived)


def test_links_between_switches_have_no_port() -> None:
    """What a fabric carries for several hosts at the same time is no one's own: only hosts' links limit a server."""
    cluster = hosts([(name, 1) for name in "abcd"], nic=1e9, inside=0.0, shared=False, at="host")
    ends = [("a", "switch"), ("b", "switch"), ("switch", "up"), ("up", "c"), ("up", "d")]
    links = tuple(joined(*pair, 1e9, shared=False) for pair in ends)
    cluster = msgspec.structs.replace(cluster, switches=("switch", "up"), links=links)
    path = cluster.path("a0", "c0")
    assert len(cluster.through_ports(path, "a0", "c0")) == len(path) + 2 == 5


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_staleness_of_pushes_at_the_same_moment(workers: int) -> None:
    """Equal workers push and pull in the program's order: between a pull and its push each other one pushes once."""
    costs = profile([1e-3] * 2, bytes_=[10**7] * 2, optimizer_s=1e-4)
    cluster = devices(workers, bandwidth=1e11, shared=True)
    names = tuple(device.name for device in cluster.devices)
    plan = Plan(
        strategy="own",
        schedule="1f1b",
        stages=(Stage(layers=("layer0", "layer1"), devices=names),),
        microbatches=workers,
        batch=workers,
        synchronisation="parameter-server-async",
        servers=names,
    )
    assert staleness(simulate(costs, plan, cluster)) == workers - 1


def test_skip_edges_are_relayed() -> None:
    """What layer 0 makes for layer 3 crosses every cut in between, forward and as a gradient."""
    chain = profile([1.0] * 4, message_bytes=100)
    skip = Value(name="skip", source=0, targets=(3,), bytes_at=tuple((n, 50 * n) for n in SIZES), gradient=True)
    costs = msgspec.structs.replace(chain, values=(*chain.values, skip))
    plan, _ = pipeline("gpipe", 4, 2)
    moved = {e.action: e.bytes for e in simulate(costs, plan, devices(4)).trace.events if e.lane == "link"}
    assert len(moved) == 3 * 2 * 2
    assert set(moved.values()) == {150.0}
    stopped = msgspec.structs.replace(costs, values=(*chain.values, msgspec.structs.replace(skip, gradient=False)))
    moved = {e.action: e.bytes for e in simulate(stopped, plan, devices(4)).trace.events if e.lane == "link"}
    assert {parse(action).op: size for action, size in moved.items()} == {"RECV_F": 150.0, "RECV_B": 100.0}


# Tensors that are split.


@pytest.mark.parametrize("t", [2, 4])
def test_split_layers(t: int) -> None:
    """Computing over t, and two all-reduces of the 1000 output bytes in each direction."""
    costs = profile([4.0] * 2, [8.0] * 2, split=Split(forward=2, backward=2), optimizer_s=1.0)
    cluster = devices(t, bandwidth=1000.0)
    plan = spread("tensor-parallel", costs, t, 1)
    assert plan.tensor == t
    collective = 2 * (t - 1) / t
    outcome = simulate(costs, plan, cluster)
    assert outcome.step_s == pytest.approx(2 * ((4.0 + 8.0) / t + 4 * collective + 1.0 / t))
    held = dict(zip(KINDS, outcome.peak[0].bytes, strict=True))
    assert (held["parameters"], held["optimizer"]) == (2000 / t, 4000 / t)


def test_split_stages_of_a_pipeline() -> None:
    """Two stages of two devices each; every device has half of a layer."""
    costs = profile([4.0] * 2, split=Split(forward=0, backward=0))
    plan = spread("gpipe", costs, 4, 2, tensor=2)
    assert plan.groups == (("d0", "d1"), ("d2", "d3"))
    outcome = simulate(costs, plan, devices(4))
    assert outcome.step_s == pytest.approx((2 + 1) * 2 * 2.0)
    assert len(outcome.trace.devices) == 2


def test_nothing_says_how_it_splits() -> None:
    with pytest.raises(PlanError) as raised:
        spread("tensor-parallel", profile([1.0] * 2), 2, 2)
    assert raised.value.code == USAGE
    assert "how its tensors split" in raised.value.what
    assert "splits(model)" in raised.value.fix


def test_unknown_ways_get_the_nearest() -> None:
    with pytest.raises(PlanError) as raised:
        spread("gpipe", profile([1.0] * 2), 2, 2, synchronisation="zero1")
    assert raised.value.code == USAGE
    assert "did you mean 'zero-1'" in raised.value.why


# Laws, for every schedule and every synchronisation.

REPLICATED = [(name, r) for name in schedules.names() if schedules.get(name).trains for r in (1, 2)]


def reductions(row: Row, stage: int) -> list[list[str]]:
    """The backwards of a stage's row between two reductions, update by update."""
    beside = any(a.op == "REDUCE_ASYNC" for a in row)
    updates: list[list[str]] = [[]]
    for action in row:
        if action.stage != stage:
            continue
        if action.op in ("B", "W", "REDUCE_GRAD", "REDUCE_ASYNC"):
            updates[-1].append(action.op.replace("ASYNC", "GRAD"))
        if action.op == ("REDUCE_ASYNC" if beside else "OPTIMIZER"):
            updates.append([])
    return [update for update in updates if update]


@pytest.mark.parametrize("way", synchronisation.names())
@pytest.mark.parametrize(("schedule", "replicas"), REPLICATED)
def test_every_gradient_is_agreed_on_once_per_update(schedule: str, replicas: int, way: str) -> None:
    """All holders of a stage reduce behind the last backward of every update, none of a stage with one holder.

    Gradients that are sharded are reduced after every backward instead. Servers get one push for every pull.
    """
    costs = profile([1.0] * 8, message_bytes=10)
    plan = spread(schedule, costs, 4 * replicas, 8 * replicas, replicas=replicas, synchronisation=way)
    chosen = synchronisation.get(way)
    program = lower(plan)
    for stage, holders in enumerate(plan.holders):
        for row in (program.rows[h] for h in holders):
            found = reductions(row, stage)
            backwards = [sum(op != "REDUCE_GRAD" for op in update) for update in found]
            reduced = [sum(op == "REDUCE_GRAD" for op in update) for update in found]
            if chosen.server:
                pulls, pushes = ([i for i, a in enumerate(row) if a[:2] == (stage, op)] for op in ("PULL", "PUSH"))
                assert len(pulls) == len(pushes) > 0
                assert all(pull < push for pull, push in zip(pulls, pushes, strict=True))
                assert not any(reduced)
            elif len(holders) == 1:
                assert not any(reduced)
            elif "gradients" in chosen.shards:
                assert reduced == backwards
            else:
                assert reduced == [1] * len(found)
                assert all(update[-1] == "REDUCE_GRAD" for update in found), "behind the last backward"


@pytest.mark.parametrize("way", ["all-reduce", "zero-2", "parameter-server"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved", "zb-v", "chimera", "pipedream"])
def test_a_gradient_is_sent_on_before_replicas_agree(schedule: str, way: str) -> None:
    """The stage before waits for it: no reduction or push stands between a backward and the send of its gradient."""
    costs = profile([1.0] * 8, message_bytes=10)
    plan = spread(schedule, costs, 8, 16, replicas=2, synchronisation=way)
    for row in lower(plan).rows:
        unsent = None
        for action in row:
            send = Action(action.stage, "SEND_B", action.microbatch)
            if action.op in ("B", "I") and send in row:
                unsent = send
            elif action == unsent:
                unsent = None
            assert unsent is None or action.op not in ("REDUCE_GRAD", "PUSH"), f"{action} before {unsent}"


@pytest.mark.parametrize("p", [2, 4])
def test_replicas_reduce_at_the_same_time(p: int) -> None:
    """Stages of equal size: one reduction (1 s) behind the last backward, not one after the other up the pipeline."""
    costs = profile([1.0] * p, [2.0] * p)
    plan = spread("gpipe", costs, 2 * p, 2 * 4, replicas=2)
    step = simulate(costs, plan, devices(2 * p, bandwidth=1000.0)).step_s
    assert step == pytest.approx((4 + p - 1) * 3.0 + 1.0)


def test_chimeras_two_copies_reduce() -> None:
    """One pair of pipelines over four devices: four reductions of 1000 bytes, one second each, two on every device."""
    costs = profile([1.0] * 4)
    plan = spread("chimera", costs, 4, 4)
    assert plan.holders == ((0, 3), (1, 2), (1, 2), (0, 3))
    trace = simulate(costs, plan, devices(4, bandwidth=1000.0)).trace
    spent = [sum(e.end - e.ready for e in trace.events if e.device == d and e.op == "REDUCE_GRAD") for d in range(4)]
    assert spent == pytest.approx([2.0] * 4)
