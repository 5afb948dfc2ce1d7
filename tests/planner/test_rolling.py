"""The rows of a run without flush, put together step by step: those that are unrolled over all of its steps."""

from __future__ import annotations

from itertools import chain, product

import numpy as np
import pytest

from planner.basis.errors import PlanError
from planner.orders import codes, schedules
from planner.orders.action import Action
from planner.orders.operations import FORWARD, OPTIMIZER
from planner.programs.lowering import unroll
from planner.programs.rolling import Rolling
from planner.values.plan import Plan, Stage

SHAPES = (
    *product(("pipedream", "pipedream-vertical", "pipedream-2bw"), [(1,) * p for p in (1, 2, 3, 4)], (1, 2, 3, 4, 8)),
    *product(("pipedream", "pipedream-2bw"), [(2,) * p for p in (1, 2, 3)], (2, 4, 8)),
    *product(("pipedream", "pipedream-vertical"), ((1, 2), (2, 1), (1, 3), (1, 2, 1), (1, 2, 3), (3, 2)), (2, 6, 12)),
)


def plan_of(schedule: str, holders: tuple[int, ...], m: int) -> Plan | None:
    """A plan of stages with so many holders each; None where it cannot be."""
    if any(m % count for count in holders) or (schedule == "pipedream-2bw" and m // holders[0] < len(holders)):
        return None
    devices = (f"d{i}" for i in range(sum(holders)))
    stages = tuple(
        Stage(layers=(f"l{s}",), devices=tuple(next(devices) for _ in range(count))) for s, count in enumerate(holders)
    )
    return Plan(strategy=schedule, schedule=schedule, microbatches=m, batch=m, stages=stages)


PLANS = [plan for shape in SHAPES if (plan := plan_of(*shape)) is not None]
BY_MICROBATCH = [plan for plan in PLANS if schedules.get(plan.schedule).updates == "microbatch"]


def numbered(actions: tuple[Action, ...], rolling: Rolling, later: int) -> list[Action]:
    """Actions with the run's numbers; of one step alone a reduction and its update have none."""
    none = ("REDUCE_GRAD", "OPTIMIZER") if rolling.steps == 1 else ()
    return [
        a._replace(microbatch=None if a.microbatch is None or a.op in none else rolling.number(a.microbatch, later))
        for a in actions
    ]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_steps_behind_each_other_are_the_unrolled_row(plan: Plan) -> None:
    least = Rolling(plan).least
    for steps in {2, least, least + 1, 17} - {1} | ({1} if least > 1 else set()):
        rolling = Rolling(plan, steps)
        whole = Rolling.__new__(Rolling)
        whole.plan, whole.share, whole.steps = plan, rolling.share, steps
        for device, row in enumerate(unroll(plan, steps=steps).rows):
            parts = (rolling.row(device, window, steps) for window in range(steps))
            found = list(chain.from_iterable(numbered(part, rolling, later) for part, later in parts))
            assert found == numbered(row, whole, 0), (steps, device)


def test_a_run_that_ends_early_is_the_shorter_one() -> None:
    plan = plan_of("pipedream", (1, 1, 1), 2)
    assert plan is not None
    long, short = Rolling(plan, 100), Rolling(plan, 12)
    for device in range(3):
        early = [long.row(device, w, 100 if w < 12 - long.draining else 12) for w in range(12)]
        assert early == [short.row(device, w, 12) for w in range(12)]


def test_what_no_period_fits_is_refused() -> None:
    stages = tuple(Stage(layers=(f"l{s}",), devices=d) for s, d in enumerate((("a",), ("b", "c"))))
    odd = Plan(strategy="pipedream", schedule="pipedream", microbatches=3, batch=3, stages=stages)
    with pytest.raises(PlanError, match="does not repeat itself"):
        Rolling(odd)


@pytest.mark.parametrize("plan", BY_MICROBATCH, ids=str)
def test_what_the_input_stage_knows_is_read_off_its_row(plan: Plan) -> None:
    rolling, steps = Rolling(plan), 17
    whole = unroll(plan, steps=steps)
    counts = [len(own) // plan.pipelines for own in plan.holders]
    for row in whole.order:
        forward = codes.has(row, FORWARD) & (codes.stages(row) == 0)
        known = np.cumsum(codes.has(row, OPTIMIZER))[forward].tolist()
        for m, updates in zip(codes.microbatches(row[forward]).tolist(), known, strict=True):
            own = m % (rolling.share * steps)
            number = own // rolling.share * plan.microbatches + own % rolling.share
            for stage, count in enumerate(counts):
                assert rolling.seen(stage, number) == updates * counts[0] // count
