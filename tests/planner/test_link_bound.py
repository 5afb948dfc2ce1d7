"""The first look of a search on slow, shared networks: never above SimPy, and in nearly the same order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.strategies import Strategy, all_strategies, get
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.search.search import Search
from planner.search.space import Space, candidates, make
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.extrapolate import extrapolate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import asynchronous
from planner.values.profile import Profile
from tests.factory import devices, hosts_of, profile

NAMES = tuple(s.name for s in all_strategies())


def everything(ks: tuple[int, ...], ms: tuple[int, ...], batch: int) -> Space:
    return Space(
        strategies=NAMES,
        ks=ks,
        ms=ms,
        replicas=(1, 2),
        tensors=(1,),
        chunks=(1, 2),
        synchronisations=("all-reduce", "zero-1", "zero-3"),
        savings=((),),
        batches=(batch,),
    )


def looks(costs: Profile, cluster: Cluster, of: Space) -> list[tuple[str, float, float]]:
    """Every plan without stale gradients: its key, the first look, SimPy."""
    found = []
    for candidate in candidates(of, costs, cluster):
        try:
            plan = make(candidate, costs, cluster)
            placed = Placed(costs, plan, cluster)
            if not asynchronous(plan):
                found.append((candidate.key, evaluate(placed).step_s, simulated_step(placed)))
        except PlanError:
            continue
    return found


@settings(max_examples=30)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([10.0, 100.0, 1000.0]),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.integers(0, 2000),
    st.data(),
)
def test_the_first_look_is_never_above_simpy(
    name: str, nic: float, latency_s: float, message: int, data: st.DataObject
) -> None:
    cluster = hosts_of(2, 2, nic=nic, latency_s=latency_s)
    layers = [data.draw(st.integers(1, 5)) * 1.0 for _ in range(4)]
    costs = profile(layers, message_bytes=message, optimizer_s=0.5)
    of = everything((1, 2, 4), (4,), 4)._replace(strategies=(name,))
    tried = looks(costs, cluster, of)
    assume(tried)
    for key, first, simpy in tried:
        assert first <= simpy * (1 + 1e-9), key


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's: how many more pairs are in the right order than in the wrong, of those that differ."""
    right = wrong = 0
    for (a, b), (c, d) in combinations(pairs, 2):
        if abs(b - d) > 1e-9 * b:
            right += (a - c) * (b - d) > 0
            wrong += (a - c) * (b - d) < 0
    return (right - wrong) / max(1, right + wrong)


@pytest.mark.parametrize("nic", [100.0, 1000.0])
@pytest.mark.parametrize("latency_s", [0.001, 0.5])
def test_the_order_of_plans_on_slow_networks(nic: float, latency_s: float) -> None:
    """What the search calls best is SimPy's best of all plans, and the first look has nearly all pairs in order."""
    cluster = hosts_of(2, 2, nic=nic, latency_s=latency_s)
    costs = profile([1.0, 2.0, 2.0, 1.0], message_bytes=50, optimizer_s=0.5)
    of = everything((2, 4), (2, 4), 8)
    tried = looks(costs, cluster, of)
    answer = Search(costs, cluster, of).run()
    assert min(f.step_s for f in answer.leaders) == pytest.approx(min(simpy for *_, simpy in tried))
    assert tau([(first, simpy) for _, first, simpy in tried]) > 0.85


def linked_by(
    own: Sequence[Sequence[float]], nics: Sequence[float], *, inner: Sequence[float] = (), shared: bool = True
) -> Cluster:
    """Hosts whose devices have links of these bytes/s (0: none), a link to a switch, and perhaps one to themselves."""
    hosts = range(len(nics))
    names = [(f"d{h}{i}", f"h{h}", bandwidth) for h in hosts for i, bandwidth in enumerate(own[h])]
    ends = [
        *names,
        *((f"h{h}", "switch", nics[h]) for h in hosts),
        *((f"h{h}", f"h{h}", bandwidth) for h, bandwidth in enumerate(inner)),
    ]
    return Cluster(
        name="unequal",
        hosts=tuple(Host(name=f"h{h}", cores=len(own[h]), memory_bytes=10**13) for h in hosts),
        devices=tuple(Device(name=name, host=host, memory_bytes=10**12) for name, host, _ in names),
        switches=("switch",),
        links=tuple(
            Link(between=(a, b), latency_s=0.0, bandwidth_bytes_per_s=bandwidth, shared=shared)
            for a, b, bandwidth in ends
            if bandwidth
        ),
    )


