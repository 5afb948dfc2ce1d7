"""The messages of one rank while it walks over its row: which of them are on their way, and who waits for them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from planner.orders.action import Action
from planner.programs.program import Program
from planner.programs.waits import completions, taken


class Messages:
    """What a rank has posted and not waited for. `receiving` and `sending` are by the action that posted it."""

    def __init__(self, program: Program) -> None:
        self.takes, self.completions = taken(program), completions(program)
        self.receiving: dict[Action, list[dist.Work]] = {}
        self.sending: dict[Action, tuple[list[dist.Work], list[torch.Tensor]]] = {}

    def arrive(self, action: Action) -> None:
        """Wait for the messages that an action takes."""
        for receive in self.takes.get(action, ()):
            for work in self.receiving.pop(receive, ()):
                work.wait()

    def let_go(self, action: Action) -> None:
        """Let go of what was sent and is known to have been received by the time of an action, without waiting."""
        for send in self.completions.get(action, ()):
            for work in self.sending.pop(send)[0]:
                work.wait()  # complete already: its receiver has answered

    def finish(self, *, but: int = 0) -> None:
        """Wait until everything that was sent has been received, `but` the last so many."""
        for send in list(self.sending)[: max(0, len(self.sending) - but)]:
            for work in self.sending.pop(send)[0]:
                work.wait()
