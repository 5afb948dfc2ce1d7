"""What a person sees of a run while it trains: how far it is, the loss, the speed beside the predicted one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Protocol

from planner.basis.units import duration, rate, seconds
from planner.cli import output
from planner.values.evaluation import Evaluation
from planner.values.outcome import Outcome
from planner.values.step import Step

EVERY_S = 10.0
"""Where nobody can be shown one line that changes, a new line comes this often."""

LATEST = 100
"""The speed that is shown is the median of so many steps at most."""


class Extent(Protocol):
    """How many steps a run has, and how many an epoch has; 0 where there are no epochs."""

    @property
    def steps(self) -> int:
        """Of the run."""

    @property
    def epoch(self) -> int:
        """Of an epoch."""


def told(found: Evaluation) -> str:
    """Say what an evaluation has found.

    >>> told(Evaluation(step=200, loss=0.25, metrics={"accuracy": 0.9375}, samples=297, seconds=0.5))
    'step 200: validation loss 0.25, accuracy 0.9375 (297 samples in 500 ms)'
    """
    metrics = "".join(f", {name} {value:.4g}" for name, value in found.metrics.items())
    of = f"{found.samples} samples in {seconds(found.seconds)}"
    return f"step {found.step}: validation loss {found.loss:.4g}{metrics} ({of})"


class Progress:
    """The line that is shown of a run. `predicted` is what it is held against; a rehearsal `trains` nothing."""

    def __init__(self, predicted: Outcome, *, trains: bool = True) -> None:
        self.predicted, self.plan, self.trains = predicted, predicted.plan, trains
        self.done = 0
        self.latest: list[Step] = []
        self.live = output.progress.is_terminal
        self.shown = time.monotonic()

    def __call__(self, extent: Extent, steps: Sequence[Step], evaluations: Sequence[Evaluation] = ()) -> None:
        """Show how far the run is, with the steps that have been finished since the last time; evaluations stay."""
        self._show(extent, steps)
        for found in evaluations:
            self._print(told(found), end="\n")

    def _show(self, extent: Extent, steps: Sequence[Step]) -> None:
        self.done += len(steps)
        self.latest = [*self.latest, *steps][-LATEST:]
        over = self.done == extent.steps
        if not steps or (not self.live and not over and time.monotonic() - self.shown < EVERY_S):
            return
        self.shown = time.monotonic()
        self._print(self.line(extent), end="\r" if self.live and not over else "\n")

    def line(self, extent: Extent) -> str:
        """Say it in one line."""
        each = statistics.median(step.end - step.begin for step in self.latest)
        # Steps without flush overlap, and a clock may be coarse.
        each = each if each > 0 else self.predicted.step_s
        tokens = self.plan.sequence
        amount, unit = (self.plan.batch * tokens, "token") if tokens else (self.plan.batch, "sample")
        epochs = -(-extent.steps // extent.epoch) if extent.epoch else 0
        epoch = f" (epoch {(self.done - 1) // extent.epoch + 1} of {epochs})" if epochs else ""
        norm = "" if math.isnan(self.latest[-1].norm) else f", gradient norm {self.latest[-1].norm:.3g}"
        loss = f"loss {self.latest[-1].loss:.4g}{norm}, " if self.trains else ""
        left = duration((extent.steps - self.done) * each)
        return (
            f"step {self.done} of {extent.steps}{epoch}, {loss}"
            f"{rate(amount / each, unit)} (predicted {rate(amount / self.predicted.step_s, unit)}), {left} left"
        )

    def _print(self, line: str, end: str) -> None:
        width = output.progress.width
        try:
            output.progress.file.write(f"\x1b[2K{line[: width - 1]}{end}" if self.live else f"{line}{end}")
            output.progress.file.flush()
        except OSError:  # the terminal is gone, and the run goes on
            self.live = False
