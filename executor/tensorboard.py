"""A run's curves as TensorBoard reads them, written while it trains by torch's SummaryWriter."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.steps import Extent
from planner.basis.errors import PlanError
from planner.values.evaluation import Evaluation
from planner.values.step import Step

POINTS = 50
"""Each time that steps come, about twice a second, a curve gets so many points at most; each is a mean of steps."""


class Curves:
    """The scalars of a run of so many samples per step.

    They are loss, learning_rate, samples_per_s, validation/… and, where gradients are clipped, gradient_norm.

    Raises `PlanError` where the package is not installed. A disk that is full ends the curves, not the run: `lost`
    then says why.
    """

    def __init__(self, folder: Path, batch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise PlanError(
                what="--tensorboard needs the package tensorboard",
                where="--tensorboard",
                why=str(error),
                fix="pip install tensorboard   (or: pip install 'foreplan[tensorboard]')",
            ) from error
        self.batch, self.done, self.lost = batch, 0, ""
        self.writer: Any = self._careful(SummaryWriter, str(folder))

    def __call__(self, extent: Extent, steps: Sequence[Step], evaluations: Sequence[Evaluation] = ()) -> None:
        """Write the steps that have been finished since the last time, and what was evaluated."""
        each = max(1, math.ceil(len(steps) / POINTS))
        for start in range(0, len(steps), each):
            some = steps[start : start + each]
            number = self.done + start + len(some)
            self.scalar("loss", statistics.fmean(step.loss for step in some), number)
            if not math.isnan(some[-1].rate):
                self.scalar("learning_rate", some[-1].rate, number)
            norms = [step.norm for step in some if not math.isnan(step.norm)]
            if norms:
                self.scalar("gradient_norm", statistics.fmean(norms), number)
            took = sum(step.end - step.begin for step in some)
            if took > 0:
                self.scalar("samples_per_s", len(some) * self.batch / took, number)
        self.done += len(steps)
        for found in evaluations:
            for name, value in {"loss": found.loss, **found.metrics}.items():
                self.scalar(f"validation/{name}", value, found.step)
        if (steps or evaluations) and self.writer is not None:
            self._careful(self.writer.flush)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        if self.writer is not None:
            self._careful(self.writer.add_scalar, name, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self.writer is not None:
            self._careful(self.writer.close)

    def _careful(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            self.writer, self.lost = None, error.strerror or str(error)
            return None
