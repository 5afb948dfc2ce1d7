"""Replicas that take micro-batches in turn agree in ways that end on every backend; others are refused at the door."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.orders import schedules, synchronisation
from planner.programs.lowering import lower
from planner.values import plan_file
from planner.values.plan import Plan, Stage

UNEVEN = tuple(name for name in schedules.names() if schedules.get(name).uneven and schedules.get(name).trains)
FLUSHING = tuple(name for name in UNEVEN if not schedules.get(name).asynchronous)
REFUSED = {
    **dict.fromkeys(product(FLUSHING, ("zero-2", "zero-3")), ("all-reduce", "zero-1")),
    **dict.fromkeys(product(("pipedream", "pipedream-vertical"), ("zero-1", "zero-2", "zero-3")), ("all-reduce",)),
}
"""Of a schedule and a synchronisation, those that a person is told to choose instead."""


def taking_turns(schedule: str, agreed: str, replicas: tuple[int, ...], m: int) -> Plan:
    names = iter(range(sum(replicas)))
    stages = tuple(
        Stage(layers=(f"layer{s}",), devices=tuple(f"d{next(names)}" for _ in range(r))) for s, r in enumerate(replicas)
    )
    servers = {"": (), "devices": ("d0",), "host": ("host0",)}[synchronisation.get(agreed).server]
    return Plan(
        strategy="own",
        schedule=schedule,
        stages=stages,
        microbatches=m,
        batch=m,
        synchronisation=agreed,
        servers=servers,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(set(product(UNEVEN, synchronisation.names())) - set(REFUSED))),
    st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda r: len(set(r)) > 1),
    st.integers(4, 16),
)
@example(("pipedream-vertical", "all-reduce"), [1, 3, 2], 4)  # with zero-3, which is refused, it waited for ever
def test_whatever_is_not_refused_passes_both_orders_of_messages(
    names: tuple[str, str], replicas: list[int], m: int
) -> None:
    plan = taking_turns(*names, tuple(replicas), m)
    assert lower(plan, in_turn="per device") == lower(plan, in_turn="per pair")


@pytest.mark.parametrize(("schedule", "agreed"), sorted(REFUSED))
def test_agreeing_within_turns_is_refused_with_ways_that_work(schedule: str, agreed: str, tmp_path: Path) -> None:
    others = REFUSED[schedule, agreed]
    with pytest.raises(ValueError, match=f"choose {' or '.join(others)}, or give every stage as many devices"):
        taking_turns(schedule, agreed, (2, 1), 15)
    plans = [taking_turns(schedule, other, (2, 1), 15) for other in others]
    for plan in [*plans, taking_turns(schedule, agreed, (2, 2), 16)]:
        lower(plan, in_turn="per device")
    path = tmp_path / "plan.toml"
    whole = plan_file.to_toml(plans[0]).replace(f'synchronisation = "{others[0]}"', f'synchronisation = "{agreed}"')
    path.write_text(whole)
    with pytest.raises(PlanError, match="wait for each other for ever"):
        plan_file.read(path)
    path.write_text(plan_file.to_toml(plans[-1]))
    assert plan_file.read(path) == plans[-1]
