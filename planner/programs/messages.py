"""From computes to computes and messages: sends and receives along the program's edges, receives posted early.

Messages have one order that all devices agree on: each row sees its own in that order. So a program passes where a
device's messages are done strictly in turn (NCCL on one communicator), and so much more where only those of a pair
are (gloo).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders import codes
from planner.orders.codes import MICROBATCH, OP, STAGE, STAGES, Codes, Order, cut, flatten
from planner.orders.edges import Edges
from planner.orders.operations import TABLE

Numbers = npt.NDArray[np.int32]


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
    return _play(rows, edges)[0] if len(edges) else rows


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
    if not len(edges):
        return rows
    rows, posted = _play(rows, edges)
    flat, offsets = flatten(rows)
    if len(flat) == len(posted.message):  # otherwise something waits for ever: the proof shows it
        _prefetch(len(flat), flat, offsets, TABLE, posted)
    return cut(flat, offsets)


class Posted(NamedTuple):
    """The messages of a program, numbered in the order in which they are first posted.

    `message` is the number of every action's message, -1 for none. Of each message: its `place` in the order that all
    devices agree on, the rows `source` and `target`, and where its send and its receive stand.
    """

    message: Numbers
    place: npt.NDArray[np.float64]
    source: Numbers
    target: Numbers
    send: Numbers
    receive: Numbers


def _play(rows: Order, edges: Edges) -> tuple[Order, Posted]:
    """Return the rows with their messages, and the messages."""
    flat, offsets = flatten(rows)
    last = codes.extent(flat).microbatches
    home = np.full(edges.stages * last, -1, np.int64)
    _find_homes(len(flat), flat, offsets, TABLE, last, home)
    starts = np.zeros(len(offsets), np.int64)
    _count(len(flat), flat, offsets, edges.kinds, edges.stages + 1, last, home, starts)
    np.cumsum(starts, out=starts)
    out, ends = np.empty(starts[-1], np.int64), starts[:-1].copy()
    played = Played(
        made=np.zeros(2 * edges.stages * last, np.int8),
        at=offsets[:-1].copy(),
        phase=np.zeros(len(rows), np.int64),
        out=out,
        ends=ends,
    )
    most = (len(out) - len(flat)) // 2
    source, target, send, receive = (np.empty(most, np.int32) for _ in range(4))
    message = np.full(len(out), -1, np.int32)
    posted = Posted(message, np.arange(1.0, most + 1.0), source, target, send, receive)
    _communicate(len(flat), flat, offsets, TABLE, edges.kinds, edges.stages + 1, last, home, played, posted)
    return tuple(out[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=False)), posted


class Played(NamedTuple):
    """How far the rows have been played.

    `made` marks values, then gradients, of every stage and micro-batch. Of every row: `at`, its next compute; `phase`,
    in which it posts its messages of this round; `ends`, up to where its part of `out` is written.
    """

    made: npt.NDArray[np.int8]
    at: Codes
    phase: Codes
    out: Codes
    ends: Codes


@kernel
def _find_homes(flat, offsets, ops, last, home):  # type: ignore[no-untyped-def]
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            if ops.computes[flat[i] >> OP]:
                home[(flat[i] >> STAGE & STAGES) * last + (flat[i] & MICROBATCH) - 1] = d
    return 0


@kernel
def _count(flat, offsets, kinds, width, last, home, lengths):  # type: ignore[no-untyped-def]
    """Count, one place further, what every row will hold."""
    for d in range(len(offsets) - 1):
        more = 0
        for i in range(offsets[d], offsets[d + 1]):
            kind = (flat[i] >> OP) * width + (flat[i] >> STAGE & STAGES)
            for k in range(kinds.makes[kind], kinds.makes[kind + 1]):
                target = home[kinds.receiver[k] * last + (flat[i] & MICROBATCH) - 1]
                if target >= 0 and target != d:
                    more += 1
                    lengths[target + 1] += 1
        lengths[d + 1] += offsets[d + 1] - offsets[d] + more
    return 0


_IDLE, _SILENT, _PHASES = -1, 4, 4
"""Phases of a round: messages to the next row, to the one before, further on, further back; none, or not ready."""


@kernel
def _communicate(flat, offsets, ops, kinds, width, last, home, played, posted):  # type: ignore[no-untyped-def]
    """Play the rows in rounds; `home` is the row of a stage's micro-batch."""
    made, at, phase, out, ends = played.made, played.at, played.phase, played.out, played.ends
    rows = len(offsets) - 1
    gradients = len(made) // 2
    own = -1
    moved = True
    while moved:
        moved = False
        for d in range(rows):
            phase[d] = _IDLE
            if at[d] == offsets[d + 1]:
                continue
            action = flat[at[d]]
            kind = (action >> OP) * width + (action >> STAGE & STAGES)
            m = (action & MICROBATCH) - 1
            ready = True
            for k in range(kinds.takes[kind], kinds.takes[kind + 1]):
                if not made[kinds.slot[k] * last + m]:
                    ready = False
            if not ready:
                continue
            moved = True
            out[ends[d]] = action
            ends[d] += 1
            phase[d] = _SILENT
            first = kinds.makes[kind]
            if first < kinds.makes[kind + 1]:
                target = home[kinds.receiver[first] * last + m]
                phase[d] = 0
                if target >= 0 and target != d:
                    phase[d] = (0 if target == d + 1 or target == d - 1 else 2) + (1 if target < d else 0)
        wanted = 0
        for d in range(rows):
            if phase[d] == _IDLE:
                continue
            action = flat[at[d]]
            at[d] += 1
            if phase[d] < _PHASES:
                wanted |= 1 << phase[d]
                forward = ops.leaving[ops.makes[action >> OP]]
                made[(0 if forward else gradients) + (action >> STAGE & STAGES) * last + (action & MICROBATCH) - 1] = 1
        for turn in range(_PHASES):
            if not wanted >> turn & 1:
                continue
            for each in range(rows):
                d = each if turn % 2 == 0 else rows - 1 - each
                if phase[d] != turn:
                    continue
                action = flat[at[d] - 1]
                kind = (action >> OP) * width + (action >> STAGE & STAGES)
                m = (action & MICROBATCH) - 1
                for k in range(kinds.makes[kind], kinds.makes[kind + 1]):
                    target = home[kinds.receiver[k] * last + m]
                    if target < 0 or target == d:
                        continue
                    own += 1
                    here, there = ends[d], ends[target]
                    out[here] = kinds.send[k] | (m + 1)
                    out[there] = kinds.receive[k] | (m + 1)
                    ends[d] += 1
                    ends[target] += 1
                    posted.message[here] = own
                    posted.message[there] = own
                    posted.source[own] = d
                    posted.target[own] = target
                    posted.send[own] = here
                    posted.receive[own] = there
    for d in range(rows):  # what waits for ever is left as it is: the proof shows the cell
        while at[d] < offsets[d + 1]:
            out[ends[d]] = flat[at[d]]
            ends[d] += 1
            at[d] += 1
    return 0


