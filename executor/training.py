"""The steps of a rank, from the first to the last: what is kept of each, and where the run ends.

     step   0 1 2   3 4 … 32            33 34 …
            warm-up recorded            the rest
     kept   time, loss, rate, norm of every step
                    every action's time

Recording every action of ten thousand steps would fill memories and disks, and take time; what a prediction is held
against are the first steps behind the warm-up, and the time of all.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from executor.checkpointing import Checkpointing
from executor.devices import Backend
from executor.ending import Ending
from executor.evaluations import Evaluations
from executor.nonfinite import watch
from executor.rank import Rank, Stamped, nothing
from executor.rates import Rates
from executor.recording import RankStep, events, recorded_by, recording_of
from executor.steps import append, encode, file_of
from planner.basis.errors import RUN_FAILED, PlanError
from planner.values.step import Step

WARM_UP_STEPS = 3
"""Steps that train and are not compared: memory is got, caches and threads settle."""

RECORDED_STEPS = 30
"""Steps whose every action is recorded, at most: as many as their median and its noise need."""

DIVERGED = "the loss is no number any more"

FLUSH_S = 1.0
"""Finished steps are written at most this often, so that writing does not disturb the steps."""


def recorded(steps: int, start: int = 0, have: int = 0) -> range:
    """Return which of a run's steps are recorded: those behind the warm-up, which is at most half of the run.

    One that goes on behind `start` steps warms up again, and records what is missing of those that it has (`have`).

    >>> recorded(20), recorded(10000), recorded(1), recorded(3)
    (range(3, 20), range(3, 33), range(0, 1), range(1, 3))
    >>> recorded(100, start=10), recorded(100, start=10, have=4), recorded(100, start=50, have=30)
    (range(13, 43), range(13, 39), range(53, 53))
    """
    first = start + min(WARM_UP_STEPS, (steps - start) // 2)
    return range(first, min(steps, first + max(0, RECORDED_STEPS - have)))


class _Done(msgspec.Struct):
    """A step whose numbers the device may still be computing."""

    begin: Any
    end: Any
    losses: list[torch.Tensor]
    rate: float
    norm: torch.Tensor | None
    stamped: list[Stamped]


class Training:
    """A run's steps on one rank.

    Without `rates` nothing is trained: a rehearsal.

    Losses and stamps are looked at when they are written, about once a second: looking at them means waiting for the
    device. `start` steps have been done in an earlier run.
    """

    def __init__(
        self,
        me: Rank,
        rates: Rates | None,
        backend: Backend,
        folder: Path,
        *,
        offset: float,
        where: str,
        start: int = 0,
    ) -> None:
        self.me, self.rates, self.backend, self.offset, self.where = me, rates, backend, offset, where
        self.rank = dist.get_rank()
        self.folder, self.start = folder, start
        self.steps_file, self.recorded_file = file_of(folder, self.rank), recording_of(folder, self.rank)
        self.pending: list[_Done] = []
        self.used: dict[int, float] = {}
        self.examined: int | None = None
        """The step in which every layer's output is looked at; it is the last one then."""
        self.written = start
        self.have = len(recorded_by(folder, self.rank)) if start else 0

    def run(
        self, steps: int, evaluations: Evaluations | None = None, checkpointing: Checkpointing | None = None
    ) -> int:
        """Train for so many steps, or until somebody asks for the end, and return how many there were.

        The model is evaluated in between where `evaluations` are due, and remembered where `checkpointing` is; no
        step's time has that in it.

        Raises `PlanError` (exit 6) when the loss is no number any more; the steps before are written.
        """
        self.me.begin(steps - self.start)
        ending = Ending(self.folder, self.backend, self.start, self.me.course.notice)
        window, flushed = recorded(steps, self.start, self.have), time.monotonic()
        begin, done, stopped, ended = self.backend.stamp(), self.start, False, False
        if self.rates is not None:
            self.me.updating, self.me.updated = self._note_rate, self.rates.step
        while done < steps and not ended:
            if done == self.examined:
                watch(self.me, self.folder, self.rank)
            self.me.step(stamping=done in window)
            rate = self._rate(done - self.start)
            end = self.backend.stamp()
            losses, stamped = list(self.me.losses.values()), self.me.stamped
            norm = self.me.all_gradients.found if self.me.all_gradients is not None else None
            self.pending.append(_Done(begin, end, losses, rate, norm, stamped))
            begin, done = end, done + 1
            if time.monotonic() - flushed > FLUSH_S:
                self.flush()
                flushed = time.monotonic()
            if done < steps and not stopped:
                behind = ending.here(done)
                if behind is not None:
                    self.me.course.end(behind - self.start)
                    steps, stopped = self.start + self.me.course.steps, True
            ended = done - 1 == self.examined or (stopped and done >= steps)
            judged = evaluations is not None and not ended and evaluations.due(done)
            whole = self.me.course.rolling is None or done == steps  # nothing is under way that would be forgotten
            kept = checkpointing is not None and whole and checkpointing.due(done, last=ended or done == steps)
            if judged or kept:
                self.flush()
                if evaluations is not None and judged:
                    evaluations.behind(done)
                if checkpointing is not None and kept:
                    checkpointing.save(done)
                begin, flushed = self.backend.stamp(), time.monotonic()
        self.me.updating = self.me.updated = nothing
        ending.close()
        self.flush()
        return done

    def _note_rate(self, step: int) -> None:
        if self.rates is not None:
            self.used.setdefault(step, self.rates.current)

    def _rate(self, done: int) -> float:
        """The rate of a step's updates, the first of which may come in the next step only: of an average beside it."""
        found = self.used.get(done, math.nan if self.rates is None else self.rates.current)
        self.used = {step: rate for step, rate in self.used.items() if step > done}
        return found

    def flush(self) -> None:
        """Write what has been done since the last time."""
        self.backend.synchronize()
        losses, norms = self._losses(), self._norms()
        good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        steps, traces = [], []
        for done, loss, norm in zip(self.pending[:good], losses, norms, strict=False):
            steps.append(Step(self._seconds(done.begin), self._seconds(done.end), loss, done.rate, norm))
            if done.stamped:
                found = events(self.me, done.stamped, self.rank, self.backend, self.offset)
                traces.append(msgspec.json.encode(RankStep(step=self.written + len(steps) - 1, events=found)) + b"\n")
        append(self.recorded_file, b"".join(traces))
        append(self.steps_file, encode(steps))
        self.written += good
        self.pending.clear()
        if good < len(losses):
            raise self._diverged(losses[good])

    def _losses(self) -> list[float]:
        """This rank's part of the mean loss of each step, fetched from the device at once."""
        parts = [part for done in self.pending for part in done.losses]
        fetched = iter(torch.stack([part.reshape(()) for part in parts]).tolist() if parts else ())
        return [sum(next(fetched) for _ in done.losses) for done in self.pending]

    def _norms(self) -> list[float]:
        """The norm of all gradients in each step, fetched at once."""
        found = [done.norm for done in self.pending if done.norm is not None]
        fetched = iter(torch.stack(found).tolist() if found else ())
        return [math.nan if done.norm is None else next(fetched) for done in self.pending]

    def _seconds(self, stamp: Any) -> float:
        return self.backend.seconds(stamp) + self.offset

    def _diverged(self, loss: float) -> PlanError:
        return PlanError(
            what=DIVERGED,
            where=f"{self.where}, step {self.written + 1}",
            why=f"it is {loss}: the model has diverged, or its loss divides by nothing",
            fix="lower the learning rate, or clip gradients: clip = 1.0; the steps before are kept in the run's folder",
            code=RUN_FAILED,
        )