@pytest.mark.parametrize("schedule", ["naive", "gpipe"])
def test_replicas_with_unequal_links_of_their_own_do_not_send_at_once(schedule: str) -> None:
    """Two pipelines of three stages, a1's PCIe is a tenth of the others': nothing crowds a NIC as if all began at once.

    Every message is 0.1 GB, every pass 1 ms, one micro-batch each. The quick pipeline is at the NIC (1 GB/s) at 12 ms,
    the other, after 0.1 s over a1's PCIe, at 102 ms. The quick one has 10 MB left by then, both share the NIC until
    122 ms, and the slow one's 90 MB end at 212 ms. The way back is the same from 124 and 214 ms, so the slow one's
    gradients are on host 0 at 324 ms; 1 ms backward, 0.1 s over a1's PCIe, 1 ms backward: 426 ms.
    """
    layers = [1e-3] * 3
    costs = msgspec.structs.replace(profile(layers, layers, message_bytes=10**8), batch=2)
    cluster = linked_by([[1e10, 1e9, 1e10, 1e10], [1e10, 1e10]], [1e9, 1e9])
    plan = get(schedule).spread(Question(costs, cluster, 6, 2, 2, replicas=2, mapping="stages"))
    placed = Placed(costs, plan, cluster)
    assert [stage.devices for stage in plan.stages] == [("d00", "d01"), ("d02", "d03"), ("d10", "d11")]
    assert simulated_step(placed) == pytest.approx(0.426, abs=1e-5)
    assert evaluate(placed).step_s <= simulated_step(placed)


@pytest.mark.parametrize("microbatches", [8, 16384])
def test_one_replica_stands_only_for_those_with_equal_links(microbatches: int) -> None:
    """Nothing is shared, host 1's inner link is 10 MB/s: its replica takes as long as its messages, not as host 0's.

    gpipe in two stages, passes of 8 and 16 ms, messages of 4 MB, of which two are on their way at a time (one receive
    is posted ahead). Two forward messages take 400 ms and the pass behind the first 8, until the next two are asked
    for: a round of 408 ms, and of 416 ms backward. The first rounds take 8 + 400 + 2 x 8 ms and 16 + 400 + 2 x 16 ms.
    """
    costs = profile([1e-3] * 4, [2e-3] * 4, message_bytes=10**6)
    costs = msgspec.structs.replace(costs, batch=4 * microbatches)
    cluster = linked_by([[0, 0], [0, 0]], [1e10, 1e10], inner=[1e10, 1e7], shared=False)
    question = Question(costs, cluster, 4, microbatches, 4 * microbatches, replicas=2, mapping="pipelines")
    placed = Placed(costs, get("gpipe").spread(question), cluster)
    step_s = 0.872 + (microbatches / 4 - 1) * 0.824
    assert evaluate(placed, Linked(unroll(placed.plan))).step_s == pytest.approx(step_s, abs=1e-6)
    assert evaluate(placed).step_s == pytest.approx(step_s, abs=1e-6)
    assert simulate(costs, placed.plan, cluster).samples_s[0] == pytest.approx(step_s, abs=1e-6)


def test_a_long_step_takes_what_its_links_carry() -> None:
    """Two stages on each of two hosts, in turn: 2048 micro-batches bring three messages of 1 s each way over the NICs.

    From host 0 the activations of stages 0 and 2 and the gradient of stage 2 go. The first begins behind a forward of
    1 ms; behind the last, stage 1's backward of 2 ms sends its gradient back in 1 s, and stage 0's takes 2 ms:
    0.001 + 3 x 2048 + 0.002 + 1 + 0.002 s. Nothing is walked to its end: the steady state is continued.
    """
    microbatches = 2048
    costs = msgspec.structs.replace(profile([1e-3] * 4, [2e-3] * 4, message_bytes=100), batch=microbatches)
    cluster = hosts_of(2, 1, nic=100.0)
    plan = get("interleaved").spread(Question(costs, cluster, 2, microbatches, microbatches, chunks=2))
    placed = Placed(costs, plan, cluster)
    assert extrapolate(placed) is not None
    assert evaluate(placed).step_s == pytest.approx(6145.005, rel=1e-9)
    assert evaluate(placed).step_s <= simulated_step(placed)


