"""What passes between a rank and others while it walks over its row: by the action that posts it, edge and micro-batch.

A buffer is made when its receive is posted, and is its taker's from then on. What is sent lives until somebody's answer
says that it has been received, so nobody waits for a send before the end of a step.

Actions are the program's. What is on its way has the names that `named` gives them: in a run without flush the same
action is done again and again, each time with another micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from executor.boundaries import Described
from executor.torch_adapter import post
from planner.orders.action import Action
from planner.programs.program import Program
from planner.programs.waits import completions, taken

Tensors = tuple[torch.Tensor, ...]


class Arrived(NamedTuple):
    """A message that has come: the program's receive, what that has noted, and bytes."""

    receive: Action
    since: Any
    nbytes: int


class Mailbox:
    """The messages of one rank over `group`, to which all ranks of the program belong in the order of its rows."""

    def __init__(
        self,
        program: Program,
        group: dist.ProcessGroup | None,
        device: torch.device,
        named: Callable[[Action], Action] = lambda action: action,
    ) -> None:
        self.group, self.device, self.named = group, device, named
        self.since: dict[Action, Any] = {}
        self.walk(program)
        self.receiving: dict[Action, list[dist.Work]] = {}
        self.arriving: dict[Action, Tensors] = {}
        self.sending: dict[Action, tuple[list[dist.Work], Tensors]] = {}

    def walk(self, program: Program) -> None:
        """Begin to walk over a program, with nothing under way."""
        self.program = program
        self.takes, self.completions = taken(program), completions(program)

    def receive(self, action: Action, described: Sequence[Described]) -> None:
        """Post a receive into new buffers."""
        buffers = tuple(one.empty(self.device) for one in described)
        self.arriving[self.named(action)] = buffers
        self.receiving[self.named(action)] = self._post(dist.irecv, action, buffers)

    def send(self, action: Action, tensors: Sequence[torch.Tensor]) -> None:
        """Post a send; what is not contiguous is copied, as backends ask."""
        whole = tuple(tensor.detach().contiguous() for tensor in tensors)
        self.sending[self.named(action)] = self._post(dist.isend, action, whole), whole

    def _post(self, how: Callable[..., Any], action: Action, tensors: Tensors) -> list[dist.Work]:
        peer = self.program.where[self.program.counterpart(action)]
        return post([dist.P2POp(how, tensor, peer, self.group) for tensor in tensors])

    def posted(self, action: Action, stamp: Any) -> None:
        """Note when a receive has been posted."""
        self.since[self.named(action)] = stamp

    def arrive(self, action: Action) -> list[Arrived]:
        """Wait for the messages that an action takes, and return those for which nobody has waited before."""
        found = []
        for receive in self.takes.get(action, ()):
            own = self.named(receive)
            for work in self.receiving.pop(own, ()):
                work.wait()
            if own in self.since:
                found.append(Arrived(receive, self.since.pop(own), sum(t.nbytes for t in self.arriving[own])))
        return found

    def take(self, receive: Action) -> Tensors:
        """Return what has arrived by a receive; it is the taker's now."""
        return self.arriving.pop(receive)

    def let_go(self, action: Action) -> None:
        """Let go of what was sent and is known to have been received by the time of an action, without waiting."""
        for send in self.completions.get(action, ()):
            for work in self.sending.pop(self.named(send))[0]:
                work.wait()  # complete already: its receiver has answered

    def finish(self, *, but: int = 0) -> None:
        """Wait until everything that was sent has been received, `but` the last so many."""
        for send in list(self.sending)[: max(0, len(self.sending) - but)]:
            for work in self.sending.pop(send)[0]:
                work.wait()

    def held(self) -> tuple[Tensors, ...]:
        """Return the buffers into which something may be written now, or has been and was not taken."""
        return tuple(self.arriving.values())
