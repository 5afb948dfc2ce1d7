"""From computes to computes and messages: sends and receives along the program's edges, receives posted early.

Messages have one order that all devices agree on: each row sees its own in that order. So a program passes where a
device's messages are done strictly in turn (NCCL on one communicator), and so much more where only those of a pair
are (gloo).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders import codes
from planner.orders.codes import MICROBATCH, OP, PORT, PORTS, STAGE, STAGES, Codes, Order, cut, flatten
from planner.orders.edges import Edges
from planner.orders.operations import PAIR, TABLE


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
    rows, home, place, turns = _play(rows, edges)
    flat, offsets = flatten(rows)
    last = len(home) // edges.stages
    message, sends, receives = np.empty(len(flat), np.int32), *(np.empty(len(place), np.int64) for _ in range(2))
    _prefetch(
        len(flat), flat, offsets, TABLE, edges.table, last, home, place, turns, message, sends, receives
    )  # fmt: skip
    return cut(flat, offsets)


def _play(rows: Order, edges: Edges) -> tuple[Order, Codes, npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Return the rows with their messages, the row of every stage's every micro-batch, and the order of all messages.

    Of each message its place in that order, forward edge by edge, micro-batch by micro-batch, then those of gradients;
    and the messages in that order, -1 behind the last.
    """
    flat, offsets = flatten(rows)
    last = codes.extent(flat).microbatches
    home = np.full(edges.stages * last, -1, np.int64)
    _find_homes(len(flat), flat, offsets, TABLE, last, home)
    starts = np.zeros(len(offsets), np.int64)
    _count(len(flat), flat, offsets, TABLE, edges.table, last, home, starts)
    np.cumsum(starts, out=starts)
    out, ends = np.empty(starts[-1], np.int64), starts[:-1].copy()
    made, ready = np.zeros(2 * edges.stages * last, np.int8), np.zeros(len(rows), np.int8)
    place, turns = np.zeros(2 * len(edges) * last), np.full(2 * len(edges) * last, -1, np.int32)
    _communicate(
        len(flat), flat, offsets, TABLE, edges.table, last, home, made, offsets[:-1].copy(), ready, out, ends, place,
        turns,
    )  # fmt: skip
    return tuple(out[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=False)), home, place, turns


@kernel
def _find_homes(flat, offsets, ops, last, home):  # type: ignore[no-untyped-def]
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            if ops.computes[flat[i] >> OP]:
                home[(flat[i] >> STAGE & STAGES) * last + (flat[i] & MICROBATCH) - 1] = d
    return 0


