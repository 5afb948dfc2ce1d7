"""Who waits for whom in a program, as arrays: what the proof and both simulators walk.

Everything that takes time beside a device's own computing is a *transfer*: a message, a copy to or from the host, a
collective, a push to a server. Some actions *post* to a transfer; when its last party has posted, it begins; some
actions *wait* for it. Which do is said by the table of operations, and by the program's edges.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import NATURAL, kernel
from planner.basis.errors import PlanError
from planner.orders import codes
from planner.orders.action import Action, actions, grid
from planner.orders.codes import MICROBATCH, OP, PORT, PORTS, STAGE, STAGES
from planner.orders.operations import ALL, ALONE, ALWAYS, HOLDERS, NUMBER, OPERATIONS, OPS, PAIR, TABLE, TIED, named
from planner.programs.program import Program
from planner.values.holding import replicas_of

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
"""Numbers of transfers, positions and devices: half the memory of 64 bits, which is what the walk waits for."""

PLANES = tuple(dict.fromkeys(operation.posts for operation in OPERATIONS.values() if operation.posts))
"""Kinds of transfers, by the action that completes or starts them. A plane has one slot per stage (of messages: per
edge) and micro-batch."""
MESSAGES = named(end="target")
DRAWN, NEIGHBOURS = 4096, 6
"""Actions of a program that is drawn whole in an error; of a longer one, those before and behind the bad one."""


class Links(NamedTuple):
    """What `_link` writes: of every action what it posts to and waits for, of every transfer its parties and ends."""

    posts: Numbers
    waits: Numbers
    needs: Numbers
    parties: Numbers
    source: Numbers
    target: Numbers
    also: Numbers


class _Planes(NamedTuple):
    """Of every operation the first numbers of the transfers that it takes, needs, posts to and wants; -1 for none."""

    takes: Ints
    needs: Ints
    posts: Ints
    wants: Ints


class Linked:
    """A program's actions, flat, with what each posts to and waits for.

    `flat` are the codes of all rows, `offsets` where each row begins. `posts`, `waits` and `needs` hold a transfer's
    number, or -1: a compute waits for its message (`waits`) and for a copy or a gather (`needs`). `party` is as
    `posts`, and has also what an action is a party of without posting. Whoever waits for a message also waits for the
    message `also` of it, -1 for none: those along a stage's other edges; the array is empty where no stage has several.

    Transfers are numbered plane by plane, stage by stage (messages: edge by edge), micro-batch by micro-batch (or turn
    by turn); `parties` is how many post to each, 0 for a number that is not used. `source` and `target` are the devices
    of a message's two ends; of other transfers both are the (last) device that posts.
    """

    def __init__(self, program: Program) -> None:
        """Raise `PlanError` where an action names a stage, edge or micro-batch that the program does not have."""
        self.program, self.edges = program, program.edges
        self.flat, self.offsets = codes.flatten(program.order)
        self.devices = len(program.order)
        self.present, stages, self.microbatches = codes.extent(self.flat)
        self.stages = max(stages, self.edges.stages)
        self.base = np.full(len(OPS), -1, np.int64)
        count = 0
        for op in PLANES:
            if self._used(op):
                self.base[NUMBER[op]] = count
                count += self.slots(op)
        if max(count, len(self.flat)) >= 1 << 31:
            raise OverflowError(f"{len(self.flat)} actions with {count} transfers are more than 32 bits can number")
        table = self.edges.table
        several = len(self.edges) and max(np.diff(table.leaves).max(), np.diff(table.reaches).max()) > 1
        posts, waits, needs = (np.empty(len(self.flat), np.int32) for _ in range(3))
        source, target = (np.full(count, -1, np.int32) for _ in range(2))
        also = np.full(count if several else 0, -1, np.int32)
        links = Links(posts, waits, needs, np.zeros(count, np.int32), source, target, also)
        turns = np.full(2 * len(OPS) * self.stages, -1, np.int64)
        collective = any(OPERATIONS[op].group == "holders" and self.base[NUMBER[op]] >= 0 for op in PLANES)
        gathered = np.full(count if collective else 0, -1, np.int32)
        # Only what adds up shared parameters asks which replica a row is of: elsewhere nobody looks for the holders.
        tied = any(OPERATIONS[op].group == "tied" and self.base[NUMBER[op]] >= 0 for op in PLANES)
        replicas = np.array(replicas_of(program.holders, self.devices) if tied else (), np.int64)
        bad = _link(
            len(self.flat),
            *(self.flat, self.offsets, TABLE, self._planes(), self.edges.kinds, self.edges.stages, self.microbatches),
            *(turns, gathered, replicas, links),
        )
        if bad >= 0:
            raise disproved(self, bad, f"{self.actions[bad]} has no edge or micro-batch to go along")
        self.posts, self.waits, self.needs, self.parties, self.source, self.target, self.also = links
        self.party = posts

    def _planes(self) -> _Planes:
        """Return where the planes begin that an operation has to do with."""
        base = np.append(self.base, -1)  # that of no plane
        return _Planes(base[TABLE.takes], base[TABLE.needs], base[TABLE.posts], base[TABLE.wants])

    def _used(self, op: str) -> bool:
        parties = (o for o, operation in OPERATIONS.items() if operation.posts == op)
        return any(self.present[NUMBER[party]] > 0 for party in parties)

    def slots(self, op: str) -> int:
        """How many numbers a plane has."""
        return (len(self.edges) if op in MESSAGES else self.stages) * self.microbatches

    def buffered(self) -> Linked:
        """Return it with messages that begin when they are sent, whether or not their receive has been posted."""
        found = copy.copy(self)
        found.posts = np.where(codes.has(self.flat, *MESSAGES), -1, self.posts)
        found.parties = self.parties.copy()
        found.parties[: self.messages] -= self.parties[: self.messages] > 0
        return found

    @cached_property
    def ports(self) -> int:
        """How many edges a stage has at most on one side; at least 1."""
        return int(codes.ports(self.flat).max(initial=0)) + 1 if len(self.also) else 1

    @property
    def transfers(self) -> int:
        """How many numbers transfers have."""
        return len(self.parties)

    @cached_property
    def row(self) -> Ints:
        """Device of every action."""
        return np.repeat(np.arange(self.devices), np.diff(self.offsets))

    @cached_property
    def actions(self) -> list[Action]:
        """Every action, for people."""
        return list(actions(self.flat))

    @cached_property
    def planes(self) -> list[tuple[str, int]]:
        """The planes that are used, with the number of their first transfer."""
        return [(op, int(self.base[NUMBER[op]])) for op in PLANES if self.base[NUMBER[op]] >= 0]

    def receive(self, transfer: int) -> Action:
        """Return the receive of a message."""
        op, base = max((plane for plane in self.planes if plane[1] <= transfer), key=lambda plane: plane[1])
        edge, microbatch = divmod(transfer - base, self.microbatches)
        stage, port = self.edges.place(op, edge)
        return Action(stage, op, microbatch, port)

    def awaited(self, position: int) -> list[int]:
        """Return all transfers that an action waits for."""
        found = [int(self.needs[position])]
        transfer = int(self.waits[position])
        while transfer >= 0:
            found.append(transfer)
            transfer = int(self.also[transfer]) if len(self.also) else -1
        return [transfer for transfer in found if transfer >= 0]

    @cached_property
    def answers(self) -> Numbers:
        """For each message the next one back from whoever took it, -1 where there is none.

        When the answer has arrived the message's send is known to be complete.
        """
        answers = np.full(self.transfers, -1, np.int32)
        _answer(
            len(self.flat),
            *(self.flat, self.offsets, TABLE, self.waits, self.posts, self.also, self.source, self.target),
            *(self.messages, np.full(self.devices, -1, np.int64), answers),
        )
        return answers

    @property
    def messages(self) -> int:
        """How many numbers messages have: they come first."""
        return sum(self.slots(op) for op, _ in self.planes if op in MESSAGES)

    @cached_property
    def completions(self) -> Numbers:
        """Position at which each message's send is known to be complete, -1 where nothing says so."""
        takers = np.full(self.transfers + 1, -1, np.int32)  # the last for messages without answer
        _take(len(self.flat), self.waits, self.also, self.messages, takers)
        return takers[self.answers]


