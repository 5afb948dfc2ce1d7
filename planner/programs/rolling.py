"""A program without end: the rows of a plan without flush for any number of steps, in memory that does not grow.

Such a plan is unrolled over a few steps, and every row cut behind the last backward of each step. What lies between two
cuts fills the pipeline at first, is then the same in every step, and drains it at last:

    unrolled     filling | steady | steady | draining
    many steps   filling | steady | steady | steady | ... | steady | draining

That these are the rows of many steps is seen from programs that are unrolled over more of them: each is proved and
compared when a `Rolling` is made.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.basis.errors import PlanError
from planner.orders import codes, schedules
from planner.orders.action import Row, actions
from planner.orders.codes import Codes
from planner.orders.operations import FORWARD, LOAD, NUMBER, OPTIMIZER, TABLE
from planner.programs.lowering import unroll
from planner.programs.program import Program
from planner.programs.proof import InTurn, prove
from planner.values.plan import Plan, windows

TRIES = 3
"""Numbers of steps, each twice the one before, over which a plan is unrolled until its rows repeat themselves."""


class Rolling:
    """The rows of a run of at most so many steps, step by step: `row`. Of `None` any number of steps is a run.

    `program` is unrolled over `steps` of them, of which the first `filling` fill the pipeline and the last `draining`
    drain it. A run of few steps is unrolled as it is. Raises `PlanError` (exit 2) for a plan whose rows do not repeat
    themselves.
    """

    def __init__(self, plan: Plan, run: int | None = None, *, in_turn: InTurn = "per pair") -> None:
        self.plan, self.in_turn = plan, in_turn
        self.share = plan.microbatches // plan.pipelines
        self.steps = max(windows(plan), 3)
        self.filling = self.draining = 0
        if not any(self._unrolled(self.steps << again) for again in range(TRIES)):
            raise PlanError(
                what="the schedule does not repeat itself",
                where=f"plan {plan}",
                why=f"unrolled over {self.steps} steps, no two of them in the middle are alike",
                fix="choose another M: a multiple of every stage's replicas",
            )
        if run is not None and run < self.least:
            self.program, self.steps, self.filling, self.draining = self._proved(run), run, run, 0
            self.parts = [self._cut(row, run) for row in self.program.order]

    def _unrolled(self, steps: int) -> bool:
        """Unroll so many steps; return whether some in the middle are alike, and more of them would be, too."""
        self.steps, self.program = steps, self._proved(steps)
        self.parts = [self._cut(row, steps) for row in self.program.order]
        alike = np.array([self._alike(parts) for parts in self.parts]).all(axis=0)
        middle = steps // 2
        others = np.flatnonzero(~alike)
        self.filling = int(others[others < middle].max(initial=-1)) + 1
        self.draining = steps - int(others[others > middle].min(initial=steps))
        return steps > self.least and all(map(self._repeats, (1, 2)))

    def _proved(self, steps: int) -> Program:
        program = unroll(self.plan, steps=steps)
        prove(program, self.plan.microbatches * steps, in_turn=self.in_turn)
        return program

    def _cut(self, row: Codes, steps: int) -> list[Codes]:
        """Cut a row into its steps: each ends with its last backward and what stands before the next compute."""
        backwards = np.flatnonzero(TABLE.adds[codes.ops(row)])
        step = codes.microbatches(row[backwards]) % (self.share * steps) // self.share
        last = [int(backwards[step == window].max()) for window in range(steps)]
        begins = np.flatnonzero((TABLE.busy[codes.ops(row)] > 0) | (codes.ops(row) == NUMBER[LOAD]))
        cuts = np.append(begins, len(row))[np.searchsorted(begins, last, side="right")]
        return np.split(row, cuts[:-1])

    def _alike(self, parts: list[Codes]) -> list[bool]:
        """Which steps of a row are like the one in the middle."""
        steps = len(parts)
        own = [self._within(part, window, steps) for window, part in enumerate(parts)]
        return [np.array_equal(part, own[steps // 2]) for part in own]

    def _within(self, part: Codes, window: int, steps: int) -> Codes:
        """A step's actions, with micro-batches as its pipeline counts them from the step's first one on."""
        own = codes.microbatches(part) % (self.share * steps) - window * self.share
        found: Codes = np.stack([codes.kinds(part), np.where(part & codes.MICROBATCH, own, 0)])
        return found

    def _repeats(self, more: int) -> bool:
        """Whether the rows of so many more steps are these with a steady one repeated."""
        steps = self.steps + more
        for row, parts in zip(self._proved(steps).order, self.parts, strict=True):
            for window, part in enumerate(self._cut(row, steps)):
                source = self._source(window, steps)
                own = self._within(parts[source], source, self.steps)
                if not np.array_equal(self._within(part, window, steps), own):
                    return False
        return True

    def _source(self, window: int, steps: int) -> int:
        """Which of the unrolled steps one in a run of so many is like."""
        if window < self.filling:
            return window
        return max(self.filling, window - steps + self.steps) if window >= steps - self.draining else self.filling

    @property
    def least(self) -> int:
        """The fewest steps of a run that is put together from these."""
        return self.filling + self.draining + 1

    @cached_property
    def _actions(self) -> list[list[Row]]:
        return [[actions(part) for part in parts] for parts in self.parts]

    def row(self, device: int, window: int, steps: int) -> tuple[Row, int]:
        """Return what a row does in a step of a run of so many, as `program` has it, and by how many steps later."""
        source = self._source(window, steps)
        return self._actions[device][source], window - source

    def number(self, microbatch: int, later: int) -> int:
        """Return the number in the run of a micro-batch of `program`, so many steps later: M in each step."""
        pipeline, own = divmod(microbatch, self.share * self.steps)
        window, place = divmod(own, self.share)
        return (window + later) * self.plan.microbatches + pipeline * self.share + place

    def seen(self, stage: int, microbatch: int) -> int:
        """Return how many of a stage's updates the input stage knew of when it began a micro-batch of the run.

        Those of a stage are one for each turn of its replicas.
        """
        window, place = divmod(microbatch, self.plan.microbatches)
        known = min(window, self.steps - 1)
        first, own = (len(self.plan.holders[s]) // self.plan.pipelines for s in (0, stage))
        updates = self._known[known * self.share + place % self.share] + (window - known) * self.share // first
        return int(updates) * first // own

    @cached_property
    def _known(self) -> npt.NDArray[np.int64]:
        """The input stage's updates in front of its forward of every micro-batch of `program`, of one pipeline."""
        found = np.zeros(self.share * self.steps, np.int64)
        for row in self.program.order:
            forward = codes.has(row, FORWARD) & (codes.stages(row) == 0) & (codes.microbatches(row) < len(found))
            found[codes.microbatches(row[forward])] = np.cumsum(codes.has(row, OPTIMIZER))[forward]
        return found


def rolls(plan: Plan) -> bool:
    """Whether a plan is one without flush, whose steps have no end of their own."""
    return schedules.get(plan.schedule).asynchronous
