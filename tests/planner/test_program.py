"""Programs: text, CSV, proofs, torch's lowering as the oracle of ours."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import schedules
from planner.errors import PlanError
from planner.lowering import communicate
from planner.program import OPS, SENDS, Action, Program, parse, prove
from tests.factory import pipeline

GOLDEN = Path(__file__).parent.parent / "golden"
ACTIONS = st.builds(Action, st.integers(0, 999), st.sampled_from(OPS), st.none() | st.integers(0, 9999))


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


@given(st.sampled_from(schedules.names()), st.integers(1, 6), st.integers(1, 12))
def test_csv_round_trip(name: str, p: int, m: int) -> None:
    _, program = pipeline(name, p, m)
    assert Program.from_csv(program.to_csv()) == program


@pytest.mark.parametrize("name", schedules.names())
def test_golden(name: str) -> None:
    """The lowered program of every schedule, as a file: a change of it must be meant."""
    _, program = pipeline(name, 4, 8)
    assert program.to_csv() == (GOLDEN / f"{name}-k4-m8.csv").read_text()


@given(st.sampled_from(schedules.names()), st.integers(1, 6), st.integers(1, 10))
def test_lowering_equals_torch_up_to_reordering(name: str, p: int, m: int) -> None:
    from executor.torch_adapter import torch_lowering

    order = schedules.get(name)(p, m)
    mine = [[str(action) for action in row] for row in communicate(order, p)]
    theirs = torch_lowering(order, p)
    assert [sorted(row) for row in mine] == [sorted(row) for row in theirs]


@given(st.sampled_from(schedules.names()), st.integers(2, 6), st.integers(1, 10))
def test_both_ends_see_the_messages_of_a_pair_in_one_order(name: str, p: int, m: int) -> None:
    """What NCCL demands: sends and receives of two devices, both directions, in the same order on both."""
    _, program = pipeline(name, p, m)
    for d in range(p - 1):
        ends = [
            [
                program.messages[a].send
                for a in program.rows[here]
                if a in program.messages and {program.messages[a].source, program.messages[a].target} == {d, d + 1}
            ]
            for here in (d, d + 1)
        ]
        assert ends[0] == ends[1]


@given(st.sampled_from(schedules.names()), st.integers(2, 6), st.integers(1, 10))
def test_completions_are_implied_by_dependencies(name: str, p: int, m: int) -> None:
    """A send counts as complete at an action only if every way there leads past the action that took it."""
    _, program = pipeline(name, p, m)
    graph = nx.DiGraph()
    for row in program.rows:
        nx.add_path(graph, row)
    for message in program.messages.values():
        taker = Action(message.receive.stage, message.receive.op[-1], message.receive.microbatch)
        graph.add_edge(message.send, taker)
    for action, done in program.completions.items():
        for send in done:
            receive = program.messages[send].receive
            taker = Action(receive.stage, receive.op[-1], receive.microbatch)
            assert nx.has_path(graph, taker, action)
    known = {send for done in program.completions.values() for send in done}
    forward = {a for a in program.where if a.op == "SEND_F"}
    assert forward <= known, "a sent activation is always acknowledged by its gradient"


def _broken(text: str) -> Program:
    return Program(tuple(tuple(parse(cell) for cell in line.split()) for line in text.strip().splitlines()))


@pytest.mark.parametrize(
    ("text", "stages", "marked", "why"),
    [
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1B0 1F0 1SEND_B0", 2, ">1F0<", "must follow"),
        ("0F0 0SEND_F0 0RECV_B0 0B0\n1RECV_F0 1F0 1B0", 2, ">0RECV_B0<", "has no 1SEND_B0"),
        ("0F0 0F0 0B0", 1, ">0F0<", "occurs twice"),
        ("0F0", 1, "0F0", "missing"),
        ("0F0 0RECV_B0 0B0 0SEND_F0\n1RECV_F0 1F0 1B0 1SEND_B0", 2, ">0B0<", "waits for ever"),
    ],
)
def test_proof_marks_the_bad_cell(text: str, stages: int, marked: str, why: str) -> None:
    with pytest.raises(PlanError) as raised:
        prove(_broken(text), stages, 1)
    assert marked in raised.value.where
    assert why in raised.value.why


def test_proof_wants_messages_in_order() -> None:
    text = """
        0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
        1RECV_F1 1RECV_F0 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1
    """
    with pytest.raises(PlanError, match="not a valid step") as raised:
        prove(_broken(text), 2, 2)
    assert "is sent where" in raised.value.why


def test_every_send_has_its_receive() -> None:
    assert set(SENDS.values()) <= set(OPS)
