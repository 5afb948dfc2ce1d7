"""What `plan run --resume` takes over from the run that it goes on with, and where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from planner.basis.errors import PlanError
from planner.basis.files import write
from planner.store import Store
from planner.values import plan_file
from planner.values.plan import Plan


class Resumed(NamedTuple):
    """An earlier run: its folder, the step of its newest sound checkpoint, what it was asked for, and its plan."""

    folder: Path
    step: int
    steps: int
    epochs: int
    seed: int
    plan: Plan

    def extent(self, steps: int | None, epochs: int | None, seed: int | None) -> tuple[int | None, int | None, int]:
        """Return the steps or epochs and the seed to go on with: as given, else the earlier run's.

        Raises `PlanError` (exit 2) for another seed, which has other batches, and where there is nothing left to do.
        """
        if seed is not None and seed != self.seed:
            raise PlanError(
                what="a run goes on with its own seed",
                where=f"--seed {seed}, --resume {self.folder.name}",
                why=f"it has {self.seed}: batches would be drawn in another order, some twice and some never",
                fix="leave --seed out",
            )
        if steps is None and epochs is None:
            steps, epochs = self.steps or None, self.epochs or None
        if steps is not None and steps <= self.step:
            raise PlanError(
                what=f"the run has its {self.step} steps",
                where=f"--resume {self.folder.name}",
                why=f"it was asked for {steps}",
                fix=f"say how many it is to have in all: --steps {2 * self.step}",
            )
        return steps, epochs, self.seed

    def plan_file(self, store: Store) -> str:
        """Return the path of its plan."""
        path = store.root / "plans" / f"{self.plan}.toml"
        write(path, plan_file.to_toml(self.plan).encode())
        return str(path)

    def check(self, plan: Plan) -> None:
        """Raise `PlanError` (exit 2) for a plan of other batches: nobody could say which samples were used."""
        if plan.batch != self.plan.batch:
            raise PlanError(
                what="the run has batches of another size",
                where=f"plan {plan}, --resume {self.folder.name}",
                why=f"it was trained with {self.plan.batch} samples per step, and the plan has {plan.batch}",
                fix=f"plan simulate --batch {self.plan.batch}, then plan run best --resume {self.folder.name}",
            )


def resumed(store: Store, reference: str) -> Resumed:
    """Return the run that is meant. Raises `PlanError` (exit 4) where there is none, or it has no checkpoint."""
    from executor.run import checkpoint_of

    folder = store.begun_run(reference)
    job, step = checkpoint_of(folder)
    return Resumed(folder, step, job.steps, job.epochs, job.seed, job.plan)
