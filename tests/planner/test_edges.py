"""Programs whose stages are no chain: who sends what to whom is said by edges, and nothing else knows."""

from __future__ import annotations

import numpy as np
import pytest

from planner.basis.errors import PlanError
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.orders.action import Action, parse
from planner.orders.codes import STAGES, join, run
from planner.orders.edges import Edge, Edges, chain
from planner.programs.messages import messages
from planner.programs.program import Program
from planner.programs.proof import prove
from planner.programs.waits import completions, taken
from planner.simulate.contention import interpret
from planner.simulate.longest_path import walk
from tests.factory import devices, pipeline, profile

GRAPH = Edges((Edge(0, 1), Edge(1, 2), Edge(0, 2), Edge(3, 2, gradient=False)), 4)
"""Stage 0 feeds stages 1 and 2, the second along an edge over stage 1; stage 3 is a teacher that feeds stage 2."""


def graph_program(microbatches: int = 2) -> Program:
    """Forwards, then backwards, of the graph with a device per stage; the teacher has forwards only."""
    order = [join(run("F", s, microbatches), run("B", s, microbatches)) for s in range(3)]
    return Program(messages((*order, run("F", 3, microbatches)), GRAPH), GRAPH)


def graph_costs(teacher_s: float, latency_s: float = 0.5) -> tuple[Placed, Costs]:
    """The graph's costs: forwards of 1 s (the teacher's own), backwards of 2 s, messages that take their latency."""
    plan, _ = pipeline("forward-only", 4, 2)
    costs = profile([1.0, 1.0, 1.0, teacher_s], [2.0] * 4, message_bytes=100)
    placed = Placed(costs, plan, devices(4, latency_s=latency_s, bandwidth=1e300))
    return placed, costs_of(placed, prove(graph_program(), 2))


def test_an_action_says_which_edge_it_takes() -> None:
    """A port is printed where it is not 0: of stage 0's two consumers, and of stage 2's three producers."""
    rows = [" ".join(map(str, row)) for row in graph_program(1).rows]
    assert rows == [
        "0F0 0SEND_F0 0SEND_F0.1 0RECV_B0.1 0RECV_B0 0B0",
        "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0",
        "2RECV_F0.1 2RECV_F0.2 2RECV_F0 2F0 2B0 2SEND_B0 2SEND_B0.1",
        "3F0 3SEND_F0",
    ]
    assert all(str(parse(str(action))) == str(action) for row in graph_program().rows for action in row)


@pytest.mark.parametrize(("teacher_s", "step_s"), [(1.0, 14.0), (4.0, 18.5)])
def test_times_of_a_graph(teacher_s: float, step_s: float) -> None:
    """Worked out by hand, with c = 0.5 s per message.

    Teacher of 1 s: F of stage 0 ends at 1 and 2, of stage 1 at 2.5 and 3.5. Stage 2 has its three inputs at
    max(1 + c, 2.5 + c, 1 + c) = 3 and at 4; its B end at 7 and 9; those of stage 1, from 7 + c on, at 9.5 and 11.5.
    Stage 0 waits for both gradients, max(7 + c, 9.5 + c) = 10, and ends at 12 and, from 11.5 + c on, 14.
    Teacher of 4 s, done at 4 and 8: stage 2 begins at 4.5 and 8.5, its B end at 11.5 and 13.5, stage 1's at 14 and 16,
    stage 0's at 16.5 and 18.5.
    """
    _, costs = graph_costs(teacher_s)
    assert walk(costs).step_s == step_s
    trace = interpret(costs, ("d0", "d1", "d2", "d3"))
    assert trace.end == step_s
    ends = {event.action: event.end for event in trace.events if event.lane == "compute"}
    for action, end in zip(costs.linked.actions, walk(costs).end.tolist(), strict=True):
        assert ends[str(action)] == end
    arrived = [event.action for event in trace.events if event.lane == "link"]
    assert sorted(arrived) == sorted(str(a) for row in graph_program().rows for a in row if a.op.startswith("RECV"))


def test_memory_of_a_graph_is_given_back() -> None:
    """Of stage 2 three inputs of 100 bytes are held per micro-batch; what is not sent for certain is two gradients."""
    placed, costs = graph_costs(1.0)
    model = MemoryModel(placed, costs.linked)
    assert model.sizes.tolist() == [100.0] * 7 + [0.0]  # no gradient for the teacher
    assert [float(n) for n in model.inputs] == [0.0, 100.0, 300.0, 0.0]
    assert [float(n) for n in model.output_gradients] == [200.0, 100.0, 0.0, 0.0]


def test_what_an_action_waits_for_is_known_for_every_edge() -> None:
    program = graph_program()
    waits = taken(program)
    assert set(waits[Action(2, "F", 1)]) == {Action(2, "RECV_F", 1, port) for port in range(3)}
    assert set(waits[Action(0, "B", 0)]) == {Action(0, "RECV_B", 0, port) for port in range(2)}
    done = {send for sends in completions(program).values() for send in sends}
    assert {Action(0, "SEND_F", 0), Action(0, "SEND_F", 0, 1), Action(1, "SEND_F", 0)} <= done
    assert not any(send.stage == 3 for send in done), "nothing answers a teacher"


def test_an_edge_can_name_its_values() -> None:
    """Without names all that crosses into the consumer is relayed; with names those values alone go along."""
    plan, _ = pipeline("gpipe", 4, 2)
    placed = Placed(profile([1.0] * 4, message_bytes=100), plan, devices(4))
    assert placed.edge_bytes(Edge(0, 3, values=("v0", "v1")), gradients=False) == 200.0
    assert placed.edge_bytes(Edge(0, 3), gradients=False) == 100.0


@pytest.mark.parametrize(
    ("edges", "why"),
    [
        ((Edge(0, 2),), "not one of 2"),
        ((Edge(0, 1), Edge(0, 1)), "one edge only"),
    ],
)
def test_edges_are_checked(edges: tuple[Edge, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Edges(edges, 2)


def test_a_message_without_edge_is_refused() -> None:
    program = Program.of([[parse("0F0"), parse("0SEND_F0.1"), parse("0B0")], [parse("1F0"), parse("1B0")]], chain(2))
    with pytest.raises(PlanError, match="not a valid step") as raised:
        prove(program, 1)
    assert ">0SEND_F0.1<" in raised.value.where


def test_what_goes_over_an_edge_must_be_sent() -> None:
    """Also the weaker cases: two stages on one device in the wrong order, and a message that nobody sends."""
    text = ["0F0 0B0", "1F0 1B0"]
    rows = [[parse(cell) for cell in line.split()] for line in text]
    with pytest.raises(PlanError) as raised:
        prove(Program.of(rows), 1)
    assert "1F0 has nothing from 0F0" in raised.value.why
    with pytest.raises(PlanError) as raised:
        prove(Program.of([rows[1][:1] + rows[0][:1] + rows[1][1:] + rows[0][1:]]), 1)
    assert "1F0 has nothing from 0F0" in raised.value.why


def test_a_chain_has_an_edge_to_every_next_stage() -> None:
    table = chain(STAGES + 1).table
    assert (np.diff(table.producer) == 1).all()
    assert (table.consumer - table.producer == 1).all()
