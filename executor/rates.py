"""The learning rate of a stage's optimizer over a run, as the model file's `scheduler` says."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from executor.model_file import ModelFile
from executor.user_code import explained
from planner.basis.errors import PlanError


class Rates:
    """The scheduler of one optimizer. Every stage has its own of both, and all are told the same at the same steps.

    `judged` says whether the run evaluates its model.
    """

    def __init__(
        self, file: ModelFile, optimizer: torch.optim.Optimizer | None, steps: int, *, judged: bool = True
    ) -> None:
        self.path, self.optimizer = file.path, optimizer
        self.scheduler: LRScheduler | None = None
        if optimizer is None or file.scheduler is None:
            return
        with explained(file.path, "scheduler(optimizer)"):
            self.scheduler = file.scheduler(optimizer, steps)
        if isinstance(self.scheduler, ReduceLROnPlateau) and (file.evaluate is None or not judged):
            missing = "the model file has no evaluate()" if file.evaluate is None else "--evaluate-every is 0"
            raise PlanError(
                what="ReduceLROnPlateau has nothing to go by",
                where=f"{file.path}, scheduler(optimizer)",
                why=f"it lowers the rate when the validation loss no longer falls, and {missing}",
                fix="define evaluate() -> Dataset or DataLoader and evaluate, or return another scheduler",
            )

    @property
    def current(self) -> float:
        """The rate of the next step: of the optimizer's first group. NaN where nothing is trained."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else math.nan

    def step(self) -> None:
        """Go on to the rate of the next step."""
        if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            with explained(self.path, "scheduler(optimizer).step()"):
                self.scheduler.step()

    def judge(self, loss: float) -> None:
        """Tell a scheduler that goes by it the validation loss."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss)
