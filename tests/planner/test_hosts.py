"""The memory of hosts: what plans keep there has to fit, and its bandwidth is shared by the host's devices."""

from __future__ import annotations

import msgspec
import pytest

from planner.basis.errors import DEVICE, PlanError
from planner.costs.host_room import check_hosts
from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.savings import apply
from planner.placement.strategies import get
from planner.search.ranking import Ranking
from planner.search.search import Search
from planner.search.space import Space
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.plan import Plan, Stage
from tests.factory import devices, profile


def with_host(cluster: Cluster, **fields: float) -> Cluster:
    return msgspec.structs.replace(cluster, hosts=(msgspec.structs.replace(cluster.hosts[0], **fields),))


def test_what_a_host_keeps_has_to_fit() -> None:
    """Parameters, gradients and optimizer state of two layers, 4000 bytes each, are on the host: 8000 fit, not 7999."""
    costs, cluster = profile([1.0] * 2), devices(2, host_bandwidth=1e6)
    question = Question(costs, cluster, 2, 4, 4)
    plan = apply(question, get("gpipe").spread(question), ("host-optimizer",))
    for room, fits in ((8000, True), (7999, False)):
        small = with_host(cluster, memory_bytes=room)
        outcome = simulate(costs, plan, small)
        assert outcome.fits == fits
        (host,) = outcome.hosts
        assert (host.name, host.need_bytes, host.has_bytes) == ("h", 8000, room)
        placed = Placed(costs, plan, small)
        assert evaluate(placed).worst(placed) == pytest.approx((8000 / room, "h")) if not fits else True


def test_a_host_that_is_too_small_is_named() -> None:
    costs, cluster = profile([1.0] * 2), with_host(devices(2, host_bandwidth=1e6), memory_bytes=1000)
    question = Question(costs, cluster, 2, 4, 4)
    plan = apply(question, get("gpipe").spread(question), ("host-optimizer",))
    ranking = Ranking(k=2, m=4, batch=4, profile="by hand", cluster=cluster, outcomes=(simulate(costs, plan, cluster),))
    with pytest.raises(PlanError) as raised:
        ranking.best  # noqa: B018
    assert "on h, has 1000 B" in raised.value.why
    of = Space(("gpipe",), (2,), (4,), (1,), (1,), (1,), ("all-reduce",), (("host-optimizer",),), (4,))
    answer = Search(costs, cluster, of).run()
    assert not answer.leaders
    assert [(found.full, found.lack) for found in answer.nearest] == [("h", 8.0)]


def test_copies_share_the_hosts_memory() -> None:
    """Replicas swap their first activations together: 1000 bytes/s on links of their own, 1000 in the memory of all."""
    costs = profile([1.0] * 2, bytes_=[100] * 2, message_bytes=10)
    taken = []
    for replicas in (1, 2):
        plan = Plan(
            strategy="gpipe",
            schedule="gpipe",
            stages=tuple(
                Stage(layers=(f"layer{s}",), devices=tuple(f"d{2 * r + s}" for r in range(replicas))) for s in range(2)
            ),
            microbatches=8 * replicas,
            batch=8 * replicas,
            offload=True,
        )
        outcome = simulate(costs, plan, with_host(devices(4, host_bandwidth=1e3), memory_bytes_per_s=1e3))
        copies = [e for e in outcome.trace.events if e.op == "OFFLOAD" and e.lane == "link" and e.device == 0]
        first = min(copies, key=lambda e: e.start)
        taken.append(first.end - first.start)
        assert first.bytes > 0
    assert taken[1] == pytest.approx(2 * taken[0])


@pytest.mark.parametrize("k", [1, 8])
def test_updates_bring_no_more_than_the_memory_does(k: int) -> None:
    """Links of 100 GB/s, a memory of 51.2 GB/s, 0.8 GB of parameters: an update moves 5.6 GB there, and 0.8 each way.

    Copies pass the memory, which is slower than the link: 0.8 / 51.2 + 5.6 / 51.2 + 0.8 / 51.2 = 0.1406 s alone, and 8
    updates take 8 times that, 57.6 GB / 51.2 GB/s = 1.125 s.
    """
    costs = profile([1e-3] * 8, bytes_=[10**8] * 8)
    cluster = with_host(devices(k, host_bandwidth=1e11, memory_bytes=10**13), memory_bytes_per_s=51.2e9)
    question = Question(costs, cluster, k, 2 * k, 2 * k)
    placed = Placed(costs, apply(question, get("data-parallel").spread(question), ("host-optimizer",)), cluster)
    updates = [e.work for e in simulate(costs, placed.plan, cluster).trace.events if e.op == "OPTIMIZER"]
    assert updates == pytest.approx([k * 7.2 / 51.2] * k)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_optimizers_on_the_host_share_its_memory(k: int) -> None:
    """Each update moves 2 x 1000 + 1000 + 2 x 2000 bytes there, and 1000 each way: 9000 bytes of the memory.

    Alone 1 s down, 1 s up at 1000 bytes/s, and 7000 bytes at 9000 bytes/s; all of them no sooner than k x 1 s.
    """
    costs, cluster = profile([1.0]), with_host(devices(k, host_bandwidth=1e3), memory_bytes_per_s=9e3)
    question = Question(costs, cluster, k, k, k)
    plan = apply(question, get("data-parallel").spread(question), ("host-optimizer",))
    outcome = simulate(costs, plan, cluster)
    updates = [e.work for e in outcome.trace.events if e.op == "OPTIMIZER"]
    assert updates == pytest.approx([max(2 + 7 / 9, k * 1.0)] * k)


def test_this_machine_holds_the_model_and_a_batch_or_says_so() -> None:
    """Two layers of 1000 bytes; a sample is 3 bytes of inputs and 1 of targets, so 500 samples fill 2000 bytes."""
    machine = msgspec.structs.replace(with_host(devices(2), memory_bytes=2000), elastic=True)
    costs = msgspec.structs.replace(profile([1.0] * 2), machine=machine, batch_bytes=((1, 3, 1), (2, 6, 2)))
    check_hosts(costs, machine, [500])
    with pytest.raises(PlanError, match="batch is too large for this host") as raised:
        check_hosts(costs, machine, [8, 501])
    assert (raised.value.code, raised.value.where) == (DEVICE, "a batch of 501 samples")
    assert raised.value.fix == "--batch 64", "a quarter of 500, as a power of two"
    less = with_host(machine, memory_bytes=1999)
    with pytest.raises(PlanError, match="model is too large for this host") as raised:
        check_hosts(msgspec.structs.replace(costs, machine=less), less, [])
    assert "take 1.95 KiB, and the host has 1.95 KiB" in raised.value.why
    check_hosts(costs, with_host(machine, memory_bytes=1), [10**9])  # of other hardware nobody says how it is fed
