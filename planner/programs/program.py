"""A program: for every row of devices, the ordered actions it performs. Printable, saved as CSV.

Both interpreters walk it: the simulator with costs, the executor with tensors. It knows neither. It names who sends
what to whom (`edges`) and what every row is there for (`roles`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from planner.orders import codes
from planner.orders.action import Action, Row, actions, grid, order, parse
from planner.orders.codes import Order
from planner.orders.edges import Edges, chain
from planner.orders.operations import OPERATIONS, named
from planner.values.plan import RowRole

SENDS = {op: OPERATIONS[op].posts for op in named(end="source")}
RECEIVES = {receive: send for send, receive in SENDS.items()}


class Message(NamedTuple):
    """One transfer: which device sends it with which action, and which device receives it with which action."""

    source: int
    send: Action
    target: int
    receive: Action


class Program:
    """The rows of all devices, with their edges and roles. Equal when all are; immutable.

    Without `edges` the stages are a chain; without `roles` a row holds the stages that it computes.
    """

    def __init__(self, order: Order, edges: Edges | None = None, roles: tuple[RowRole, ...] = ()) -> None:
        self.order = order
        self._edges, self._roles = edges, roles

    @classmethod
    def of(cls, rows: Iterable[Sequence[Action]], edges: Edges | None = None) -> Program:
        """Make a program of rows of actions."""
        return cls(order(rows), edges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and (self.rows, self.edges) == (other.rows, other.edges)

    def __hash__(self) -> int:
        return hash(self.rows)

    def __str__(self) -> str:
        return grid(self.order)

    @cached_property
    def edges(self) -> Edges:
        """Who sends what to whom."""
        if self._edges is not None:
            return self._edges
        return chain(codes.extent(codes.flatten(self.order)[0]).stages)

    @cached_property
    def roles(self) -> tuple[RowRole, ...]:
        """What every row is there for."""
        if self._roles:
            return self._roles
        held = codes.held(*codes.flatten(self.order), self.edges.stages)
        return tuple(RowRole(tuple(np.flatnonzero(stages).tolist())) for stages in held)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Rows that hold each stage, in order: those that reduce its gradients together."""
        found: list[list[int]] = [[] for _ in range(self.edges.stages)]
        for row, role in enumerate(self.roles):
            for stage in role.stages:
                found[stage].append(row)
        return tuple(map(tuple, found))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as actions."""
        return tuple(actions(row) for row in self.order)

    @cached_property
    def where(self) -> dict[Action, int]:
        """Row of every action that has a micro-batch: such an action occurs once in the whole program."""
        return {action: d for d, row in enumerate(self.rows) for action in row if action.microbatch is not None}

    @cached_property
    def messages(self) -> dict[Action, Message]:
        """Every message, by its send and by its receive."""
        found: dict[Action, Message] = {}
        for send, source in self.where.items():
            if send.op in SENDS:
                receive = self.counterpart(send)
                message = Message(source, send, self.where.get(receive, -1), receive)
                found[send] = found[receive] = message
        return found

    def counterpart(self, action: Action) -> Action:
        """Return the receive of a send or the send of a receive. Raises `IndexError` where no edge leads there."""
        edge = self.edges.number(action.op, action.stage, action.port)
        other = (SENDS | RECEIVES)[action.op]
        stage, port = self.edges.place(other, edge)
        return Action(stage, other, action.microbatch, port)

    def to_csv(self) -> str:
        """Return one line per device."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([[str(a) for a in row] for row in self.rows])
        return buffer.getvalue()

    @classmethod
    def from_csv(cls, text: str, edges: Edges | None = None) -> Program:
        """Read what `to_csv` writes; edges other than a chain are not in the text."""
        return cls.of([[parse(cell) for cell in line] for line in csv.reader(io.StringIO(text))], edges)
