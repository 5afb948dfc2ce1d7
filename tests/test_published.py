"""Bubble rates that Zero Bubble's authors published (arXiv 2401.10241, table 5), through schedules and simulator."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "how_close_to_published"


@pytest.fixture(scope="module")
def zero_bubble():
    sys.path.insert(0, str(BENCHMARK))
    try:
        import zero_bubble

        yield zero_bubble
    finally:
        sys.path.remove(str(BENCHMARK))


def test_1f1b_to_four_decimals(zero_bubble):
    rows = [row for row in zero_bubble.rows() if row.schedule == "1F1B"]
    assert len(rows) == 12
    assert [round(zero_bubble.bubble_rate(row), 4) for row in rows] == [row.bubble for row in rows]


@pytest.mark.parametrize("schedule", ["ZB-H1", "ZB-H2", "ZB-1p"])
def test_the_authors_orders_to_four_decimals(zero_bubble, schedule):
    rows = [row for row in zero_bubble.rows() if row.schedule == schedule and row.microbatches < 64]
    assert [round(zero_bubble.bubble_rate(row), 4) for row in rows] == [row.bubble for row in rows]


@pytest.mark.parametrize("schedule", ["1F1B-I", "ZB-2p"])
def test_interleaved_and_searched_orders_within_a_hundredth(zero_bubble, schedule):
    rows = [row for row in zero_bubble.rows() if row.schedule == schedule and row.microbatches < 64]
    for row in rows:
        assert zero_bubble.bubble_rate(row) == pytest.approx(row.bubble, abs=0.01)


def test_messages_that_wait_for_their_receive_take_longer(zero_bubble):
    import msgspec

    row = next(row for row in zero_bubble.rows() if row.schedule == "1F1B")
    cluster = zero_bubble.cluster_of(row)
    profile, plan = zero_bubble.planned(row, cluster)
    rendezvous = msgspec.structs.replace(cluster, buffered=False)
    makespan = zero_bubble.by_hand.makespan
    assert makespan(profile, plan, cluster) < makespan(profile, plan, rendezvous)


def test_both_simulators_agree_on_messages_that_begin_when_they_are_sent(zero_bubble):
    from planner.simulate.predict import simulate

    row = next(row for row in zero_bubble.rows() if row.schedule == "1F1B")
    cluster = zero_bubble.cluster_of(row)
    profile, plan = zero_bubble.planned(row, cluster)
    outcome = simulate(profile, plan, cluster)
    assert outcome.step_times_s or outcome.steps
    assert max(e.end for e in outcome.steps[0].events) == pytest.approx(
        zero_bubble.by_hand.makespan(profile, plan, cluster)
    )
