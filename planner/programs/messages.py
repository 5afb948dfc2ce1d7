"""From computes to computes and messages: sends and receives along the program's edges, receives posted early.

Messages have one order that all devices agree on: each row sees its own in that order. So a program passes where a
device's messages are done strictly in turn (NCCL on one communicator), and so much more where only those of a pair
are (gloo).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def messages(rows: Order, edges: Edges, replicas: Sequence[int] = ()) -> Order:
    """Add messages, and post their receives one compute earlier, so that they overlap it.

    The price is the buffer of one more message. A receive goes before other messages only where all devices still
    agree on one order: the message before it on its sender's side must not have to wait for one that it passes.

    Where a stage has several of `replicas`, rows behind each other that take turns, a row is not played past a backward
    as long as another one has not come to that before it: its update waits for their reduction.

    >>> from planner.orders.action import grid
    >>> from planner.orders.edges import chain
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(grid(messages(arrange("gpipe", Shape(2, 2)), chain(2))))
    0F0      0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
    1RECV_F0 1RECV_F1 1F0 1F1      1B0      1SEND_B0 1B1 1SEND_B1
    """
    return _played(rows, edges, early=True, turns=_turns(rows, replicas))


_TAKEN, _TAKES, _TAKES_END, _RECEIVER, _MAKES, _MAKES_END, _MADE, _WIDTH = 0, 1, 2, 3, 4, 5, 6, 8
"""What the loops ask of a kind of action, side by side: where the one value that it takes is marked (or none, or
several: then from `_TAKES` to `_TAKES_END`), who receives the first message that it makes (or none) and which messages
these are, where it is marked that they are made."""
_NONE, _SEVERAL = -1, -2

_AT, _STOP, _BEGIN, _END, _COMPUTE, _TURN, _TARGET = 0, 1, 2, 3, 4, 5, 6
"""How far a row has been played, side by side, too: its next compute and the end of its computes; where its part of the
result begins and ends, and where its latest compute stands there; the turn of the round in which it posts messages, and
the row that takes the first of them."""


class Played(NamedTuple):
    """How far the rows have been played.

    `made` marks values, then gradients, of every stage and micro-batch; `rows` has `_WIDTH` numbers of each row, from
    `_AT` to `_TARGET`; `out` is the result.

    Messages have places in the order that all devices agree on, ascending in every row. Of every row `latest` is that
    of its latest message, `before` of the latest one in front of the latest compute; `behind` has, from where the row
    begins, those of the messages behind that compute.
    """

    made: npt.NDArray[np.int8]
    rows: Codes
    out: Codes
    latest: Places
    before: Places
    behind: Places


class Turns(NamedTuple):
    """Rows that take turns: of each the first of its stage and the one behind the last, empty where there are none.

    `backwards` has the places of all backwards: a row's from `begins` to `ends`, from `following` on those that it has
    not come to.

    What a row computes behind its `gate` waits for a reduction, and for all messages that this has waited for: those
    with a place up to `floor`. Its later messages stand behind them.
    """

    first: Codes
    behind: Codes
    backwards: Codes
    following: Codes
    begins: Codes
    ends: Codes
    gate: Codes
    floor: Places


def _turns(rows: Order, replicas: Sequence[int]) -> Turns:
    none = np.zeros(0, np.int64)
    if not replicas:
        return Turns(none, none, none, none, none, none, none, np.zeros(0))
    flat, offsets = flatten(rows)
    backwards = np.flatnonzero(TABLE.adds[codes.ops(flat)])
    counts = np.array(replicas, np.int64)
    stops = np.cumsum(counts)
    begins, ends = (np.searchsorted(backwards, of) for of in (offsets[:-1], offsets[1:]))
    first, behind = np.repeat(stops - counts, counts), np.repeat(stops, counts)
    gate, floor = np.full(len(rows), -1, np.int64), np.zeros(len(rows))
    return Turns(first, behind, backwards, begins.copy(), begins, ends, gate, floor)


def _played(rows: Order, edges: Edges, *, early: bool, turns: Turns | None = None) -> Order:
    """Return the rows with their messages."""
    if not len(edges):
        return rows
    flat, offsets = flatten(rows)
    width = codes.extent(flat).microbatches + 1
    home = np.full(edges.stages * width, -1, np.int32)
    _find_homes(len(flat), flat, offsets, TABLE.computes, width, home)
    starts = np.zeros(len(offsets), np.int64)
    what = _what(edges)
    _count(len(flat), flat, offsets, edges.kinds, what, edges.stages + 1, width, home, starts)
    np.cumsum(starts, out=starts)
    state = np.zeros((len(rows), _WIDTH), np.int64)
    state[:, _AT], state[:, _STOP] = offsets[:-1], offsets[1:]
    state[:, _BEGIN] = state[:, _END] = starts[:-1]
    state[:, _COMPUTE] = starts[:-1] - 1
    played = Played(
        made=np.zeros(2 * edges.stages * width, np.int8),
        rows=state.reshape(-1),
        out=np.empty(starts[-1], np.int64),
        latest=np.zeros(len(rows)),
        before=np.zeros(len(rows)),
        behind=np.empty(starts[-1]),
    )
    turns = turns or _turns(rows, ())
    _play(len(flat), flat, offsets, edges.kinds, what, edges.stages + 1, width, home, played, turns, int(early))
    ends = zip(starts.tolist(), played.rows[_END::_WIDTH].tolist(), strict=False)
    return tuple(played.out[begin:end] for begin, end in ends)


def _what(edges: Edges) -> Codes:
    """Return what each kind of action takes and makes: `_WIDTH` numbers from `_TAKEN` to `_MADE`."""
    takes, makes = edges.kinds.takes, edges.kinds.makes
    what = np.zeros((len(takes) - 1, _WIDTH), np.int64)
    what[:, _TAKES], what[:, _TAKES_END] = takes[:-1], takes[1:]
    what[:, _MAKES], what[:, _MAKES_END] = makes[:-1], makes[1:]
    taken, sent = np.diff(takes), np.diff(makes) > 0
    what[:, _TAKEN] = np.where(taken == 0, _NONE, _SEVERAL)
    what[taken == 1, _TAKEN] = edges.kinds.slot[takes[:-1][taken == 1]]
    what[:, _RECEIVER] = _NONE
    what[sent, _RECEIVER] = edges.kinds.receiver[makes[:-1][sent]]
    op, stage = np.divmod(np.arange(len(what)), edges.stages + 1)
    what[:, _MADE] = stage + np.where(TABLE.leaving[TABLE.makes[op]] > 0, 0, edges.stages)
    return what.reshape(-1)


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
def _count(flat, offsets, kinds, what, stages, width, home, lengths):  # type: ignore[no-untyped-def]
    """Count, one place further, what every row will hold."""
    for d in range(len(offsets) - 1):
        more = 0
        for i in range(offsets[d], offsets[d + 1]):
            action = flat[i & NATURAL]
            kind = (((action >> OP) * stages + (action >> STAGE & STAGES)) * _WIDTH) & NATURAL
            m = action & MICROBATCH
            receiver = what[kind + _RECEIVER]
            if receiver < 0:
                continue
            to = home[(receiver * width + m) & NATURAL]
            if to >= 0 and to != d:
                more += 1
                lengths[(to + 1) & NATURAL] += 1
            for k in range(what[kind + _MAKES] + 1, what[kind + _MAKES_END]):
                to = home[(kinds.receiver[k & NATURAL] * width + m) & NATURAL]
                if to >= 0 and to != d:
                    more += 1
                    lengths[(to + 1) & NATURAL] += 1
        lengths[d + 1] += offsets[d + 1] - offsets[d] + more
    return 0


_TURNS, _SILENT = 4, 4
"""Turns of a round: messages to the next row, to the one before, further on, further back; none, or not ready."""


@kernel
def _play(flat, offsets, kinds, what, stages, width, home, played, turns, early):  # type: ignore[no-untyped-def]
    """Play the rows in rounds; `home` is the row of a stage's micro-batch.

    If `early`, each receive moves up over at most one compute, and over messages behind which no sender has to wait.
    One that goes before others gets a place before theirs, but behind that of the message before it on its sender's
    side. Messages are posted in the order of their places at first: what stands before a send has then found its own.
    Where rows take `turns`, how far each may go is said anew in every round.
    """
    made, rows, out, latest, before, behind = played
    first_of, behind_of, backwards, following, begins, ends, gate, floor = turns
    count = len(latest)
    posted = 0.0
    moved = True
    while moved:
        moved = False
        wanted = 0
        for row in range(len(turns.first)):
            while following[row] < ends[row] and backwards[following[row]] < rows[row * _WIDTH + _AT]:
                following[row] += 1
        fewest = 0
        for row in range(len(turns.first)):  # up to the second backward that not all of its stage have come to
            if row == first_of[row]:
                fewest = len(flat)
                for other in range(row, behind_of[row]):
                    if following[other] < ends[other]:  # one at its end has come to all turns that are whole
                        fewest = min(fewest, following[other] - begins[other])
            last = begins[row] + fewest + 1
            stop = backwards[last] + 1 if last < ends[row] else offsets[row + 1]
            if gate[row] >= 0 and stop > rows[row * _WIDTH + _STOP]:
                floor[row] = posted
            rows[row * _WIDTH + _STOP] = stop
            if gate[row] < 0:
                gate[row] = stop
            elif rows[row * _WIDTH + _AT] >= gate[row]:
                latest[row] = max(latest[row], floor[row])
                gate[row] = stop
        for row in range(count):
            d = (row * _WIDTH) & NATURAL
            rows[d + _TURN] = _SILENT
            i = rows[d + _AT] & NATURAL
            if i == rows[d + _STOP]:
                continue
            action = flat[i]
            kind = (((action >> OP) * stages + (action >> STAGE & STAGES)) * _WIDTH) & NATURAL
            m = action & MICROBATCH
            taken = what[kind + _TAKEN]
            ready = True
            if taken >= 0:
                ready = made[(taken * width + m) & NATURAL] != 0
            elif taken == _SEVERAL:
                for k in range(what[kind + _TAKES], what[kind + _TAKES_END]):
                    if not made[(kinds.slot[k & NATURAL] * width + m) & NATURAL]:
                        ready = False
            if not ready:
                continue
            moved = True
            rows[d + _AT] = i + 1
            here = rows[d + _END] & NATURAL
            rows[d + _END] = here + 1
            out[here] = action
            rows[d + _COMPUTE] = here
            before[row & NATURAL] = latest[row & NATURAL]
            receiver = what[kind + _RECEIVER]
            if receiver >= 0:
                to = home[(receiver * width + m) & NATURAL]
                turn = 0
                if to >= 0 and to != row:
                    turn = (0 if to == row + 1 or to == row - 1 else 2) + (1 if to < row else 0)
                rows[d + _TURN] = turn
                rows[d + _TARGET] = to
                wanted |= 1 << turn
        for turn in range(_TURNS):
            if not wanted >> turn & 1:
                continue
            for each in range(count):
                row = (each if turn % 2 == 0 else count - 1 - each) & NATURAL
                d = row * _WIDTH & NATURAL
                if rows[d + _TURN] != turn:
                    continue
                action = flat[(rows[d + _AT] - 1) & NATURAL]
                kind = (((action >> OP) * stages + (action >> STAGE & STAGES)) * _WIDTH) & NATURAL
                m = action & MICROBATCH
                made[(what[kind + _MADE] * width + m) & NATURAL] = 1
                first = what[kind + _MAKES]
                for each_made in range(first, what[kind + _MAKES_END]):
                    k = each_made & NATURAL
                    to = rows[d + _TARGET] if k == first else home[(kinds.receiver[k] * width + m) & NATURAL]
                    if to < 0 or to == row:
                        continue
                    to &= NATURAL
                    t = to * _WIDTH & NATURAL
                    posted += 1.0
                    place = posted
                    there = rows[t + _END] & NATURAL
                    rows[t + _END] = there + 1
                    front = rows[t + _COMPUTE]
                    own = rows[t + _BEGIN] - front - 1
                    passed = there
                    if early and front >= rows[t + _BEGIN]:
                        low = latest[row]
                        high = posted
                        while passed > front + 1 and behind[(own + passed - 1) & NATURAL] > low:
                            passed -= 1
                            high = behind[(own + passed) & NATURAL]
                        low = max(low, before[to])
                        middle = (low + high) / 2
                        if passed > front + 1 or not low < middle < high:
                            passed = there  # its sender would have to wait, or no number between them is left
                        else:
                            passed = front
                            if high < posted:
                                place = middle
                    if passed < there:
                        j = there
                        while j > passed:
                            out[j & NATURAL] = out[(j - 1) & NATURAL]
                            j -= 1
                        before[to] = place
                        rows[t + _COMPUTE] = front + 1
                    else:
                        behind[(own + there) & NATURAL] = place
                    if place == posted:
                        latest[to] = place
                    out[passed & NATURAL] = kinds.receive[k] | m
                    here = rows[d + _END] & NATURAL
                    rows[d + _END] = here + 1
                    out[here] = kinds.send[k] | m
                    behind[(rows[d + _BEGIN] + here - rows[d + _COMPUTE] - 1) & NATURAL] = place
                    latest[row] = place
    for row in range(count):  # what waits for ever is left as it is: the proof shows the cell
        d = row * _WIDTH
        for i in range(rows[d + _AT], offsets[row + 1]):
            out[rows[d + _END]] = flat[i]
            rows[d + _END] += 1
    return 0
