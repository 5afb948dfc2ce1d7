"""The fast evaluation against the interpreters it stands for, and long steps against their full walk."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders import schedules
from planner.orders.schedules import Shape
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.evaluate import evaluate
from planner.simulate.extrapolate import extrapolate
from planner.simulate.longest_path import walk
from planner.simulate.predict import simulate
from planner.values.plan import Plan
from planner.values.profile import Profile
from tests.factory import devices, pipeline, profile, shapes

COST = st.one_of(st.integers(1, 9).map(float), st.floats(0.1, 9.0))


def walked(costs_profile: Profile, plan: Plan, latency_s: float, linked: Linked) -> tuple[float, Any]:
    cluster = devices(linked.devices, latency_s=latency_s, bandwidth=1e3)
    costs = costs_of(Placed(costs_profile, plan, cluster), linked)
    return walk(costs).step_s, MemoryModel(Placed(costs_profile, plan, cluster), linked).peaks()


def long(name: str, shape: Shape, microbatches: int, *, replicas: int, **fields: Any) -> tuple[Plan, Linked]:
    """As `tests.factory.pipeline`, without the proof, which takes longer than the test."""
    few = shape.stages * 2 * replicas
    plan, _ = pipeline(name, shape.devices, few, chunks=shape.chunks, replicas=replicas, **fields)
    plan = msgspec.structs.replace(plan, microbatches=microbatches, batch=microbatches)
    return plan, Linked(unroll(plan))


@given(shapes(), st.integers(0, 3), st.data())
def test_evaluation_is_the_simulation(drawn: tuple[str, Shape], latency: int, data: st.DataObject) -> None:
    """Of synchronous and asynchronous schedules, with the program at hand or not."""
    name, shape = drawn
    forward, backward = (data.draw(st.lists(COST, min_size=shape.stages, max_size=shape.stages)) for _ in range(2))
    costs_profile = profile(forward, backward, message_bytes=100)
    plan, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    cluster = devices(shape.devices, latency_s=float(latency), bandwidth=1e3)
    outcome = simulate(costs_profile, plan, cluster)
    for found in (
        evaluate(Placed(costs_profile, plan, cluster)),
        evaluate(Placed(costs_profile, plan, cluster), Linked(program)),
    ):
        assert found.step_s == pytest.approx(outcome.step_s, rel=1e-12)
        assert found.peak_bytes == pytest.approx([point.total for point in outcome.peak], rel=1e-12)


@given(
    shapes(3, 3, only=lambda s: s.updates in ("step", "never")),
    st.integers(0, 3),
    st.sampled_from(["", "recompute", "all-reduce", "zero-1", "zero-2", "zero-3"]),
    st.data(),
)
def test_a_long_step_is_continued_as_it_is_walked(
    drawn: tuple[str, Shape], latency: int, more: str, data: st.DataObject
) -> None:
    """Where `extrapolate` answers, it is the full walk's seconds and bytes."""
    name, shape = drawn
    forward, backward = (data.draw(st.lists(COST, min_size=shape.stages, max_size=shape.stages)) for _ in range(2))
    costs_profile = profile(forward, backward, message_bytes=100)
    share = 2 * shape.devices * data.draw(st.integers(100, 130))
    replicas = 2 if more not in ("", "recompute") and schedules.get(name).trains else 1
    fields: dict[str, Any] = {"synchronisation": more} if replicas > 1 else {"recompute": more == "recompute"}
    plan, linked = long(name, shape, share * replicas, replicas=replicas, **fields)
    cluster = devices(linked.devices, latency_s=float(latency), bandwidth=1e3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("planner.simulate.extrapolate.WORTH_IT", 4)
        found = extrapolate(Placed(costs_profile, plan, cluster))
    if found is not None:
        step_s, peaks = walked(costs_profile, plan, float(latency), linked)
        assert found[0] == pytest.approx(step_s, rel=1e-9)
        assert found[1] == pytest.approx(peaks, rel=1e-9)
