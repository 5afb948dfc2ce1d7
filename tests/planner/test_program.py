"""Programs: text, CSV, proofs, torch's lowering as the oracle of ours."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.basis import compiled
from planner.basis.errors import PlanError
from planner.orders import schedules
from planner.orders.action import Action, actions, parse
from planner.orders.codes import PORTS
from planner.orders.edges import chain
from planner.orders.operations import OPS
from planner.orders.schedules import Shape
from planner.programs.lowering import unroll
from planner.programs.messages import communicate
from planner.programs.program import SENDS, Program
from planner.programs.proof import prove
from planner.programs.waits import Linked, completions
from tests.factory import needs, pipeline, shapes

GOLDEN = Path(__file__).parent.parent / "golden"
ACTIONS = st.builds(
    Action, st.integers(0, 999), st.sampled_from(OPS), st.none() | st.integers(0, 9999), st.integers(0, PORTS)
)


@given(ACTIONS)
def test_text_and_parse_are_inverse(action: Action) -> None:
    assert parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "1X2", "1F0 ", "2F0x"])
def test_parse_rejects_what_is_no_action(text: str) -> None:
    if text.strip() != text:
        assert parse(text) == parse(text.strip())
        return
    with pytest.raises(ValueError, match="is not an action"):
        parse(text)


@given(shapes())
def test_csv_round_trip(drawn: tuple[str, Shape]) -> None:
    name, shape = drawn
    _, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    assert Program.from_csv(program.to_csv()) == program


@pytest.mark.parametrize("name", schedules.names())
def test_golden(name: str) -> None:
    """The lowered program of every schedule, as a file: a change of it must be meant."""
    chosen = schedules.get(name)
    chunks = 2 if chosen.placement == "looped" else chosen.chunks[0]
    _, program = pipeline(name, 4, 8, chunks=chunks)
    assert program.to_csv() == (GOLDEN / f"{name}-k4-m8.csv").read_text()


@pytest.mark.parametrize("name", schedules.names())
def test_programs_and_links_are_the_same_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba must find no index that Python would count from the end, and the same numbers."""
    chosen = schedules.get(name)
    plan, _ = pipeline(name, 4, 8, chunks=2 if chosen.placement == "looped" else chosen.chunks[0])
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0)
    fast = Linked(unroll(plan))
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 1 << 60)
    with monkeypatch.context() as context:
        context.delitem(sys.modules, "numba", raising=False)
        slow = Linked(unroll(plan))
    for field in ("flat", "posts", "waits", "needs", "parties", "source", "target"):
        assert np.array_equal(getattr(slow, field), getattr(fast, field)), field


@given(shapes(only=lambda schedule: schedule.copies == 1 and not schedule.splits))
def test_lowering_equals_torch_up_to_reordering(drawn: tuple[str, Shape]) -> None:
    from tests.torch_schedules import torch_lowering

    name, shape = drawn
    order = schedules.arrange(name, shape)
    mine = [[str(action) for action in actions(row)] for row in communicate(order, chain(shape.stages))]
    theirs = torch_lowering(order, shape.stages)
    assert [sorted(row) for row in mine] == [sorted(row) for row in theirs]


@given(shapes())
def test_both_ends_see_the_messages_of_a_pair_in_one_order(drawn: tuple[str, Shape]) -> None:
    """What NCCL demands: sends and receives of two devices, both directions, in the same order on both."""
    name, shape = drawn
    _, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    for pair in combinations(range(shape.devices), 2):
        ends = [
            [
                program.messages[a].send
                for a in program.rows[here]
                if a in program.messages and {program.messages[a].source, program.messages[a].target} == set(pair)
            ]
            for here in pair
        ]
        assert ends[0] == ends[1]


@given(shapes())
def test_completions_are_implied_by_dependencies(drawn: tuple[str, Shape]) -> None:
    """A send counts as complete at an action only if every way there leads past the action that took it."""
    name, shape = drawn
    _, program = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    graph = nx.DiGraph()
    for row in program.rows:
        nx.add_path(graph, row)
    takers = {needs(action): action for row in reversed(program.rows) for action in reversed(row) if needs(action)}
    for message in program.messages.values():
        graph.add_edge(message.send, takers[message.receive])
    known = completions(program)
    for action, done in known.items():
        for send in done:
            assert nx.has_path(graph, takers[program.messages[send].receive], action)
    if schedules.get(name).trains and schedules.get(name).placement == "straight":
        forward = {a for a in program.where if a.op == "SEND_F"}
        assert forward <= {send for done in known.values() for send in done}, "its gradient acknowledges an activation"


def _broken(text: str) -> Program:
    return Program.of([[parse(cell) for cell in line.split()] for line in text.strip().splitlines()])


@pytest.mark.parametrize(
    ("text", "marked", "why"),
    [
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1B0 1F0 1SEND_B0", ">1F0<", "must follow"),
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0", ">0RECV_B0<", "has no 1SEND_B0"),
        ("0F0 0F0 0B0", ">0F0<", "occurs twice"),
        ("0F0", "0F0", "missing"),
        ("0F0 0RECV_B0 0B0 0SEND_F0\n1RECV_F0 1F0 1B0 1SEND_B0", ">0B0<", "waits for ever"),
    ],
)
def test_proof_marks_the_bad_cell(text: str, marked: str, why: str) -> None:
    with pytest.raises(PlanError) as raised:
        prove(_broken(text), 1)
    assert marked in raised.value.where
    assert why in raised.value.why


def test_proof_wants_messages_in_order() -> None:
    text = """
        0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
        1RECV_F1 1RECV_F0 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1
    """
    with pytest.raises(PlanError, match="not a valid step") as raised:
        prove(_broken(text), 2)
    assert "is sent where" in raised.value.why


def test_every_send_has_its_receive() -> None:
    assert set(SENDS.values()) <= set(OPS)
