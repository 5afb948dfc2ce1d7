"""The first look of a search on slow, shared networks: never above SimPy, and in nearly the same order."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.placement.strategies import all_strategies
from planner.search.search import Search
from planner.search.space import Space, candidates, make
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.values.cluster import Cluster
from planner.values.plan import asynchronous
from planner.values.profile import Profile
from tests.factory import hosts_of, profile

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
