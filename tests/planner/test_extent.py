"""What is too large is said before it starts."""

from __future__ import annotations

import resource

import pytest

from planner.basis.errors import PlanError
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.programs import extent
from planner.programs.lowering import unroll
from planner.search.outlook import outlook
from planner.search.search import Search
from planner.search.space import space
from tests.factory import devices, profile


def test_a_program_that_does_not_fit_is_refused_before_it_is_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 stages, 4,096 micro-batches: 6 x 8 x 4,096 = 196,608 actions of 45 bytes are 8.44 MiB; 4 MiB take 1,024."""
    q = Question(profile([1.0] * 8), devices(8), k=8, m=4096, batch=4096)
    plan = get("1f1b").spread(q)
    monkeypatch.setattr(extent, "free_bytes", lambda: 4.0 * 2**20)
    with pytest.raises(PlanError) as error:
        unroll(plan)
    assert "196,608 actions" in error.value.where
    assert error.value.why == "they need about 8.44 MiB, and 4.00 MiB are free"
    assert error.value.fix.startswith("--m 1024 or fewer")


def test_a_plan_is_refused_before_its_schedule_is_arranged() -> None:
    """10^10 micro-batches on 8 stages: 1.6 x 10^11 computes are terabytes, and nothing of them is made."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    q = Question(profile([1.0] * 8), devices(8), k=8, m=10**10, batch=10**10)
    with pytest.raises(PlanError, match="too large for this machine"):
        get("1f1b").spread(q)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000, "kilobytes"


def test_what_a_search_takes_is_said_where_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, cluster = profile([1.0] * 4), devices(4)
    search = Search(costs, cluster, space(costs, cluster, 16))
    assert outlook(search) is None, "a small space"
    monkeypatch.setattr("planner.search.outlook.POINTS", 1)
    expected = outlook(search)
    assert expected is not None
    assert (expected.points, expected.rows, expected.microbatches) == (search.tally.points, 4, 16)
    assert 0 < expected.each_s < 60
    assert not search.state.done, "nothing is counted as evaluated"
    assert f"{expected.points:,} candidates" in str(expected)