@kernel
def _link(flat, offsets, ops, planes, kinds, stages, last, turns, gathered, replicas, links):  # type: ignore[no-untyped-def]
    """One pass over all rows. Returns an action that names what is not there, or -1.

    The n-th gather or reduction of every holder join: `turns` counts them, with the row that has counted last. What
    adds up shared parameters joins rows of one replica (`replicas` says of which a row is), and has its number. What
    all rows join is there once.
    `gathered` is the transfer of every stage's and micro-batch's own gather or reduction.
    """
    posts, waits, needs, parties, source, target, also = links
    half = len(turns) // 2
    for d in range(len(offsets) - 1):
        for position in range(offsets[d], offsets[d + 1]):
            i = position & NATURAL
            action = flat[i]
            op = (action >> OP) & NATURAL
            stage = action >> STAGE & STAGES
            m = (action & MICROBATCH) - 1
            if stage >= stages:
                return i
            kind = (op * (stages + 1) + stage) & NATURAL
            group = ops.group[op]
            if group == PAIR:  # a message waits for nothing
                k = kinds.ports[kind] + (action >> PORT & PORTS)
                if m < 0 or k >= kinds.ports[kind + 1]:
                    return i
                own = (planes.posts[op] + kinds.ported[k & NATURAL] * last + m) & NATURAL
                if ops.source[op]:
                    source[own] = d
                else:
                    target[own] = d
                parties[own] += 1
                posts[i] = own
                waits[i] = needs[i] = -1
                continue
            post = wait = need = previous = -1
            plane = planes.takes[op]
            if plane >= 0 and m >= 0:
                for k in range(kinds.takes[kind], kinds.takes[kind + 1]):
                    t = (plane + kinds.taken[k & NATURAL] * last + m) & NATURAL
                    if target[t] == d:
                        if previous < 0:
                            wait = t
                        else:
                            also[previous] = t
                        previous = t
            slot = stage * last + m
            plane = planes.needs[op]
            if plane >= 0 and parties[plane + slot] > 0:
                need = plane + slot
            plane = planes.posts[op]
            if plane >= 0:
                post = plane + stage * last
                if group == HOLDERS:
                    turn = op * stages + stage
                    if turns[half + turn] != d:
                        turns[half + turn] = d
                        turns[turn] = 0
                    post += turns[turn]
                    turns[turn] += 1
                    if m >= 0:
                        gathered[plane + slot] = post
                elif group == TIED:
                    if replicas[d] >= last:
                        return i
                    post += replicas[d]
                elif group != ALL:  # what all join there is once in a step
                    if m < 0:
                        return i
                    post += m
                source[post] = d
                target[post] = d
                if ops.awaits[op] == ALWAYS or (ops.awaits[op] == ALONE and m < 0):
                    wait = post
                parties[post] += 1
            plane = planes.wants[op]
            if plane >= 0 and m >= 0:
                need = max(need, gathered[plane + slot])
            posts[i] = post
            waits[i] = wait
            needs[i] = need
    return -1