@kernel
def _count(flat, offsets, ops, edges, last, home, lengths):  # type: ignore[no-untyped-def]
    """Count, one place further, what every row will hold."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            lengths[d + 1] += 1
            send = ops.makes[flat[i] >> OP]
            if send < 0:
                continue
            stage = flat[i] >> STAGE & STAGES
            m = (flat[i] & MICROBATCH) - 1
            leaves = ops.leaving[send]
            first = edges.leaves[stage] if leaves else edges.reaches[stage]
            stop = edges.leaves[stage + 1] if leaves else edges.reaches[stage + 1]
            for k in range(first, stop):
                edge = edges.leaving[k] if leaves else edges.reaching[k]
                if leaves or edges.gradient[edge]:
                    target = home[(edges.consumer[edge] if leaves else edges.producer[edge]) * last + m]
                    if target >= 0 and target != d:
                        lengths[d + 1] += 1
                        lengths[target + 1] += 1
    return 0


@kernel
def _communicate(  # type: ignore[no-untyped-def]
    flat, offsets, ops, edges, last, home, made, at, ready, out, ends, place, turns
):  # fmt: skip
    """Play the rows in rounds; `made` marks values (then gradients), `home` is the row of a stage's micro-batch."""
    rows = len(offsets) - 1
    slots = len(made) // 2
    messages = len(place) // 2
    count = 0
    moved = True
    while moved:
        moved = False
        for d in range(rows):
            ready[d] = 0
            if at[d] < offsets[d + 1]:
                action = flat[at[d]]
                stage = action >> STAGE & STAGES
                m = (action & MICROBATCH) - 1
                ready[d] = 1
                take = ops.takes[action >> OP]
                if take >= 0 and ops.leaving[take]:
                    for k in range(edges.leaves[stage], edges.leaves[stage + 1]):
                        edge = edges.leaving[k]
                        if edges.gradient[edge] and not made[slots + edges.consumer[edge] * last + m]:
                            ready[d] = 0
                elif take >= 0:
                    for k in range(edges.reaches[stage], edges.reaches[stage + 1]):
                        if not made[edges.producer[edges.reaching[k]] * last + m]:
                            ready[d] = 0
        for d in range(rows):
            if ready[d]:
                moved = True
                out[ends[d]] = flat[at[d]]
                ends[d] += 1
        for turn in range(4 * rows):  # what goes to the next row, to the one before, further on, and further back
            d = turn % rows if turn // rows % 2 == 0 else rows - 1 - turn % rows
            if not ready[d]:
                continue
            action = flat[at[d]]
            send = ops.makes[action >> OP]
            if send < 0:
                ready[d] = 0
                at[d] += 1
                continue
            stage = action >> STAGE & STAGES
            m = (action & MICROBATCH) - 1
            receive = ops.posts[send]
            leaves = ops.leaving[send]
            first = edges.leaves[stage] if leaves else edges.reaches[stage]
            stop = edges.leaves[stage + 1] if leaves else edges.reaches[stage + 1]
            if turn < 3 * rows and first < stop:
                edge = edges.leaving[first] if leaves else edges.reaching[first]
                target = home[(edges.consumer[edge] if leaves else edges.producer[edge]) * last + m]
                if target >= 0 and target != d:
                    back = target < d
                    near = target == d + 1 or target == d - 1
                    if turn // rows != (0 if near else 2) + back:
                        continue
            ready[d] = 0
            at[d] += 1
            made[(0 if leaves else slots) + stage * last + m] = 1
            for k in range(first, stop):
                edge = edges.leaving[k] if leaves else edges.reaching[k]
                if not leaves and not edges.gradient[edge]:
                    continue
                other = edges.consumer[edge] if leaves else edges.producer[edge]
                port = edges.consumer_port[edge] if leaves else edges.producer_port[edge]
                target = home[other * last + m]
                if target >= 0 and target != d:
                    out[ends[d]] = send << OP | (k - first) << PORT | stage << STAGE | (m + 1)
                    ends[d] += 1
                    out[ends[target]] = receive << OP | port << PORT | other << STAGE | (m + 1)
                    ends[target] += 1
                    own = (0 if leaves else messages) + edge * last + m
                    turns[count] = own
                    count += 1
                    place[own] = count
    for d in range(rows):  # what waits for ever is left as it is: the proof shows the cell
        while at[d] < offsets[d + 1]:
            out[ends[d]] = flat[at[d]]
            ends[d] += 1
            at[d] += 1
    return 0


@kernel
def _prefetch(flat, offsets, ops, edges, last, home, place, turns, message, sends, receives):  # type: ignore[no-untyped-def]
    """Move receives, in place, over at most one compute, and over messages behind which no sender has to wait.

    In every row the messages' places ascend, so that one order of all messages fits every row. A receive that goes
    before others gets a place before theirs, but behind that of the message before it on its sender's side. `message`
    numbers the message of every action, -1 for none; `sends` and `receives` are where each is sent and received.
    Messages are looked at in their order, `turns`: what stands before a send has then found its place.
    """
    gradients = len(place) // 2
    for i in range(len(flat)):
        op = flat[i] >> OP
        message[i] = -1
        if ops.group[op] == PAIR:
            stage = flat[i] >> STAGE & STAGES
            port = flat[i] >> PORT & PORTS
            leaves = ops.leaving[op]
            edge = edges.leaving[edges.leaves[stage] + port] if leaves else edges.reaching[edges.reaches[stage] + port]
            forward = leaves == ops.source[op]  # gradients are sent along edges that reach
            message[i] = (0 if forward else gradients) + edge * last + (flat[i] & MICROBATCH) - 1
            if ops.source[op]:
                sends[message[i]] = i
            else:
                receives[message[i]] = i
    for turn in range(len(turns)):
        own = turns[turn]
        if own < 0:
            break
        edge = own % gradients // last
        m = own % last
        maker = home[edges.producer[edge] * last + m]
        taker = home[edges.consumer[edge] * last + m]
        source = maker if own < gradients else taker
        target = taker if own < gradients else maker
        before = sends[own] - 1
        while before >= offsets[source] and message[before] < 0:
            before -= 1
        low = place[message[before]] if before >= offsets[source] else 0.0
        high = place[own]
        to = at = receives[own]
        computes = 0
        while to > offsets[target] and computes < 1:
            if message[to - 1] >= 0:
                if place[message[to - 1]] <= low:
                    break
                high = place[message[to - 1]]
            computes += ops.busy[flat[to - 1] >> OP]
            to -= 1
        before = to - 1
        while before >= offsets[target] and message[before] < 0:
            before -= 1
        if before >= offsets[target]:
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
                    sends[message[j]] = j
                else:
                    receives[message[j]] = j
        flat[to] = action
        message[to] = own
        receives[own] = to
    return 0
