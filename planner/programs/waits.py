"""Who waits for whom in a program, as arrays: what both simulators walk.

Everything that takes time beside a device's own computing is a *transfer*: a message, a copy to or from the host, a
collective, a push to a server. Some actions *post* to a transfer; when its last party has posted, it begins; some
actions *wait* for it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders import codes
from planner.orders.action import Action, actions
from planner.orders.codes import (
    MICROBATCH,
    OP,
    SAME,
    STAGE,
    STAGES,
)
from planner.orders.operations import OPERATIONS, named
from planner.programs.program import Program

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
"""Numbers of transfers, positions and devices: half the memory of 64 bits, which is what the walk waits for."""

PLANES = tuple(dict.fromkeys(operation.posts for operation in OPERATIONS.values() if operation.posts))
"""Kinds of transfers, by the action that completes or starts them. A plane has one slot per stage and micro-batch."""
MESSAGES = named(end="target")
COLLECTIVES = named(group="holders")
"""Planes whose n-th transfer of a stage joins the n-th action of every holder."""


class Linked:
    """A program's actions, flat, with what each posts to and waits for.

    `flat` are the codes of all rows, `offsets` where each row begins. `posts`, `waits` and `copies` hold a transfer's
    number, or -1: a compute waits for its message (`waits`) and for a copy or a gather (`copies`). Transfers are
    numbered plane by plane, stage by stage, micro-batch by micro-batch (or turn by turn); `parties` is how many post
    to each, 0 for a number that is not used. `source` and `target` are the devices of a message's two ends; of other
    transfers both are the (last) device that posts.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flat, self.offsets = codes.flatten(program.order)
        self.devices = len(program.order)
        self.present, self.stages, self.microbatches = codes.extent(self.flat)
        used = [self.present[codes.NUMBER[op]] > 0 for op in PLANES]
        self.slots = self.stages * self.microbatches
        self.base = np.full(len(codes.OPS), -1, np.int64)
        count = 0
        for op, is_used in zip(PLANES, used, strict=True):
            if is_used:
                self.base[codes.NUMBER[op]] = count
                count += self.slots
        if max(count, len(self.flat)) >= 1 << 31:
            raise OverflowError(f"{len(self.flat)} actions with {count} transfers are more than 32 bits can number")
        self.posts, self.waits, self.copies = (np.empty(len(self.flat), np.int32) for _ in range(3))
        self.parties = np.zeros(count, np.int32)
        self.source, self.target = (np.full(count, -1, np.int32) for _ in range(2))
        turns = np.zeros(3 * self.stages * any(self.base[codes.NUMBER[op]] >= 0 for op in COLLECTIVES), np.int64)
        _link(
            len(self.flat),
            *(self.flat, self.offsets, self.stages, self.microbatches, self.base, turns),
            *(self.posts, self.waits, self.copies, self.parties, self.source, self.target),
        )

    def buffered(self) -> Linked:
        """Return it with messages that begin when they are sent, whether or not their receive has been posted."""
        found = copy.copy(self)
        found.posts = np.where(codes.has(self.flat, *MESSAGES), -1, self.posts)
        found.parties = self.parties.copy()
        for op, base in self.planes:
            if op in MESSAGES:
                found.parties[base : base + self.slots] -= self.parties[base : base + self.slots] > 0
        return found

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
        return [(op, int(self.base[codes.NUMBER[op]])) for op in PLANES if self.base[codes.NUMBER[op]] >= 0]

    @cached_property
    def answers(self) -> Numbers:
        """For each message the next one back from whoever took it, -1 where there is none.

        When the answer has arrived the message's send is known to be complete.
        """
        answers = np.full(self.transfers, -1, np.int32)
        _answer(
            len(self.flat),
            *(self.flat, self.offsets, self.waits, self.posts, self.source, self.target, self.messages),
            *(np.full(self.devices, -1, np.int32), answers),
        )
        return answers

    @property
    def messages(self) -> int:
        """How many numbers messages have: they come first."""
        return self.slots * sum(op in MESSAGES for op, _ in self.planes)

    @cached_property
    def completions(self) -> Numbers:
        """Position at which each message's send is known to be complete, -1 where nothing says so."""
        takers = np.full(self.transfers + 1, -1, np.int32)  # the last for messages without answer
        _take(len(self.flat), self.waits, self.messages, takers)
        return takers[self.answers]


# The kernels know operations by number: constants, so that they can be compiled.
_F, _B, _I, _R = (codes.NUMBER[op] for op in ("F", "B", "I", "R"))
_SEND_F, _RECV_F, _SEND_B, _RECV_B = (codes.NUMBER[op] for op in ("SEND_F", "RECV_F", "SEND_B", "RECV_B"))
_OFFLOAD, _RELEASE, _FETCH = (codes.NUMBER[op] for op in ("OFFLOAD", "RELEASE", "FETCH"))
_UNSHARD_F, _UNSHARD_B = (codes.NUMBER[op] for op in ("UNSHARD_F", "UNSHARD_B"))
_REDUCE, _TIED, _PULL, _PUSH = (codes.NUMBER[op] for op in ("REDUCE_GRAD", "REDUCE_TIED", "PULL", "PUSH"))


