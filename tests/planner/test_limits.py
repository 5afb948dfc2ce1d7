"""What is said to bound a plan, on plans where that is known."""

from __future__ import annotations

from planner.search.ranking import rank
from planner.simulate.limits import limits
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Host
from planner.values.plan import asynchronous
from tests.factory import devices, pipeline, profile


def texts(forward: list[float], schedule: str, m: int) -> list[str]:
    plan, _ = pipeline(schedule, len(forward), m)
    cluster = devices(len(forward))
    return [limit.text for limit in limits(simulate(profile(forward), plan, cluster), cluster)]


def test_an_equal_pipeline_is_bound_by_its_bubble() -> None:
    first = texts([1.0] * 4, "gpipe", 4)[0]
    assert "idle for 42.9 % of the step" in first
    assert "(K-1)/(M+K-1) = 42.9 %" in first


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
    assert ranking.best.throughput == max(o.throughput for o in fitting)
    assert [o.fits for o in ranking.outcomes] == sorted((o.fits for o in ranking.outcomes), reverse=True)
