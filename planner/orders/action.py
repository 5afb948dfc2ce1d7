"""Actions as people see them: written, read, and drawn as a table. Inside, a row of them is an array of numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from planner.orders import codes
from planner.orders.codes import Order
from planner.orders.operations import OPS

_PATTERN = re.compile(rf"(\d+)({'|'.join(sorted(OPS, key=len, reverse=True))})(\d*)(?:\.(\d+))?")


class Action(NamedTuple):
    """What a device does once: stage, operation and, where it has one, micro-batch.

    A message also has the port of its stage, printed where it is not 0: which of its edges on that side it takes.

    >>> str(Action(2, "F", 0)), parse("1SEND_B12")
    ('2F0', Action(stage=1, op='SEND_B', microbatch=12, port=0))
    >>> str(parse("0SEND_F3.1"))
    '0SEND_F3.1'
    """

    stage: int
    op: str
    microbatch: int | None = None
    port: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{'' if self.microbatch is None else self.microbatch}" + f".{self.port}" * (
            self.port > 0
        )

    @property
    def code(self) -> int:
        """The action as a number (`planner.orders.codes`)."""
        return codes.code(self.op, self.stage, self.microbatch, self.port)


Row = tuple[Action, ...]


def parse(text: str) -> Action:
    """Read an action as `str` prints it. Raises `ValueError` for anything else."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not an action such as 2F0, 1SEND_B3 or 0OPTIMIZER")
    stage, op, microbatch, port = match.groups()
    return Action(int(stage), op, int(microbatch) if microbatch else None, int(port or 0))


def actions(row: codes.Codes) -> Row:
    """Return a row of codes as actions."""
    found = row.tolist()
    return tuple(Action(stage, op, m, port) for op, stage, m, port in map(codes.unpack, found))


def order(rows: Iterable[Sequence[Action]]) -> Order:
    """Return rows of actions as codes."""
    return tuple(np.array([action.code for action in row], np.int64) for row in rows)


def grid(rows: Order, *, mark: tuple[int, int] | None = None) -> str:
    """Print rows of actions as a table; the cell `mark` = (device, position) stands between > and <.

    >>> print(grid(order([[Action(0, "F", 0), Action(0, "B", 0)]]), mark=(0, 1)))
    0F0 >0B0<
    """
    cells = [
        [f">{action}<" if mark == (d, i) else str(action) for i, action in enumerate(actions(row))]
        for d, row in enumerate(rows)
    ]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells), default=0))]
    return "\n".join(" ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in cells)
