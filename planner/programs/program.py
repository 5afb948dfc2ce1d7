"""A program: for every device, the ordered actions it performs. Printable, saved as CSV, proved before it is run.

Both interpreters walk it: the simulator with costs, the executor with tensors. It knows neither.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from planner.basis.errors import PlanError
from planner.orders import codes
from planner.orders.action import Action, Row, actions, grid, order, parse
from planner.orders.codes import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FETCH,
    FORWARD,
    OFFLOAD,
    RECOMPUTE,
    RECV_BACKWARD,
    RECV_FORWARD,
    REDUCE_GRAD,
    REDUCE_TIED,
    RELEASE,
    SEND_BACKWARD,
    SEND_FORWARD,
    UNSHARD_BACKWARD,
    UNSHARD_FORWARD,
    Order,
)

SENDS = {SEND_FORWARD: RECV_FORWARD, SEND_BACKWARD: RECV_BACKWARD}
RECEIVES = {receive: send for send, receive in SENDS.items()}
TAKERS = (FORWARD, BACKWARD, BACKWARD_INPUT, RECOMPUTE)
"""Computes that take something from outside their device."""


class Message(NamedTuple):
    """One transfer: which device sends it with which action, and which device receives it with which action."""

    source: int
    send: Action
    target: int
    receive: Action


class Program:
    """The rows of all devices. Equal when their rows are equal; immutable."""

    def __init__(self, order: Order) -> None:
        self.order = order

    @classmethod
    def of(cls, rows: Iterable[Sequence[Action]]) -> Program:
        """Make a program of rows of actions."""
        return cls(order(rows))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.rows == other.rows

    def __hash__(self) -> int:
        return hash(self.rows)

    def __str__(self) -> str:
        return grid(self.order)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as actions."""
        return tuple(actions(row) for row in self.order)

    @cached_property
    def where(self) -> dict[Action, int]:
        """Device of every action that has a micro-batch: such an action occurs once in the whole program."""
        return {action: d for d, row in enumerate(self.rows) for action in row if action.microbatch is not None}

    @cached_property
    def messages(self) -> dict[Action, Message]:
        """Every transfer, by its send and by its receive."""
        found: dict[Action, Message] = {}
        for send, source in self.where.items():
            if send.op in SENDS:
                receive = counterpart(send)
                message = Message(source, send, self.where.get(receive, -1), receive)
                found[send] = found[receive] = message
        return found

    @cached_property
    def holders(self) -> dict[int, tuple[int, ...]]:
        """Devices that hold each stage, in order: those that reduce its gradients together."""
        flat, offsets = codes.flatten(self.order)
        found: dict[int, list[int]] = defaultdict(list)
        for d, stage in np.argwhere(codes.held(flat, offsets, codes.extent(flat).stages)).tolist():
            found[stage].append(d)
        return {stage: tuple(devices) for stage, devices in sorted(found.items())}

    def to_csv(self) -> str:
        """Return one line per device."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([[str(a) for a in row] for row in self.rows])
        return buffer.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Program:
        """Read what `to_csv` writes."""
        return cls.of([[parse(cell) for cell in line] for line in csv.reader(io.StringIO(text))])


def counterpart(action: Action) -> Action:
    """Return the receive of a send or the send of a receive.

    >>> str(counterpart(parse("1SEND_F3"))), str(counterpart(parse("0RECV_B2")))
    ('2RECV_F3', '1SEND_B2')
    """
    up = 1 if action.op in (SEND_FORWARD, RECV_BACKWARD) else -1
    return Action(action.stage + up, (SENDS | RECEIVES)[action.op], action.microbatch)


def needs(action: Action) -> Action | None:
    """Return the receive that must have completed before `action` computes, if it takes its input from outside.

    Whether that receive exists is the program's matter: the first stage's forward receives nothing. A recompute waits
    for the gradient as its backward does, because `torch.utils.checkpoint` starts it from inside the backward.
    """
    op = {
        FORWARD: RECV_FORWARD,
        BACKWARD: RECV_BACKWARD,
        BACKWARD_INPUT: RECV_BACKWARD,
        RECOMPUTE: RECV_BACKWARD,
    }.get(action.op)
    return Action(action.stage, op, action.microbatch) if op else None


def copies(action: Action) -> tuple[Action, ...]:
    """Return what `action` also waits for on its own device: copies to and from the host, gathered parameters."""
    stage, op, m, _ = action
    if op in (BACKWARD, BACKWARD_INPUT, RECOMPUTE):
        return Action(stage, FETCH, m), Action(stage, UNSHARD_BACKWARD, m)
    if op == FORWARD:
        return (Action(stage, UNSHARD_FORWARD, m),)
    return (Action(stage, OFFLOAD, m),) if op == RELEASE else ()


def prove(program: Program, stages: int, microbatches: int, *, backward: bool = True) -> None:
    """Prove that the program computes a step and ends: what fails here is never started.

    Every stage runs every micro-batch forward and backward (whole, or input before weight) once, forward first; each
    send has its receive; messages between two devices are sent and received in the same order; and nothing waits in a
    circle even when a send only completes once its receive is posted (gloo is rendezvous for every size).
    Raises `PlanError` with the bad cell marked in the grid.
    """
    position: dict[tuple[int, Action], int] = {}
    for d, row in enumerate(program.rows):
        for i, action in enumerate(row):
            if (d, action) in position or (action.microbatch is not None and program.where[action] != d):
                raise _disproved(program, (d, i), f"{action} occurs twice")
            position[d, action] = i
    for stage in range(stages):
        for m in range(microbatches):
            forward = Action(stage, FORWARD, m)
            if forward not in program.where:
                raise _disproved(program, None, f"{forward} is missing")
            if backward:
                _prove_backward(program, position, forward)
    _prove_messages(program, position)
    _prove_progress(program)


def _prove_backward(program: Program, position: dict[tuple[int, Action], int], forward: Action) -> None:
    stage, _, m, _ = forward
    whole = Action(stage, BACKWARD, m)
    parts = [whole] if whole in program.where else [Action(stage, op, m) for op in (BACKWARD_INPUT, BACKWARD_WEIGHT)]
    d = program.where[forward]
    before = forward
    for part in parts:
        if part not in program.where:
            raise _disproved(program, None, f"{whole} is missing")
        if program.where[part] != d or position[d, part] < position[d, before]:
            raise _disproved(program, (d, position[d, before]), f"{part} must follow {before} on its device")
        before = part


def _prove_messages(program: Program, position: dict[tuple[int, Action], int]) -> None:
    for action, d in program.where.items():
        if (action.op in SENDS or action.op in RECEIVES) and counterpart(action) not in program.where:
            raise _disproved(program, (d, position[d, action]), f"{action} has no {counterpart(action)}")
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for d, row in enumerate(program.rows):
        for action in row:
            if action.op in SENDS:
                sent[d, program.messages[action].target].append(action)
            elif action.op in RECEIVES:
                received[program.messages[action].source, d].append(counterpart(action))
    for pair, sends in sent.items():
        for expected, posted in zip(sends, received[pair], strict=True):
            if expected != posted:
                cell = (pair[0], position[pair[0], expected])
                raise _disproved(program, cell, f"{expected} is sent where device {pair[1]} receives {posted}")


def _prove_progress(program: Program) -> None:
    at = [0] * len(program.rows)
    posted: set[Action] = set()
    met: dict[tuple[int, str, int], set[int]] = defaultdict(set)
    turns: dict[tuple[int, int, str], int] = defaultdict(int)
    tied: dict[int, int] = defaultdict(int)
    for row in program.rows:
        for action in row:
            tied[action.stage] += action.op == REDUCE_TIED

    def passes(d: int, action: Action) -> bool:
        if action.op in (REDUCE_GRAD, UNSHARD_FORWARD, UNSHARD_BACKWARD):
            group = met[action.stage, action.op, turns[d, action.stage, action.op]]
            group.add(d)
            if action.op == REDUCE_GRAD and len(group) < len(program.holders[action.stage]):
                return False
            turns[d, action.stage, action.op] += 1
            return True
        if action.op == REDUCE_TIED:
            met[action.stage, action.op, 0].add(d)
            return len(met[action.stage, action.op, 0]) == tied[action.stage]
        if any(copy in program.where and copy not in posted for copy in copies(action)):
            return False
        receive = needs(action)
        if receive in program.messages:
            return {receive, program.messages[receive].send} <= posted
        return True

    moved = True
    while moved:
        moved = False
        for d, row in enumerate(program.rows):
            while at[d] < len(row) and passes(d, row[at[d]]):
                posted.add(row[at[d]])
                at[d] += 1
                moved = True
    for d, row in enumerate(program.rows):
        if at[d] < len(row):
            raise _disproved(program, (d, at[d]), f"{row[at[d]]} waits for ever")


def _disproved(program: Program, cell: tuple[int, int] | None, why: str) -> PlanError:
    where = f"device {cell[0]}, action {cell[1]}" if cell else "the whole program"
    return PlanError(
        what="the program is not a valid step",
        where=f"{where}\n{grid(program.order, mark=cell)}",
        why=why,
        fix="correct the schedule that generated it (planner/schedules)",
    )
