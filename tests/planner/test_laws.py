"""Laws of programs, over every schedule, synchronisation and saving. Those of memory are in `test_memory_laws`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders import schedules, synchronisation
from planner.orders.schedules import Shape
from planner.programs.lowering import lower
from planner.programs.waits import Linked
from planner.simulate.contention import interpret
from planner.simulate.longest_path import walk
from planner.values.plan import Plan, asynchronous, norm_without_flush
from tests.factory import devices, pipeline, profile, shapes

SAVINGS: tuple[dict[str, Any], ...] = ({}, {"recompute": True}, {"offload": True})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A plan of one or two replicas under any schedule, synchronisation and saving that go together."""
    name, shape = draw(shapes(4, 6))
    replicas, way = draw(st.sampled_from([1, 2])), draw(st.sampled_from(synchronisation.names()))
    chosen = synchronisation.get(way)
    assume(not chosen.server or replicas > 1)
    assume(not (schedules.get(name).asynchronous and chosen.server))
    fields: dict[str, Any] = dict(draw(st.sampled_from(SAVINGS)))
    fields["norm"] = draw(st.booleans())
    if chosen.server:
        fields["servers"] = ("h",) if chosen.server == "host" else ("d0",)
    try:
        plan, _ = pipeline(
            name, shape.devices, replicas * shape.microbatches, chunks=shape.chunks, replicas=replicas,
            synchronisation=way, **fields,
        )  # fmt: skip
    except (ValueError, PlanError):
        assume(False)
        raise
    assume(norm_without_flush(plan) is None)
    return plan


@given(plans())
def test_what_is_sent_is_received(plan: Plan) -> None:
    """Every message has one send and one receive, of one edge and micro-batch, on two devices."""
    program = lower(plan)
    linked = Linked(program)
    assert set(linked.parties[: linked.messages].tolist()) <= {0, 2}
    for action, message in program.messages.items():
        assert message.source != message.target
        assert message.send.microbatch == message.receive.microbatch == action.microbatch


@given(plans())
def test_gradients_are_reduced_once_per_update(plan: Plan) -> None:
    """Of a stage with several holders each reduces between two updates: once, or once per backward where it shards.

    What is reduced beside computing is that of one backward, and used up by the update of the same micro-batch.
    """
    way = synchronisation.get(plan.synchronisation)
    assume(schedules.get(plan.schedule).trains and not way.server)
    program = lower(plan)
    for stage, holders in enumerate(plan.holders):
        for row in holders:
            backwards = reduced = 0
            own = [a for a in program.rows[row] if a.stage == stage]
            beside = [a.microbatch for a in own if a.op == "REDUCE_ASYNC"]
            if beside:
                assert beside == [a.microbatch for a in own if a.op in ("B", "W")]
                assert beside == [a.microbatch for a in own if a.op == "OPTIMIZER"]
                posts, updates = ([i for i, a in enumerate(own) if a.op == op] for op in ("REDUCE_ASYNC", "OPTIMIZER"))
                assert len(holders) > 1
                assert all(post < update for post, update in zip(posts, updates, strict=True))
                continue
            for action in program.rows[row]:
                if action.stage != stage:
                    continue
                backwards += action.op in ("B", "W")
                reduced += action.op == "REDUCE_GRAD"
                if action.op == "OPTIMIZER":
                    per_backward = "gradients" in way.shards
                    assert reduced == (0 if len(holders) == 1 else backwards if per_backward else 1)
                    backwards = reduced = 0


@given(shapes(4, 6))
def test_computing_does_not_depend_on_the_schedule(drawn: tuple[str, Shape]) -> None:
    """Every micro-batch goes once through every stage, forward and, whole or in halves, backward."""
    name, shape = drawn
    plan, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    count = Counter((a.stage, a.op) for row in program.rows for a in row)
    per_stage = {count[s, "F"] for s in range(shape.stages)}
    assert len(per_stage) == 1
    assert asynchronous(plan) or per_stage == {shape.microbatches}
    if schedules.get(name).trains:
        for s in range(shape.stages):
            assert count[s, "B"] + count[s, "I"] == count[s, "B"] + count[s, "W"] == count[s, "F"]


@given(plans())
def test_what_is_proved_ends(plan: Plan) -> None:
    """Nothing passes the proof and hangs: both interpreters come to the end of every row."""
    rows = len(plan.groups)
    cluster = devices(rows, latency_s=0.5, bandwidth=1e3, host_bandwidth=1e3)
    placed = Placed(profile([1.0] * len(plan.stages), message_bytes=10), plan, cluster)
    costs = costs_of(placed, Linked(lower(plan)))
    assert walk(costs).step_s > 0
    assert interpret(costs, plan.devices).end > 0
