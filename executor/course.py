"""What a rank does in each of a run's steps: the same row again and again, or its part of a program without end.

Micro-batches have numbers that nothing else under way has: within the step where steps end, else M in each step, from
the run's first on. A program's actions have its own (`planner.programs.rolling`).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.orders import schedules
from planner.orders.action import Action, Row
from planner.programs.lowering import lower
from planner.programs.program import Program
from planner.programs.proof import InTurn
from planner.programs.rolling import Rolling, rolls
from planner.values.plan import Plan


class Course:
    """The rows of one device, step by step; `done` counts the steps.

    Steps that overlap are those of a run, which `begin` begins with nothing under way.
    """

    def __init__(self, plan: Plan, device: int, in_turn: InTurn) -> None:
        self.plan, self.device, self.in_turn = plan, device, in_turn
        self.rolling = Rolling(plan, in_turn=in_turn) if rolls(plan) else None
        self.program: Program = self.rolling.program if self.rolling else lower(plan, in_turn=in_turn)
        self.row: Row = self.program.rows[device]
        self.done = self.first = self.steps = self.later = 0
        self.pipeline = device * plan.pipelines // len(plan.groups)
        self.share = plan.microbatches // plan.pipelines

    def begin(self, steps: int) -> None:
        """Begin a run of so many steps."""
        self.first, self.steps = self.done, steps
        if self.rolling is not None:
            self.rolling = Rolling(self.plan, steps, in_turn=self.in_turn)
            self.program = self.rolling.program

    @property
    def notice(self) -> int:
        """How many steps before the run's end a rank has to know of it: those that drain the pipeline."""
        return self.rolling.draining if self.rolling is not None else 0

    def end(self, step: int) -> None:
        """End the run earlier, behind so many of its steps."""
        self.steps = min(self.steps, max(step, self.rolling.least if self.rolling is not None else 0))

    def next(self) -> Row:
        """Return the actions of the next step."""
        if self.rolling is not None:
            self.row, self.later = self.rolling.row(self.device, self.done - self.first, self.steps)
        return self.row

    @property
    def over(self) -> bool:
        """Whether nothing is under way behind the step that `next` has returned."""
        return self.rolling is None or self.done + 1 == self.first + self.steps

    def named(self, action: Action) -> Action:
        """Return an action of the program with its micro-batch's own number."""
        if self.rolling is None or action.microbatch is None:
            return action
        return action._replace(microbatch=self.rolling.number(action.microbatch, self.later))

    def place(self, microbatch: int) -> tuple[int, int]:
        """Return the step of a micro-batch, counted from the rank's first, and its number in that step."""
        if self.rolling is None:
            return self.done, microbatch
        step, place = divmod(microbatch, self.plan.microbatches)
        return self.first + step, place

    def taken(self, stage: int, microbatch: int) -> range:
        """Return the micro-batches that the rank takes of a stage in a step, from one on."""
        step = microbatch - microbatch % self.plan.microbatches
        return range(microbatch, step + (self.pipeline + 1) * self.share, self.plan.turns[stage])

    def following(self, stage: int, microbatch: int) -> int | None:
        """Return the micro-batch that the rank takes of a stage behind one, None behind the run's last."""
        own = self.taken(stage, microbatch)
        if len(own) > 1:
            return own[1]
        step, turns = microbatch // self.plan.microbatches + 1, self.plan.turns[stage]
        if step == self.steps:
            return None
        return step * self.plan.microbatches + self.pipeline * self.share + microbatch % self.share % turns

    def reads(self, stage: int) -> Callable[[int, int], int]:
        """Return which version of a stage's parameters a micro-batch is computed with; they are counted from 0 on.

        It takes the micro-batch and the newest version that there is when its forward begins.
        """
        rolling = self.rolling
        assert rolling is not None, "where steps end there is one version"
        match schedules.get(self.plan.schedule).reads:
            case "own stage":
                return lambda m, newest: newest
            case "input stage":
                return lambda m, newest: min(newest, rolling.seen(stage, m))
            case "window before":
                return lambda m, newest: max(0, m // self.plan.microbatches - 1)
