"""The learning rates of the stages' optimizers over a run, as the model file's `scheduler` says."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from executor.model_file import ModelFile
from executor.user_code import explained
from planner.basis.errors import PlanError


class Rates:
    """The schedulers of one rank's optimizers, by stage. All stages are told the same at the same steps.

    `judged` says whether the run evaluates its model.
    """

    def __init__(
        self, file: ModelFile, optimizers: Mapping[int, torch.optim.Optimizer], steps: int, *, judged: bool = True
    ) -> None:
        self.path, self.optimizers = file.path, optimizers
        self.schedulers: dict[int, LRScheduler] = {}
        if file.scheduler is None:
            return
        for stage, optimizer in optimizers.items():
            with explained(file.path, "scheduler(optimizer)"):
                self.schedulers[stage] = file.scheduler(optimizer, steps)
        by_loss = any(isinstance(one, ReduceLROnPlateau) for one in self.schedulers.values())
        if by_loss and (file.evaluate is None or not judged):
            missing = "the model file has no evaluate()" if file.evaluate is None else "--evaluate-every is 0"
            raise PlanError(
                what="ReduceLROnPlateau has nothing to go by",
                where=f"{file.path}, scheduler(optimizer)",
                why=f"it lowers the rate when the validation loss no longer falls, and {missing}",
                fix="define evaluate() -> Dataset or DataLoader and evaluate, or return another scheduler",
            )

    @property
    def current(self) -> float:
        """The rate of the next step: of the first optimizer's first group. NaN where nothing is trained."""
        return next((float(one.param_groups[0]["lr"]) for one in self.optimizers.values()), math.nan)

    def step(self, stage: int) -> None:
        """Go on to the rate of a stage's next update."""
        scheduler = self.schedulers.get(stage)
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            with explained(self.path, "scheduler(optimizer).step()"):
                scheduler.step()

    def judge(self, loss: float) -> None:
        """Tell schedulers that go by it the validation loss."""
        for scheduler in self.schedulers.values():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
