"""How small a micro-batch may be, and how many plans there is time for."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from planner.basis.errors import PlanError
from planner.cli.opened import of_plan
from planner.placement import strategies
from planner.placement.question import Question
from planner.search import ranking
from planner.search.possible import remedy
from planner.search.space import candidates, space
from planner.store import Store
from tests.factory import devices, profile

TWO = msgspec.structs.replace(profile([1.0] * 4), least=2)
"""A model whose batch norm refuses one sample."""


def test_micro_batches_of_too_few_samples_are_refused() -> None:
    with pytest.raises(PlanError, match="micro-batches of 1 sample are too small for the model") as raised:
        ranking.check(TWO, k=2, m=8, batch=8)
    assert raised.value.fix == "--m 4, or fewer"
    ranking.check(TWO, k=2, m=4, batch=8)
    ranking.check(profile([1.0]), k=2, m=8, batch=8)


def test_more_micro_batches_than_samples_are_refused() -> None:
    with pytest.raises(PlanError, match="M=1,000,000 micro-batches are more than the 64 samples of a batch") as raised:
        ranking.check(TWO, k=2, m=1_000_000, batch=64)
    assert raised.value.fix == "--m 32, or fewer; or a larger --batch"


def test_no_search_offers_them_and_no_remedy_does() -> None:
    cluster = devices(2)
    of = space(TWO, cluster, 8)
    found = {one.batch // one.m for one in candidates(of, TWO, cluster)}
    assert min(found) == 2
    assert min(one.batch // one.m for one in candidates(of, profile([1.0] * 4), cluster)) == 1
    interleaved = strategies.get("interleaved")
    assert remedy(Question(TWO, cluster, 2, 1, 2), interleaved) != "--m 2 makes it possible"


def test_a_plan_file_with_them_is_refused(tmp_path: Path) -> None:
    plan = strategies.get("gpipe").spread(Question(TWO, devices(2), 2, 8, 8))
    with pytest.raises(PlanError, match="too small for the model") as raised:
        of_plan(Store(tmp_path), tmp_path, TWO, plan, None)
    assert raised.value.fix == "microbatches = 4, or fewer"


def test_plans_for_which_there_is_no_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "ENOUGH_S", -1.0)
    chosen = [strategies.get(name) for name in ("gpipe", "1f1b")]
    found = ranking.rank(TWO, devices(2), k=2, m=4, batch=8, name="p", strategies=chosen)
    assert [outcome.plan.strategy for outcome in found.outcomes] == ["gpipe"]
    assert found.left_out == ("gpipe+recompute", "1f1b", "1f1b+recompute")
    monkeypatch.undo()
    found = ranking.rank(TWO, devices(2), k=2, m=4, batch=8, name="p", strategies=chosen)
    assert not found.left_out
