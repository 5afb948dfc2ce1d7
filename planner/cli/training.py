"""What a person sees of a run while it trains: how far it is, the loss, the speed beside the predicted one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Protocol

from planner.basis.units import duration, rate
from planner.cli import output
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


class Progress:
    """The line that is shown of a run. `predicted` is what it is held against."""

    def __init__(self, predicted: Outcome) -> None:
        self.predicted, self.plan = predicted, predicted.plan
        self.done = 0
        self.latest: list[Step] = []
        self.live = output.progress.is_terminal
        self.shown = time.monotonic()

    def __call__(self, extent: Extent, steps: Sequence[Step]) -> None:
        """Show how far the run is, with the steps that have been finished since the last time."""
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
        left = duration((extent.steps - self.done) * each)
        return (
            f"step {self.done} of {extent.steps}{epoch}, loss {self.latest[-1].loss:.4g}, {rate(amount / each, unit)} "
            f"(predicted {rate(amount / self.predicted.step_s, unit)}), {left} left"
        )

    def _print(self, line: str, end: str) -> None:
        width = output.progress.width
        try:
            output.progress.file.write(f"\x1b[2K{line[: width - 1]}{end}" if self.live else f"{line}{end}")
            output.progress.file.flush()
        except OSError:  # the terminal is gone, and the run goes on
            self.live = False
