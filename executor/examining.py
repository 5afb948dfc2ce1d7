"""A step whose loss is no number, done again to learn which layer made the first such number."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from executor import checkpoints, nonfinite
from executor.launch import launch
from executor.steps import joined
from executor.worker import Job, main
from planner.basis.errors import PlanError

REPEAT_S = 120.0
"""Steps behind the last checkpoint are done again when they took no longer."""


def examine(error: PlanError, job: Job, folder: Path) -> None:
    """Say in the error of a run whose loss is no number which layer was the first, where that can be known soon.

    The steps from the last checkpoint of the run's folder on, or from the run's first, are done again beside it: they
    are the same again.
    """
    ranks = len(job.plan.devices)
    steps = joined(folder, ranks)
    home = next((one for one in (str(folder.resolve()), job.resume) if one and _remembered(one)), "")
    again = steps[_remembered(home) if home else 0 :]
    if sum(step.end - step.begin for step in again) > REPEAT_S:
        error.fix += "; with --checkpoint-every 100 the steps behind a checkpoint are done again to name the layer"
        return
    beside = folder / "examined"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        path = beside / "job.json"
        repeated = msgspec.structs.replace(
            job, folder=str(beside.resolve()), resume=home, checkpoint_every=0, examine=len(steps)
        )
        path.write_bytes(msgspec.json.encode(repeated))
        try:
            launch(main, str(path.resolve()), ranks, beside / "logs", kept=False)
        except PlanError as same:
            if same.what != error.what:
                return
        else:
            return  # it is not the same again: nobody knows
        found = nonfinite.first(beside)
        if found is None:
            error.why += "; what all layers make is finite, so it is the loss itself"
        else:
            error.where += f", layer {found.layer}, micro-batch {found.microbatch}"
            error.why += f"; this layer is the first that makes such a number: {found.why}"
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _remembered(folder: str) -> int:
    """The step of the last checkpoint of a run's folder; 0 where there is none."""
    return max(checkpoints.steps(Path(folder) / checkpoints.FOLDER), default=0)