@kernel
def _prefetch(flat, offsets, ops, posted):  # type: ignore[no-untyped-def]
    """Move receives, in place, over at most one compute, and over messages behind which no sender has to wait.

    In every row the messages' places ascend, so that one order of all messages fits every row. A receive that goes
    before others gets a place before theirs, but behind that of the message before it on its sender's side. Messages
    are looked at in their order: what stands before a send has then found its place.
    """
    message, place = posted.message, posted.place
    for own in range(len(place)):
        begin = offsets[posted.source[own]]
        before = posted.send[own] - 1
        while before >= begin and message[before] < 0:
            before -= 1
        low = place[message[before]] if before >= begin else 0.0
        high = place[own]
        begin = offsets[posted.target[own]]
        to = at = posted.receive[own]
        computes = 0
        while to > begin and computes < 1:
            if message[to - 1] >= 0:
                if place[message[to - 1]] <= low:
                    break
                high = place[message[to - 1]]
            computes += ops.busy[flat[to - 1] >> OP]
            to -= 1
        before = to - 1
        while before >= begin and message[before] < 0:
            before -= 1
        if before >= begin:
            low = max(low, place[message[before]])
        middle = (low + high) / 2
        if computes == 0 or not low < middle < high:
            continue  # nothing to overlap, or no number between them is left
        if high < place[own]:
            place[own] = middle
        action = flat[at]
        for j in range(at, to, -1):
            flat[j] = flat[j - 1]
            message[j] = message[j - 1]
            if message[j] >= 0:
                if ops.source[flat[j] >> OP]:
                    posted.send[message[j]] = j
                else:
                    posted.receive[message[j]] = j
        flat[to] = action
        message[to] = own
        posted.receive[own] = to
    return 0
