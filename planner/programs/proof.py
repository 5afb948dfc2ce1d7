"""The proof that a program computes a step and ends: what fails here is never started.

It works on the linked program, with the rule of who waits for whom that both interpreters follow: a transfer begins
when its last party has posted, even a send (gloo is rendezvous for every size).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders import codes
from planner.orders.action import Action
from planner.orders.codes import OP, Codes
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    NUMBER,
    OPERATIONS,
    PAIR,
    REDUCTIONS,
    TABLE,
)
from planner.programs.program import Program
from planner.programs.waits import MESSAGES, Linked, Links, disproved

Marks = npt.NDArray[np.bool_]
InTurn = Literal["per pair", "per device"]
"""Which messages are done in the order in which they are posted: those of one pair of devices, each way (gloo), or all
messages of a device (NCCL: batched point-to-point operations on one communicator)."""


def prove(program: Program, microbatches: int, *, backward: bool = True, in_turn: InTurn = "per device") -> Linked:
    """Prove that the program computes a step and ends, and return it linked.

    Every stage runs every micro-batch forward and, if the program has a `backward`, backward (whole, or input before
    weight) once, forward first, unless no gradient comes back along the edges that leave it. What an edge takes to
    another device is sent and received; messages between two devices are sent and received in the same order; all
    holders of a stage join its reductions; and nothing waits in a circle. What is proved `per device` also holds
    `per pair`. Raises `PlanError` with the bad cell marked in the grid.
    """
    linked = Linked(program)
    _prove_once(linked)
    _prove_computes(linked, microbatches, backward=backward)
    _prove_messages(linked, microbatches, backward=backward)
    _prove_reductions(linked)
    waiting = stuck(linked, in_turn)
    if waiting >= 0:
        raise disproved(linked, waiting, f"{linked.actions[waiting]} waits for ever")
    return linked


def _prove_once(linked: Linked) -> None:
    """No action occurs twice: those with a micro-batch in the whole program, others in their row."""
    flat = linked.flat
    own = np.where(flat & codes.MICROBATCH, -1, linked.row)
    order = np.lexsort((np.arange(len(flat)), own, flat))
    again = np.flatnonzero((np.diff(flat[order]) == 0) & (np.diff(own[order]) == 0))
    if len(again):
        position = int(order[again + 1].min())
        raise disproved(linked, position, f"{linked.actions[position]} occurs twice")


def _positions(linked: Linked, microbatches: int) -> dict[str, Codes]:
    """Position of every compute of a stage (first index) and micro-batch, -1 where there is none."""
    found = {}
    for op in (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT):
        found[op] = np.full((linked.stages, max(microbatches, linked.microbatches)), -1, np.int64)
        at = np.flatnonzero(codes.has(linked.flat, op))
        found[op][codes.stages(linked.flat[at]), codes.microbatches(linked.flat[at])] = at
    return found


def _prove_computes(linked: Linked, microbatches: int, *, backward: bool) -> None:
    at = _positions(linked, microbatches)
    row = np.append(linked.row, -1)
    forward = at[FORWARD][:, :microbatches]
    _missing(linked, forward < 0, FORWARD)
    if not backward:
        return
    due = _ends_or_returns(linked)[:, None]
    whole = at[BACKWARD][:, :microbatches]
    halves = [np.where(whole < 0, at[op][:, :microbatches], whole) for op in (BACKWARD_INPUT, BACKWARD_WEIGHT)]
    before = forward
    for op, part in zip((BACKWARD_INPUT, BACKWARD_WEIGHT), halves, strict=True):
        _missing(linked, due & (part < 0), BACKWARD)
        early = due & ((row[part] != row[before]) | (part < before))
        if early.any():
            stage, m = np.argwhere(early)[0].tolist()
            first = int(before[stage, m])
            name = Action(stage, BACKWARD if whole[stage, m] >= 0 else op, m)
            raise disproved(linked, first, f"{name} must follow {linked.actions[first]} on its device")
        before = part


def _ends_or_returns(linked: Linked) -> Marks:
    """Which stages have a backward: the last ones of the graph, and those to which a gradient comes back."""
    edges = linked.edges.table
    ends: Marks = np.diff(edges.leaves) == 0
    ends[edges.producer[edges.gradient > 0]] = True
    return ends


def _missing(linked: Linked, absent: Marks, op: str) -> None:
    if absent.any():
        stage, m = np.argwhere(absent)[0].tolist()
        raise disproved(linked, -1, f"{Action(stage, op, m)} is missing")


def _prove_messages(linked: Linked, microbatches: int, *, backward: bool) -> None:
    """What an edge takes to another device is sent and received, and pairs of devices agree on the order."""
    parties = linked.parties[: linked.messages]
    single = np.flatnonzero(np.isin(linked.posts, np.flatnonzero(parties == 1)) & (linked.posts < linked.messages))
    if len(single):
        action = linked.actions[int(single[0])]
        raise disproved(linked, int(single[0]), f"{action} has no {linked.program.counterpart(action)}")
    at = _positions(linked, microbatches)
    row = np.append(linked.row, -1)
    edges = linked.edges.table
    given = np.where(at[BACKWARD] < 0, at[BACKWARD_INPUT], at[BACKWARD])
    for op, make, take, used in (
        (MESSAGES[0], at[FORWARD][edges.producer], at[FORWARD][edges.consumer], np.ones(len(edges.gradient), bool)),
        (MESSAGES[1], given[edges.consumer], given[edges.producer], edges.gradient > 0),
    ):
        if op == MESSAGES[1] and not backward:
            continue
        base = int(linked.base[NUMBER[op]])
        sent = np.zeros(make.shape, bool)
        if base >= 0:
            sent[:, : linked.microbatches] = (
                linked.parties[base : base + linked.slots(op)].reshape(len(linked.edges), -1) > 0
            )
        there = used[:, None] & (make >= 0) & (take >= 0)
        wrong = there & np.where(row[make] == row[take], make > take, ~sent)
        if wrong.any():
            edge, m = np.argwhere(wrong)[0].tolist()
            position = int(take[edge, m])
            maker = linked.actions[int(make[edge, m])]
            raise disproved(linked, position, f"{linked.actions[position]} has nothing from {maker}")
    _prove_order(linked)


def _prove_order(linked: Linked) -> None:
    """Messages from one device to another are received in the order in which they are sent."""
    posting = np.flatnonzero((linked.posts >= 0) & (linked.posts < linked.messages))
    sending = TABLE.source[codes.ops(linked.flat[posting])] > 0
    sends, receives = posting[sending], posting[~sending]
    received = np.empty(linked.messages, np.int64)
    received[linked.posts[receives]] = receives
    message = linked.posts[sends]
    order = np.lexsort((sends, linked.target[message], linked.source[message]))
    sends, message = sends[order], message[order]
    same = (np.diff(linked.source[message]) == 0) & (np.diff(linked.target[message]) == 0)
    crossed = np.flatnonzero(same & (np.diff(received[message]) < 0))
    if len(crossed):
        first, second = (int(sends[crossed[0] + k]) for k in (0, 1))
        target = int(linked.target[message[crossed[0]]])
        names = linked.actions[first], linked.actions[second]
        raise disproved(linked, first, f"{names[0]} is sent where device {target} receives {names[1]}")


def _prove_reductions(linked: Linked) -> None:
    """Whoever holds a stage joins all reductions of its gradients; shared ones are added up alike in all replicas."""
    holders = np.array([len(rows) for rows in linked.program.holders])
    for op, _ in linked.planes:
        if op in REDUCTIONS:
            own = np.flatnonzero(codes.has(linked.flat, op))
            short = linked.parties[linked.posts[own]] < holders[codes.stages(linked.flat[own])]
            if short.any():
                position = int(own[short][0])
                raise disproved(linked, position, f"{linked.actions[position]} waits for ever: a holder does not join")
            awaited = [linked.row[of >= 0] * linked.transfers + of[of >= 0] for of in (linked.waits, linked.needs)]
            unused = ~np.isin(linked.row[own] * linked.transfers + linked.posts[own], np.concatenate(awaited))
            if unused.any():
                position = int(own[unused][0])
                raise disproved(linked, position, f"nothing waits for {linked.actions[position]}")
        elif OPERATIONS[op].group == "all":
            own = np.flatnonzero(codes.has(linked.flat, op))
            if len(own) != linked.devices or (linked.parties[linked.posts[own]] < linked.devices).any():
                position = int(own[0])
                raise disproved(linked, position, f"{linked.actions[position]} waits for ever: not every device joins")
        elif OPERATIONS[op].group == "tied":
            own = np.flatnonzero(codes.has(linked.flat, op))
            base = int(linked.base[NUMBER[op]])
            most = linked.parties[base : base + linked.slots(op)].reshape(linked.stages, -1).max(axis=1)
            short = linked.parties[linked.posts[own]] < most[codes.stages(linked.flat[own])]
            if short.any():
                position = int(own[short][0])
                raise disproved(linked, position, f"{linked.actions[position]} lacks a stage that shares parameters")


def stuck(linked: Linked, in_turn: InTurn) -> int:
    """Return the position of an action that waits for ever under a rule for the order of messages, or -1."""
    parties = linked.parties.copy()
    links = Links(linked.posts, linked.waits, linked.needs, parties, linked.source, linked.target, linked.also)
    begins = linked.offsets[:-1]
    come = _Come(begins.copy(), begins.copy(), begins.copy(), np.zeros(linked.transfers, np.int8))
    return _play(
        len(linked.flat),
        *(linked.flat, linked.offsets, TABLE, links, come, linked.messages, int(in_turn == "per device")),
    )


class _Come(NamedTuple):
    """How far a program has come.

    Of every row, `at` is the action it is at, `posted` the first that has not posted, `head` the first whose message is
    not done; of every transfer whether it is `done`.
    """

    at: Codes
    posted: Codes
    head: Codes
    done: npt.NDArray[np.int8]


@kernel
def _play(flat, offsets, ops, links, come, messages, strict):  # type: ignore[no-untyped-def]
    """Let every row go on until it waits for a transfer that is not done; again until none moves.

    A message is done when both ends have posted it and, if `strict`, it is the head of both. Parties that have not
    posted are counted down.
    """
    posts, waits, needs, missing, source, target, also = links
    at, posted, head, done = come
    rows = len(offsets) - 1
    moved = True
    while moved:
        moved = False
        for d in range(rows):
            i = at[d]
            while i < offsets[d + 1]:
                post = posts[i]
                if post >= 0 and i >= posted[d]:
                    missing[post] -= 1
                    moved = True
                    if missing[post] == 0 and not (strict and post < messages):
                        done[post] = 1
                posted[d] = max(posted[d], i + 1)
                free = needs[i] < 0 or done[needs[i]]
                t = waits[i]
                while t >= 0 and free:
                    free = done[t]
                    t = also[t] if len(also) > 0 else -1
                if not free:
                    break
                i += 1
            if i > at[d]:
                at[d] = i
                moved = True
            while strict and head[d] < posted[d]:
                post = posts[head[d]]
                if ops.group[flat[head[d]] >> OP] == PAIR and not done[post]:
                    if missing[post] > 0:
                        break
                    other = source[post] if target[post] == d else target[post]
                    while head[other] < posted[other] and (
                        ops.group[flat[head[other]] >> OP] != PAIR or done[posts[head[other]]]
                    ):
                        head[other] += 1
                    if posts[head[other]] != post:
                        break
                    done[post] = 1
                    moved = True
                head[d] += 1
    for d in range(rows):
        if at[d] < offsets[d + 1]:
            return at[d]
    for d in range(rows):
        if strict and head[d] < offsets[d + 1]:
            return head[d]
    return -1