@settings(max_examples=20)
@given(
    st.sampled_from([strategy for strategy in all_strategies() if not strategy.asynchronous]),
    st.sampled_from([10.0, 100.0, 1000.0]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([(1, 1, ""), (2, 1, ""), (2, 2, "stages"), (2, 2, "pipelines")]),
    st.sampled_from(["all-reduce", "zero-1"]),
    st.integers(0, 2000),
)
def test_a_long_step_is_bound_by_its_links_as_a_short_one(
    strategy: Strategy, nic: float, latency_s: float, shape: tuple[int, int, str], agreed: str, message: int
) -> None:
    """Where the steady state is continued, its bound is nearly that of the step walked whole, and never above it."""
    chunks, replicas, mapping = shape
    cluster = hosts_of(2, 2, nic=nic, latency_s=latency_s)
    costs = msgspec.structs.replace(profile([1.0, 2.0, 1.0, 3.0], message_bytes=message, optimizer_s=0.5), batch=384)
    question = Question(costs, cluster, 4, 384, 384, replicas=replicas, chunks=chunks, mapping=mapping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.simulate.extrapolate.WORTH_IT", 4)
        try:
            synchronisation = agreed if replicas > 1 else ""
            placed = Placed(costs, strategy.spread(question._replace(synchronisation=synchronisation)), cluster)
            one = 1 if placed.alike else None
            continued = extrapolate(placed, one)
        except PlanError:
            continued = None
    if continued is not None:
        whole = evaluate(placed, Linked(unroll(placed.plan, replicas=one))).step_s
        assert 0.9 * whole <= continued[0] <= whole * (1 + 1e-9)
        assert continued[0] <= simulated_step(placed) * (1 + 1e-9)


def test_a_server_applies_one_push_after_the_other() -> None:
    """Four workers nobody waits for, one server that needs 16 s for an update: 4 x 16 s a step, with quick links.

    A worker alone would be back after 12 s of passes and its own update.
    """
    cluster = devices(4, bandwidth=1e5)
    costs = msgspec.structs.replace(profile([1.0, 2.0, 2.0, 1.0], message_bytes=50, optimizer_s=4.0), batch=4)
    plan = get("parameter-server-async").spread(Question(costs, cluster, 4, 4, 4))
    placed = Placed(costs, msgspec.structs.replace(plan, servers=("d0",)), cluster)
    assert evaluate(placed).step_s == pytest.approx(64.0)
    assert simulated_step(placed) == pytest.approx(64.0)


def test_updates_on_a_host_share_its_memory() -> None:
    """Eight replicas on one host update there at the same time: eight times what one update needs of its memory.

    Two micro-batches of 8 ms each way: 32 ms. Every layer's gradients, 0.1 GB, are a bucket, reduced in 1.75 ms
    (2 x 7/8 x 0.1 GB at 100 GB/s) behind its 1 ms of the last backward: 1 + 8 x 1.75 - 8 = 7 ms stick out. Alone, an
    update brings 5.6 GB and two copies of 0.8 GB through the memory at 51.2 GB/s: 140.625 ms.
    """
    layers = [1e-3] * 8
    costs = profile(layers, layers, message_bytes=1000, bytes_=[10**8] * 8)
    costs = msgspec.structs.replace(costs, batch=16)
    cluster = devices(8, memory_bytes=10**13, bandwidth=1e11, host_bandwidth=1e11)
    plan = get("data-parallel").spread(Question(costs, cluster, 8, 16, 16, savings=("host-optimizer",)))
    placed = Placed(costs, plan, cluster)
    assert simulated_step(placed) == pytest.approx(0.032 + 0.007 + 8 * 0.140625, rel=1e-9)
    assert evaluate(placed).step_s == pytest.approx(simulated_step(placed), rel=1e-9)


@st.composite
def unequal(pick: st.DrawFn) -> Cluster:
    """Two hosts whose devices' links, whose NICs and whose memories are not all as quick."""
    each = pick(st.sampled_from([2, 4]))
    own = [[pick(st.sampled_from([1e4, 1e3])) for _ in range(each)] for _ in range(2)]
    cluster = linked_by(own, [pick(st.sampled_from([100.0, 200.0, 1000.0])) for _ in range(2)])
    rates = [pick(st.sampled_from([2e3, 5e4])) for _ in range(2)]
    hosts = (
        msgspec.structs.replace(host, memory_bytes_per_s=rate) for host, rate in zip(cluster.hosts, rates, strict=True)
    )
    return msgspec.structs.replace(cluster, hosts=tuple(hosts))


@settings(max_examples=60)
@given(
    unequal(),
    st.sampled_from([strategy for strategy in all_strategies() if not strategy.asynchronous]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["", "zero-1", "zero-3", "parameter-server", "central-storage"]),
    st.sampled_from([(), ("recompute",), ("offload",), ("host-optimizer",)]),
    st.sampled_from(["", "stages", "pipelines"]),
    st.integers(0, 2000),
)
def test_the_first_look_is_never_above_simpy_on_unequal_links(
    cluster: Cluster,
    strategy: Strategy,
    replicas: int,
    agreed: str,
    saved: tuple[str, ...],
    mapping: str,
    message: int,
) -> None:
    costs = profile([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0], message_bytes=message, optimizer_s=0.5)
    question = Question(
        costs,
        cluster,
        len(cluster.devices),
        8,
        8,
        replicas=replicas,
        synchronisation=agreed if replicas > 1 else "",
        savings=saved,
        mapping=mapping,
    )
    try:
        placed = Placed(costs, strategy.spread(question), cluster)
        simpy = simulated_step(placed)
    except PlanError:
        assume(False)
        return
    assert evaluate(placed).step_s <= simpy * (1 + 1e-9)
