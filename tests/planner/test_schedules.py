"""The schedules against published closed forms (GPipe: arXiv 1811.06965; 1F1B: arXiv 2006.09503)."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.orders import schedules
from planner.orders.operations import BACKWARD, FORWARD
from planner.orders.schedules import Shape
from planner.programs.lowering import lower
from planner.simulate.predict import simulate
from planner.values.plan import windows
from planner.values.trace import COMPUTE, Trace
from tests.factory import devices, pipeline, profile, shapes

P = st.integers(1, 8)
M = st.integers(1, 64)
COST = st.integers(1, 9).map(float)


@given(P, M, COST, COST)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_makespan_of_equal_stages_is_exact(name: str, p: int, m: int, f: float, b: float) -> None:
    plan, _ = pipeline(name, p, m)
    outcome = simulate(profile([f] * p, [b] * p), plan, devices(p))
    assert outcome.step_s == (m + p - 1) * (f + b)
    assert outcome.bubble == pytest.approx(float(Fraction(p - 1, m + p - 1)), abs=1e-12)
    assert outcome.trace.span_bubble_s == (p - 1) * (f + b)


@given(P, M, COST, COST)
def test_naive_runs_one_device_at_a_time(p: int, m: int, f: float, b: float) -> None:
    plan, _ = pipeline("naive", p, m)
    outcome = simulate(profile([f] * p, [b] * p), plan, devices(p))
    assert outcome.step_s == m * p * (f + b)
    assert outcome.bubble == pytest.approx(1 - 1 / p)


def in_flight(trace: Trace) -> tuple[int, ...]:
    """Most micro-batches that each device holds at once, from forward's start to backward's end."""
    changes: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for event in trace.events:
        if event.lane == COMPUTE and event.op in (FORWARD, BACKWARD):
            changes[event.device].append((event.ready, 1) if event.op == FORWARD else (event.end, -1))
    peaks = []
    for device in range(len(trace.devices)):
        level = peak = 0
        for _, change in sorted(changes[device]):
            level += change
            peak = max(peak, level)
        peaks.append(peak)
    return tuple(peaks)


@given(P, M)
def test_in_flight_activations(p: int, m: int) -> None:
    costs = profile([1.0] * p)
    held = {
        name: in_flight(simulate(costs, pipeline(name, p, m)[0], devices(p)).trace)
        for name in ("gpipe", "1f1b", "naive")
    }
    assert held["gpipe"] == (m,) * p
    assert held["1f1b"] == tuple(min(m, p - i) for i in range(p))
    assert held["naive"] == (1,) * p


@given(st.lists(COST, min_size=1, max_size=8), st.integers(1, 16), st.data())
def test_uneven_gpipe_is_exact(forward: list[float], m: int, data: st.DataObject) -> None:
    p = len(forward)
    backward = data.draw(st.lists(COST, min_size=p, max_size=p))
    plan, _ = pipeline("gpipe", p, m)
    step = simulate(profile(forward, backward), plan, devices(p)).step_s
    assert step == sum(forward) + (m - 1) * max(forward) + sum(backward) + (m - 1) * max(backward)


@given(P, st.integers(1, 24), st.sampled_from([0.5, 1.0, 2.0]))
def test_gpipe_with_latency(p: int, m: int, c: float) -> None:
    """Two times p - 1 hops are exposed, once forward and once back, if a hop hides behind one compute."""
    plan, _ = pipeline("gpipe", p, m)
    costs = profile([2.0] * p, [3.0] * p, message_bytes=1)
    step = simulate(costs, plan, devices(p, latency_s=c, bandwidth=1e300)).step_s
    assert step == (m + p - 1) * 5.0 + 2 * (p - 1) * c


@pytest.mark.parametrize(("p", "m", "expected"), [(4, 8, 33.0), (8, 32, 117.0)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_sample_numbers(name: str, p: int, m: int, expected: float) -> None:
    """F = B = W = 1: a full backward takes 2."""
    plan, _ = pipeline(name, p, m)
    assert simulate(profile([1.0] * p, [2.0] * p), plan, devices(p)).step_s == expected


@given(shapes(8, 24), st.booleans())
def test_every_schedule_computes_every_microbatch_once(drawn: tuple[str, Shape], recompute: bool) -> None:
    """`lower` proves the program; here only that nothing is left out or done twice."""
    name, shape = drawn
    plan, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks, recompute=recompute)
    wanted = {(s, m) for s in range(shape.stages) for m in range(shape.microbatches * windows(plan))}
    for ops in (("F",), ("B", "I"), ("B", "W")):
        computed = [a for row in program.rows for a in row if a.op in ops]
        if "F" in ops or schedules.get(name).trains:
            assert len(computed) == len(wanted)
            assert {(a.stage, a.microbatch) for a in computed} == wanted


@given(P, M)
def test_recompute_costs_one_more_forward(p: int, m: int) -> None:
    plan, _ = pipeline("gpipe", p, m, recompute=True)
    assert simulate(profile([1.0] * p, [2.0] * p), plan, devices(p)).step_s == (m + p - 1) * 4.0


def test_data_parallel_splits_the_microbatches() -> None:
    from planner.placement.question import Question
    from planner.placement.strategies import get

    plan = get("data-parallel").spread(Question(profile([1.0] * 3), devices(4), 4, 8, 8))
    program = lower(plan)
    assert [[str(a) for a in row if a.op == FORWARD] for row in program.rows] == [
        ["0F0", "0F1"],
        ["0F2", "0F3"],
        ["0F4", "0F5"],
        ["0F6", "0F7"],
    ]
    assert simulate(profile([1.0] * 3), plan, devices(4)).step_s == pytest.approx(2 * 6.0, abs=1e-6)