@kernel
def _link(flat, offsets, stages, last, base, turns, posts, waits, copies, parties, source, target):  # type: ignore[no-untyped-def]
    """One pass over all rows."""
    for d in range(len(offsets) - 1):
        for i in range(len(turns)):
            turns[i] = 0
        for i in range(offsets[d], offsets[d + 1]):
            action = flat[i]
            op = action >> OP
            stage = action >> STAGE & STAGES
            at = stage * last + (action & MICROBATCH) - 1
            own = -1
            posts[i] = waits[i] = copies[i] = -1
            if op == _F:
                if base[_RECV_F] >= 0 and target[base[_RECV_F] + at] == d:
                    waits[i] = base[_RECV_F] + at
                gather = _UNSHARD_F
            elif op == _B or op == _I or op == _R:
                if base[_RECV_B] >= 0 and target[base[_RECV_B] + at] == d:
                    waits[i] = base[_RECV_B] + at
                if base[_FETCH] >= 0 and parties[base[_FETCH] + at] > 0:
                    copies[i] = base[_FETCH] + at
                gather = _UNSHARD_B
            else:
                gather = -1
                if op == _SEND_F:
                    own = base[_RECV_F] + at + last
                    source[own] = d
                elif op == _SEND_B:
                    own = base[_RECV_B] + at - last
                    source[own] = d
                elif op == _RECV_F or op == _RECV_B:
                    own = base[op] + at
                    target[own] = d
                elif op == _RELEASE:
                    copies[i] = base[_OFFLOAD] + at
                elif base[op] >= 0:
                    if op == _UNSHARD_F or op == _UNSHARD_B or op == _REDUCE:  # the n-th of every holder join
                        which = (op - _UNSHARD_F if op != _REDUCE else 2) * stages + stage
                        own = base[op] + stage * last + turns[which]
                        turns[which] += 1
                        if op == _REDUCE or action & MICROBATCH == 0:
                            waits[i] = own
                    elif op == _TIED:
                        own = base[op] + stage * last
                        waits[i] = own
                    else:
                        own = base[op] + at
                        if op == _PULL or op == _PUSH:
                            waits[i] = own
                    source[own] = d
                    target[own] = d
                if own >= 0:
                    posts[i] = own
                    parties[own] += 1
            if gather >= 0 and base[gather] >= 0:  # a gather is at most a few actions back
                j = i - 1
                while j >= offsets[d]:
                    if flat[j] >> OP == gather and (flat[j] & SAME) == (action & SAME):
                        copies[i] = posts[j]
                        break
                    if flat[j] >> OP <= _B and (flat[j] & SAME) == (action & SAME):
                        break
                    j -= 1
    return 0


@kernel
def _take(waits, messages, takers):  # type: ignore[no-untyped-def]
    """Find the first action that waits for each message."""
    for i in range(len(waits) - 1, -1, -1):
        if 0 <= waits[i] < messages:
            takers[waits[i]] = i
    return 0


@kernel
def _answer(flat, offsets, waits, posts, source, target, messages, nearest, answers):  # type: ignore[no-untyped-def]
    """Find, from the end of each row, the send that answers each message; the first action to take it has the word."""
    rows = len(offsets) - 1
    for d in range(rows):
        for other in range(rows):
            nearest[other] = -1
        for i in range(offsets[d + 1] - 1, offsets[d] - 1, -1):
            op = flat[i] >> OP
            if op == _SEND_F or op == _SEND_B:
                nearest[target[posts[i]]] = posts[i]
            elif 0 <= waits[i] < messages:
                answers[waits[i]] = nearest[source[waits[i]]]
    return 0


def completions(program: Program) -> dict[Action, tuple[Action, ...]]:
    """Return which sends are known to be complete once an action has its input, because of who waits for whom.

    A send that device p's action C has taken is complete when anything that p sent after C arrives. So a sender can
    let go of the tensor there without asking, and without ever waiting. Sends that nothing acknowledges are complete
    at the end of the step.
    """
    linked = Linked(program)
    known = linked.completions
    found: dict[Action, list[Action]] = defaultdict(list)
    for i in np.flatnonzero(codes.has(linked.flat, codes.SEND_FORWARD, codes.SEND_BACKWARD)).tolist():
        if known[linked.posts[i]] >= 0:
            found[linked.actions[known[linked.posts[i]]]].append(linked.actions[i])
    return {action: tuple(done) for action, done in found.items()}
