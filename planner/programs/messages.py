"""From computes to computes and messages: sends and receives along the program's edges, receives posted early.

Messages have one order that all devices agree on: each row sees its own in that order. So a program passes where a
device's messages are done strictly in turn (NCCL on one communicator), and so much more where only those of a pair
are (gloo).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import NATURAL, kernel
from planner.orders import codes
from planner.orders.codes import MICROBATCH, OP, STAGE, STAGES, Codes, Order, flatten
from planner.orders.edges import Edges
from planner.orders.operations import TABLE

Numbers = npt.NDArray[np.int32]
Places = npt.NDArray[np.float64]


def communicate(rows: Order, edges: Edges) -> Order:
    """Add sends behind, and receives before, the computes that need them.

    The rows are played in rounds, one compute per device and round. A send stands right behind the compute that makes
    the value; its receive is posted on the other device in the same round.

    >>> from planner.orders.action import grid
    >>> from planner.orders.edges import chain
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(grid(communicate(arrange("gpipe", Shape(2, 1)), chain(2))))
    0F0      0SEND_F0 0RECV_B0 0B0
    1RECV_F0 1F0      1B0      1SEND_B0
    """
    return _played(rows, edges, early=False)


def messages(rows: Order, edges: Edges) -> Order:
    """Add messages, and post their receives one compute earlier, so that they overlap it.

    The price is the buffer of one more message. A receive goes before other messages only where all devices still
    agree on one order: the message before it on its sender's side must not have to wait for one that it passes.

    >>> from planner.orders.action import grid
    >>> from planner.orders.edges import chain
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(grid(messages(arrange("gpipe", Shape(2, 2)), chain(2))))
    0F0      0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
    1RECV_F0 1RECV_F1 1F0 1F1      1B0      1SEND_B0 1B1 1SEND_B1
    """
    return _played(rows, edges, early=True)


class Played(NamedTuple):
    """How far the rows have been played.

    `made` marks values, then gradients, of every stage and micro-batch. Of every row: `at`, its next compute; `turn`,
    in which it posts its messages of this round, and `target`, the row that takes the first of them; `begins` and
    `ends`, between which its part of `out` is written, and `compute`, where the latest compute stands in it.

    Messages have places in the order that all devices agree on, ascending in every row. Of every row `latest` is that
    of its latest message, `before` of the latest one in front of the latest compute; `behind` has, from where the row
    begins, those of the messages behind that compute.
    """

    made: npt.NDArray[np.int8]
    at: Codes
    turn: Codes
    target: Codes
    begins: Codes
    ends: Codes
    compute: Codes
    out: Codes
    latest: Places
    before: Places
    behind: Places


def _played(rows: Order, edges: Edges, *, early: bool) -> Order:
    """Return the rows with their messages."""
    if not len(edges):
        return rows
    flat, offsets = flatten(rows)
    width = codes.extent(flat).microbatches + 1
    home = np.full(edges.stages * width, -1, np.int32)
    _find_homes(len(flat), flat, offsets, TABLE.computes, width, home)
    starts = np.zeros(len(offsets), np.int64)
    _count(len(flat), flat, offsets, edges.kinds, edges.stages + 1, width, home, starts)
    np.cumsum(starts, out=starts)
    played = Played(
        made=np.zeros(2 * edges.stages * width, np.int8),
        at=offsets[:-1].copy(),
        turn=np.zeros(len(rows), np.int64),
        target=np.zeros(len(rows), np.int64),
        begins=starts[:-1],
        ends=starts[:-1].copy(),
        compute=starts[:-1] - 1,
        out=np.empty(starts[-1], np.int64),
        latest=np.zeros(len(rows)),
        before=np.zeros(len(rows)),
        behind=np.empty(starts[-1]),
    )
    _play(len(flat), flat, offsets, TABLE, edges.kinds, edges.stages + 1, width, home, played, int(early))
    ends = zip(starts.tolist(), played.ends.tolist(), strict=False)
    return tuple(played.out[begin:end] for begin, end in ends)


@kernel
def _find_homes(flat, offsets, computes, width, home):  # type: ignore[no-untyped-def]
    """Find the row that computes each stage's micro-batch: stage by stage, none first, `width` of each."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            action = flat[i & NATURAL]
            if computes[(action >> OP) & NATURAL]:
                home[((action >> STAGE & STAGES) * width + (action & MICROBATCH)) & NATURAL] = d
    return 0


