"""What a step takes once the pipeline is full does not depend on how many steps are unrolled."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.costs.placed import Placed
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.values.plan import Plan, Stage, full, windows
from tests.factory import devices, profile

BANDWIDTH = 1e3

Seconds = tuple[float, ...]


def taking_turns(replicas: tuple[int, ...], forward: Seconds, backward: Seconds, reduce: Seconds, m: int) -> Placed:
    """Stages of PipeDream whose replicas take micro-batches in turn, with seconds of one reduction of each stage."""
    sizes = [
        round(seconds * BANDWIDTH * r / (2 * (r - 1))) if r > 1 else 1
        for seconds, r in zip(reduce, replicas, strict=True)
    ]
    names = iter(range(sum(replicas)))
    stages = tuple(
        Stage(layers=(f"layer{i}",), devices=tuple(f"d{next(names)}" for _ in range(r))) for i, r in enumerate(replicas)
    )
    plan = Plan(strategy="pipedream", schedule="pipedream", stages=stages, microbatches=m, batch=m)
    layers = profile(list(forward), list(backward), bytes_=sizes)
    return Placed(layers, plan, devices(sum(replicas), bandwidth=BANDWIDTH))


@pytest.mark.parametrize(
    ("replicas", "forward", "backward", "reduce", "right"),
    [
        # The slowest stage's computing over its replicas, or a turn's reduction over its micro-batches.
        ((3, 2, 3), (1, 0.5, 0.5), (1, 1, 1), (4, 1, 0), 4 / 3),
        ((2, 3), (0.5, 2), (2, 3), (3, 4 / 3), 5 / 3),
        ((4, 3), (1, 0.5), (3, 2), (4.5, 0), 4.5 / 4),
        ((2, 1), (1, 0.5), (1, 0.5), (0, 0), 1),
    ],
)
@pytest.mark.parametrize("m", [4, 5, 6, 7, 12, 24, 60, 600])
def test_the_step_of_replicas_that_take_turns_is_steady(
    replicas: tuple[int, ...], forward: Seconds, backward: Seconds, reduce: Seconds, right: float, m: int
) -> None:
    placed = taking_turns(replicas, forward, backward, reduce, m)
    assert evaluate(placed).step_s / m == pytest.approx(right, rel=1e-3)  # bytes of gradients are whole numbers
    assert simulated_step(placed) == pytest.approx(evaluate(placed).step_s, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_seconds_per_micro_batch_do_not_depend_on_how_many_a_step_has(data: st.DataObject) -> None:
    replicas = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3).filter(lambda r: len(set(r)) > 1))

    def each(*values: float) -> Seconds:
        return tuple(data.draw(st.sampled_from(values)) for _ in replicas)

    forward, backward, reduce = each(0.5, 1, 2), each(1, 2, 3), each(0, 0.5, 1, 2)
    per = {
        evaluate(taking_turns(tuple(replicas), forward, backward, reduce, m)).step_s / m
        for m in (max(replicas), 4, 7, 12 * math.lcm(*replicas))
    }
    assert max(per) == pytest.approx(min(per), rel=1e-6)


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), min_size=2, max_size=5).filter(lambda r: len(set(r)) > 1), st.integers(0, 200))
def test_what_is_unrolled_is_bounded_by_devices_and_micro_batches(replicas: list[int], more: int) -> None:
    """Whatever the least common multiple of the replicas is."""
    m = max(replicas) + more
    zeros = (1.0,) * len(replicas)
    plan = taking_turns(tuple(replicas), zeros, zeros, zeros, m).plan
    assert plan.microbatches * windows(plan) <= 20 * sum(replicas) + 7 * m
    assert len(full(plan)) * m >= min(6 * math.lcm(*replicas), sum(replicas))
