"""The memory of hosts: what plans keep there has to fit, and its bandwidth is shared by the host's devices."""

from __future__ import annotations

import msgspec
import pytest

from planner.basis.errors import PlanError
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
    of = Space(("gpipe",), (2,), (4,), (1,), (1,), (1,), ("all-reduce",), (("host-optimizer",),))
    answer = Search(costs, cluster, 4, of).run()
    assert not answer.leaders
    assert [(found.full, found.lack) for found in answer.nearest] == [("h", 8.0)]