@kernel
def _count(flat, offsets, kinds, stages, width, home, lengths):  # type: ignore[no-untyped-def]
    """Count, one place further, what every row will hold."""
    for d in range(len(offsets) - 1):
        more = 0
        for i in range(offsets[d], offsets[d + 1]):
            action = flat[i & NATURAL]
            kind = ((action >> OP) * stages + (action >> STAGE & STAGES)) & NATURAL
            for k in range(kinds.makes[kind], kinds.makes[kind + 1]):
                target = home[(kinds.receiver[k & NATURAL] * width + (action & MICROBATCH)) & NATURAL]
                if target >= 0 and target != d:
                    more += 1
                    lengths[(target + 1) & NATURAL] += 1
        lengths[d + 1] += offsets[d + 1] - offsets[d] + more
    return 0


_TURNS, _SILENT = 4, 4
"""Turns of a round: messages to the next row, to the one before, further on, further back; none, or not ready."""


@kernel
def _play(flat, offsets, ops, kinds, stages, width, home, played, early):  # type: ignore[no-untyped-def]
    """Play the rows in rounds; `home` is the row of a stage's micro-batch.

    If `early`, each receive moves up over at most one compute, and over messages behind which no sender has to wait.
    One that goes before others gets a place before theirs, but behind that of the message before it on its sender's
    side. Messages are posted in the order of their places at first: what stands before a send has then found its own.
    """
    made, at, turn, target, begins, ends, compute, out, latest, before, behind = played
    rows = len(offsets) - 1
    gradients = len(made) // 2
    posted = 0.0
    moved = True
    while moved:
        moved = False
        wanted = 0
        for row in range(rows):
            d = row & NATURAL
            turn[d] = _SILENT
            i = at[d] & NATURAL
            if i == offsets[d + 1]:
                continue
            action = flat[i]
            kind = ((action >> OP) * stages + (action >> STAGE & STAGES)) & NATURAL
            m = action & MICROBATCH
            ready = True
            for k in range(kinds.takes[kind], kinds.takes[kind + 1]):
                if not made[(kinds.slot[k & NATURAL] * width + m) & NATURAL]:
                    ready = False
            if not ready:
                continue
            moved = True
            at[d] = i + 1
            here = ends[d] & NATURAL
            ends[d] = here + 1
            out[here] = action
            compute[d] = here
            before[d] = latest[d]
            first = kinds.makes[kind] & NATURAL
            if first < kinds.makes[kind + 1]:
                to = home[(kinds.receiver[first] * width + m) & NATURAL]
                mine = 0
                if to >= 0 and to != d:
                    mine = (0 if to == d + 1 or to == d - 1 else 2) + (1 if to < d else 0)
                turn[d] = mine
                target[d] = to
                wanted |= 1 << mine
        for now in range(_TURNS):
            if not wanted >> now & 1:
                continue
            for row in range(rows):
                d = (row if now % 2 == 0 else rows - 1 - row) & NATURAL
                if turn[d] != now:
                    continue
                action = flat[(at[d] - 1) & NATURAL]
                op = (action >> OP) & NATURAL
                stage = action >> STAGE & STAGES
                m = action & MICROBATCH
                forward = ops.leaving[ops.makes[op] & NATURAL]
                made[((0 if forward else gradients) + stage * width + m) & NATURAL] = 1
                kind = (op * stages + stage) & NATURAL
                first = kinds.makes[kind]
                for each in range(first, kinds.makes[kind + 1]):
                    k = each & NATURAL
                    to = target[d] if k == first else home[(kinds.receiver[k] * width + m) & NATURAL]
                    if to < 0 or to == d:
                        continue
                    to &= NATURAL
                    posted += 1.0
                    place = posted
                    there = ends[to] & NATURAL
                    ends[to] = there + 1
                    front = compute[to]
                    own = begins[to] - front - 1
                    passed = there
                    if early and front >= begins[to]:
                        low = latest[d]
                        high = posted
                        while passed > front + 1 and behind[(own + passed - 1) & NATURAL] > low:
                            passed -= 1
                            high = behind[(own + passed) & NATURAL]
                        middle = (max(low, before[to]) + high) / 2
                        if passed > front + 1 or not max(low, before[to]) < middle < high:
                            passed = there  # its sender would have to wait, or no number between them is left
                        else:
                            passed = front
                            if high < posted:
                                place = middle
                    if passed < there:
                        for j in range(there, passed, -1):
                            out[j & NATURAL] = out[(j - 1) & NATURAL]
                        before[to] = place
                        compute[to] = front + 1
                    else:
                        behind[(own + there) & NATURAL] = place
                    if place == posted:
                        latest[to] = place
                    out[passed & NATURAL] = kinds.receive[k] | m
                    here = ends[d] & NATURAL
                    ends[d] = here + 1
                    out[here] = kinds.send[k] | m
                    behind[(begins[d] + here - compute[d] - 1) & NATURAL] = place
                    latest[d] = place
    for d in range(rows):  # what waits for ever is left as it is: the proof shows the cell
        while at[d] < offsets[d + 1]:
            out[ends[d]] = flat[at[d]]
            ends[d] += 1
            at[d] += 1
    return 0
