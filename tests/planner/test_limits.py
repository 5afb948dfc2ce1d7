"""What is said to bound a plan, on plans where that is known."""

from __future__ import annotations

import msgspec
import pytest

from planner.costs.placed import Placed
from planner.placement import strategies
from planner.placement.pipeline import Question
from planner.search.ranking import rank
from planner.simulate.limits import ideal_bubble, limits
from planner.simulate.outline import outline
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Host
from planner.values.plan import asynchronous
from tests.factory import devices, pipeline, profile


def texts(forward: list[float], schedule: str, m: int) -> list[str]:
    plan, _ = pipeline(schedule, len(forward), m)
    cluster = devices(len(forward))
    return [limit.text for limit in limits(simulate(profile(forward), plan, cluster), cluster)]


def test_an_equal_pipeline_is_bound_by_its_bubble() -> None:
    computing, first = texts([1.0] * 4, "gpipe", 4)
    assert computing == "the layers' own computing: 57.1 % of the devices' time"
    assert "idle for 42.9 % of the step" in first
    assert "(K-1)/(M+K-1) = 42.9 %" in first


def test_the_ideal_bubble_counts_a_replicas_own_microbatches() -> None:
    """M=8 over R=2: each pipeline of K=4 has 4, so 3 of 7 slots are idle, not 3 of 11."""
    plan, _ = pipeline("1f1b", 4, 8, replicas=2)
    assert ideal_bubble(plan) == pytest.approx(3 / 7)
    cluster = devices(8)
    first = limits(simulate(profile([1.0] * 4), plan, cluster), cluster)[1].text
    assert "(K-1)/(M/R+K-1) = 42.9 % at K=4, M=8, R=2" in first
    assert "idle for 42.9 % of the step" in first


@pytest.mark.parametrize("strategy", ["data-parallel", "zero-1", "zero-2", "zero-3", "parameter-server"])
def test_time_in_reductions_is_no_computing_and_no_bubble(strategy: str) -> None:
    """Two equal devices compute 8 s of a step; all else of it is spent agreeing, however that is done."""
    cluster = devices(2, bandwidth=500.0)
    plan = strategies.get(strategy).spread(Question(profile([1.0, 1.0]), cluster, 2, 2, 4))
    outcome = simulate(profile([1.0, 1.0]), plan, cluster)
    assert outcome.step_s > 9
    assert outcome.synchronising == pytest.approx(1 - 8 / outcome.step_s)
    assert outcome.bubble == pytest.approx(0.0, abs=1e-9)
    assert any(limit.text.startswith("synchronising") for limit in limits(outcome, cluster))


def test_waiting_for_a_slower_replica_is_the_bubble() -> None:
    """d1 is half as fast and reduces in no time: d0 waits for it for half of the step."""
    cluster = devices(2)
    slow = msgspec.structs.replace(cluster.devices[1], speed=0.5)
    cluster = msgspec.structs.replace(cluster, devices=(cluster.devices[0], slow))
    plan = strategies.get("data-parallel").spread(Question(profile([1.0, 1.0]), cluster, 2, 2, 4))
    outcome = simulate(profile([1.0, 1.0]), plan, cluster)
    assert outcome.synchronising == pytest.approx(0.0, abs=1e-9)
    assert outcome.bubble == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("strategy", "layers", "m", "bandwidth"), [("data-parallel", 2, 2, 500.0), ("pipedream-replicated", 1, 256, 400.0)]
)
def test_large_plans_count_what_their_actions_wait_for(strategy: str, layers: int, m: int, bandwidth: float) -> None:
    """The outline walks no SimPy: its shares are those of the walked step."""
    cluster, costs = devices(2, bandwidth=bandwidth), profile([1.0] * layers)
    plan = strategies.get(strategy).spread(Question(costs, cluster, 2, m, layers * m))
    small, large = simulate(costs, plan, cluster), outline(Placed(costs, plan, cluster))
    assert large.step_s == pytest.approx(small.step_s)
    assert small.synchronising > 0.1
    assert large.synchronising == pytest.approx(small.synchronising, rel=0.02), "the last steps drain the pipeline"
    assert large.bubble == pytest.approx(small.bubble, abs=0.01)


def test_an_uneven_pipeline_is_bound_by_its_slowest_stage() -> None:
    assert "d2 works" in texts([1.0, 1.0, 4.0], "1f1b", 32)[0]


def test_one_device_is_bound_by_computing() -> None:
    assert "the layers' own computing" in texts([1.0], "gpipe", 4)[0]


def test_shared_cores_are_said_only_where_they_are_shared() -> None:
    machine = Cluster(
        name="here", hosts=(Host(name="h", cores=2, memory_bytes=10**9),), links=devices(1).links, elastic=True
    )
    costs = profile([1.0] * 4, machine=machine)
    here = rank(costs, machine, k=4, m=8, batch=8, name="p")
    assert any("4 processes on 2 cores" in x.text for x in limits(here.outcomes[0], here.cluster))
    there = rank(costs, devices(4), k=4, m=8, batch=8, name="p")
    assert not any("shared cores" in x.text for x in limits(there.outcomes[0], there.cluster))
    by_name = {str(o.plan): o for o in here.outcomes}
    assert by_name["gpipe-k4-m8"].step_s > {str(o.plan): o for o in there.outcomes}["gpipe-k4-m8"].step_s


def test_the_best_is_the_fastest_that_fits() -> None:
    costs = profile([1.0] * 4)
    need = rank(costs, devices(4), k=4, m=8, batch=8, name="p")
    fastest = need.best
    tight = devices(4, memory_bytes=int(fastest.peak_bytes) - 1)
    ranking = rank(costs, tight, k=4, m=8, batch=8, name="p")
    assert ranking.best.plan != fastest.plan
    assert ranking.best.fits
    fitting = [o for o in ranking.outcomes if o.fits and not asynchronous(o.plan)]
    assert ranking.best.throughput == pytest.approx(max(o.throughput for o in fitting)), "but for ties"
    assert [o.fits for o in ranking.outcomes] == sorted((o.fits for o in ranking.outcomes), reverse=True)
