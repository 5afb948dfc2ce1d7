"""The proof knows who waits for whom as both interpreters do, and two rules for the order of messages."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import pytest

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders import schedules
from planner.orders.action import parse
from planner.orders.edges import Edges, chain
from planner.orders.schedules import Shape
from planner.programs.lowering import lower
from planner.programs.messages import messages
from planner.programs.program import Program
from planner.programs.proof import prove, stuck
from planner.programs.waits import Linked
from planner.simulate.contention import interpret
from planner.simulate.longest_path import walk
from planner.values.plan import Plan, Stage
from planner.values.plan_file import read, to_toml
from tests.factory import devices, profile

K, M, V = 8, 16, 3


def program(text: str, edges: Edges | None = None) -> Program:
    return Program.of([[parse(cell) for cell in line.split()] for line in text.strip().splitlines()], edges)


@pytest.mark.parametrize("name", schedules.names())
def test_every_schedule_passes_both_orders_of_messages(name: str) -> None:
    """All shapes up to K = 8, M = 16, v = 3. With receives posted early wherever a pair allows, as it used to be,
    interleaved, looped-bfs and zb-interleaved hang from K = 3 on where a device's messages are done in turn."""
    chosen = schedules.get(name)
    least, most = chosen.chunks
    seen = 0
    for k in range(1, K + 1):
        for m in range(1, M + 1):
            for v in range(least, min(most or V, V) + 1):
                shape = Shape(k, m, v)
                if schedules.why_not(chosen, shape) is None:
                    edges = chain(shape.stages)
                    linked = Linked(Program(messages(chosen.order(shape), edges), edges))
                    assert stuck(linked, "per device") < 0, shape
                    assert stuck(linked, "per pair") < 0, shape
                    seen += 1
    assert seen > 20


def test_messages_in_turn_are_stricter_than_pairs() -> None:
    """Three devices that each post a receive before the send that the next one waits for: fine for pairs, not in turn.

    Every device computes two stages; round the ring each takes the other's first stage.
    """
    ring = program(
        """
        0F0 5RECV_F0 0SEND_F0
        2F0 1RECV_F0 2SEND_F0
        4F0 3RECV_F0 4SEND_F0
        """
    )
    linked = Linked(ring)
    assert stuck(linked, "per pair") < 0
    assert stuck(linked, "per device") >= 0


def test_opposite_gathers_are_refused() -> None:
    """Two devices hold two stages and gather them in opposite orders, each waiting for the other: nothing ever ends.

    The interpreters do not answer 0 s either.
    """
    crossed = program(
        """
        0UNSHARD_F0 0F0 1UNSHARD_F0 1F0 1B0 0B0
        1UNSHARD_F1 1F1 0UNSHARD_F1 0F1 1B1 0B1
        """,
        Edges((), 2),
    )
    with pytest.raises(PlanError) as raised:
        prove(crossed, 2)
    assert "waits for ever" in raised.value.why
    assert ">0F0<" in raised.value.where
    stages = tuple(Stage(layers=(f"layer{s}",), devices=("d0", "d1")) for s in range(2))
    plan = Plan(strategy="x", schedule="looped-bfs", stages=stages, microbatches=2, batch=2, chunks=2)
    placed = Placed(profile([1.0, 1.0]), plan, devices(2))
    costs = costs_of(placed, Linked(crossed))
    for interpreter in (walk, partial(interpret, devices=("d0", "d1"))):
        with pytest.raises(PlanError, match="waits for ever") as raised:
            interpreter(costs)
        assert ">0F0<" in raised.value.where


def test_a_holder_that_does_not_reduce_is_refused() -> None:
    alone = program(
        """
        0F0 0B0 0REDUCE_GRAD 0OPTIMIZER
        0F1 0B1 0OPTIMIZER
        """
    )
    with pytest.raises(PlanError) as raised:
        prove(alone, 2)
    assert "a holder does not join" in raised.value.why
    assert ">0REDUCE_GRAD<" in raised.value.where


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "naive"])
def test_a_replica_without_a_micro_batch_is_refused_as_a_plan(schedule: str, tmp_path: Path) -> None:
    """Of three replicas that take two micro-batches in turn one has none, and no gradient to reduce.

    Without a flush the third one takes the next step's first.
    """
    stages = (Stage(layers=("a",), devices=("d0", "d1", "d2")), Stage(layers=("b",), devices=("d3",)))
    plan = Plan(strategy="x", schedule=schedule, stages=stages, microbatches=2, batch=2)
    with pytest.raises(PlanError, match="a stage has 3 replicas, and only 2 of them would get a micro-batch") as raised:
        lower(plan)
    assert raised.value.code == 2
    (tmp_path / "plan.toml").write_text(to_toml(plan))
    with pytest.raises(PlanError, match="only 2 of them would get a micro-batch"):
        read(tmp_path / "plan.toml")
    lower(msgspec.structs.replace(plan, microbatches=3, batch=3))
    lower(msgspec.structs.replace(plan, schedule="pipedream"))


def test_a_long_program_is_not_printed_whole() -> None:
    rows = [[parse(f"0F{m}") for m in range(5000)] + [parse("0F7")]]
    with pytest.raises(PlanError) as raised:
        prove(Program.of(rows), 5000, backward=False)
    assert ">0F7<" in raised.value.where
    assert len(raised.value.where) < 300
