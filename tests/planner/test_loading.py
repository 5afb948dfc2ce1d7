"""Batches that worker processes make: hidden behind a step that takes longer, and its bound where they take longer."""

from __future__ import annotations

import msgspec
import pytest

from planner.costs.placed import Placed
from planner.orders.action import parse
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.profile import Loading, Profile, Timing, decode
from tests.factory import devices, pipeline, profile, shared_cores


def loaded(stages: int, making_s: float, *, workers: int = 1, busy: float = 0.0, take_s: float = 0.0) -> Profile:
    """Layers of 1 s forward and 2 s backward; `making_s` is for a batch of 4."""
    return msgspec.structs.replace(
        profile([1.0] * stages, [2.0] * stages),
        load=(Timing.of(4, [take_s]),),
        loading=Loading(workers=workers, making=(Timing.of(4, [making_s]),), busy=busy),
    )


def predicted(costs: Profile, k: int, cluster: Cluster) -> Outcome:
    plan, _ = pipeline("gpipe", k, 4)
    found, placed = simulate(costs, plan, cluster), Placed(costs, plan, cluster)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Outcome).step_s == found.step_s
    assert evaluate(placed).step_s <= found.step_s * (1 + 1e-9)
    assert simulated_step(placed) == pytest.approx(found.step_s)
    return found


@pytest.mark.parametrize(
    ("making_s", "workers", "step_s"),
    [(10.0, 1, 15.0), (15.0, 1, 15.0), (40.0, 1, 40.0), (40.0, 2, 20.0), (40.0, 4, 15.0)],
)
def test_a_step_is_as_long_as_its_computing_or_as_the_making_of_its_batch(
    making_s: float, workers: int, step_s: float
) -> None:
    found = predicted(loaded(2, making_s, workers=workers), 2, devices(2))
    assert found.step_s == pytest.approx(step_s)
    waits = [e.end - e.start for e in found.steps[0].events if parse(e.action).op == "LOAD"]
    assert waits == pytest.approx([step_s - 15.0, 0.0])  # targets are there before their turn comes
    assert found.profiled_s["0LOAD"] == pytest.approx(step_s - 15.0)


def test_what_is_hidden_of_a_wait_is_waited_for_nonetheless() -> None:
    """The targets take 12 s to be taken: until then the last stage could not compute in any case."""
    costs = loaded(2, 40.0, take_s=12.0)
    found = predicted(costs, 2, devices(2))
    assert found.step_s == pytest.approx(40.0, rel=2e-3)


def test_taking_a_batch_that_is_ready_takes_its_time() -> None:
    assert predicted(loaded(2, 10.0, take_s=1.0), 2, devices(2)).step_s == pytest.approx(16.0)


def test_replicas_make_their_shares_only() -> None:
    costs = loaded(2, 40.0)
    plan, _ = pipeline("gpipe", 2, 4, replicas=2, synchronisation="all-reduce")
    assert simulate(costs, plan, devices(4)).step_s == pytest.approx(20.0, rel=1e-3)


def test_workers_share_the_cores_with_what_computes() -> None:
    """One core: 12 s of computing, and 6 s of making in a process beside it."""
    found = predicted(loaded(1, 6.0, busy=1.0), 1, shared_cores(1))
    assert found.step_s == pytest.approx(18.0)
    assert predicted(loaded(1, 6.0, busy=0.0), 1, shared_cores(1)).step_s == pytest.approx(12.0)


def test_profiles_without_loading_are_read() -> None:
    costs = loaded(2, 10.0)
    assert decode(msgspec.json.encode(costs), "here") == costs
    document = {k: v for k, v in msgspec.to_builtins(costs).items() if k != "loading"}
    assert decode(msgspec.json.encode(document), "here").loading is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="takes a time"):
        Loading(workers=1)
    with pytest.raises(ValueError, match="not be negative"):
        Loading(workers=-1)


def test_a_step_s_inputs_come_over_the_devices_own_links() -> None:
    """4 samples of 30 bytes of inputs and 10 of targets at 10 bytes/s: 12 s before all else, 4 s before the loss.

    The targets are there long before their turn; a CPU computes in the host's memory, so nothing changes. Two replicas
    bring half of it each.
    """
    costs = msgspec.structs.replace(loaded(2, 0.0, workers=1), batch_bytes=((1, 30, 10), (2, 60, 20)))
    assert predicted(costs, 2, devices(2)).step_s == pytest.approx(15.0)
    found = predicted(costs, 2, devices(2, host_bandwidth=10.0))
    assert found.step_s == pytest.approx(27.0)
    took = {str(parse(e.action).stage): e.end - e.start for e in found.steps[0].events if parse(e.action).op == "LOAD"}
    assert took == pytest.approx({"0": 12.0, "1": 4.0})
    one = msgspec.structs.replace(loaded(1, 0.0, workers=1), batch_bytes=costs.batch_bytes)
    (alone,) = (
        e.end - e.start
        for e in predicted(one, 1, devices(1, host_bandwidth=10.0)).steps[0].events
        if parse(e.action).op == "LOAD"
    )
    assert alone == pytest.approx(16.0), "one stage needs both"
    plan, _ = pipeline("gpipe", 2, 4, replicas=2, synchronisation="all-reduce")
    halves = simulate(costs, plan, devices(4, host_bandwidth=10.0)).steps[0].events
    assert sorted({e.end - e.start for e in halves if parse(e.action).op == "LOAD"}) == pytest.approx([2.0, 6.0])


def test_a_slower_link_is_another_sort_of_device() -> None:
    """Rows are priced once per sort: that of the second replica, whose link is half as quick, is one of its own."""
    costs = msgspec.structs.replace(loaded(1, 0.0, workers=1), batch_bytes=((1, 30, 10), (2, 60, 20)))
    cluster = devices(2, host_bandwidth=10.0)
    links = [*cluster.links]
    links[-1] = msgspec.structs.replace(links[-1], bandwidth_bytes_per_s=5.0)
    plan, _ = pipeline("gpipe", 1, 4, replicas=2, synchronisation="all-reduce")
    found = simulate(costs, plan, msgspec.structs.replace(cluster, links=tuple(links))).steps[0].events
    took = {e.device: e.end - e.start for e in found if parse(e.action).op == "LOAD"}
    assert list(took.values()) == pytest.approx([8.0, 16.0])