@kernel
def _take(waits, also, messages, takers):  # type: ignore[no-untyped-def]
    """Find the first action that waits for each message."""
    for i in range(len(waits) - 1, -1, -1):
        t = waits[i]
        while 0 <= t < messages:
            takers[t] = i
            t = also[t] if len(also) > 0 else -1
    return 0


@kernel
def _answer(flat, offsets, ops, waits, posts, also, source, target, messages, nearest, answers):  # type: ignore[no-untyped-def]
    """Find, from the end of each row, the send that answers each message; the first action to take it has the word.

    `nearest` is where the row sends to each other row next; what an earlier row wrote there lies before this one.
    """
    for d in range(len(offsets) - 1):
        for i in range(offsets[d + 1] - 1, offsets[d] - 1, -1):
            if ops.source[flat[i] >> OP]:
                nearest[target[posts[i]]] = i
            else:
                t = waits[i]
                while 0 <= t < messages:
                    known = nearest[source[t]]
                    answers[t] = posts[known] if known >= offsets[d] else -1
                    t = also[t] if len(also) > 0 else -1
    return 0


def taken(program: Program) -> dict[Action, tuple[Action, ...]]:
    """Return the receives that must have completed before each action that takes anything from outside its device.

    A recompute waits for the gradient as its backward does: `torch.utils.checkpoint` starts it from inside that.
    """
    linked = Linked(program)
    taking = np.flatnonzero((linked.waits >= 0) & (linked.waits < linked.messages)).tolist()
    return {
        linked.actions[i]: tuple(linked.receive(t) for t in linked.awaited(i) if t < linked.messages) for i in taking
    }


def completions(program: Program) -> dict[Action, tuple[Action, ...]]:
    """Return which sends are known to be complete once an action has its input, because of who waits for whom.

    A send that device p's action C has taken is complete when anything that p sent after C arrives. So a sender can
    let go of the tensor there without asking, and without ever waiting. Sends that nothing acknowledges are complete
    at the end of the step.
    """
    linked = Linked(program)
    known = linked.completions
    found: dict[Action, list[Action]] = defaultdict(list)
    for i in np.flatnonzero(codes.has(linked.flat, *named(end="source"))).tolist():
        if known[linked.posts[i]] >= 0:
            found[linked.actions[known[linked.posts[i]]]].append(linked.actions[i])
    return {action: tuple(done) for action, done in found.items()}


def waits_for_ever(linked: Linked, at: Sequence[int]) -> PlanError:
    """Return the error of a program whose rows have come to the positions `at`, and no further."""
    stuck = next(i for i, end in zip(at, linked.offsets[1:].tolist(), strict=True) if i < end)
    return disproved(linked, stuck, f"{linked.actions[stuck]} waits for ever")


def disproved(linked: Linked, position: int, why: str) -> PlanError:
    """Return the error of a program that is no step, with the bad cell (an index into `linked.flat`) marked."""
    device = int(np.searchsorted(linked.offsets, position, side="right")) - 1
    cell = (device, position - int(linked.offsets[device])) if position >= 0 else None
    where = f"device {cell[0]}, action {cell[1]}" if cell else "the whole program"
    if len(linked.flat) <= DRAWN:
        where += f"\n{grid(linked.program.order, mark=cell)}"
    elif cell:
        first = max(0, cell[1] - NEIGHBOURS)
        row = linked.program.order[device][first : cell[1] + NEIGHBOURS + 1]
        where += f"\n... {grid((row,), mark=(0, cell[1] - first))} ..."
    return PlanError(
        what="the program is not a valid step",
        where=where,
        why=why,
        fix="correct the schedule that generated it (planner/orders/schedules)",
    )
