"""Rehearse a plan: launch ranks that wait instead of computing, and gather what they measured into one outcome."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor.following import Watch, following
from executor.launch import launch
from executor.recording import memory_step
from executor.rehearsal import RehearsedRank
from executor.run import gathered
from executor.steps import Extent, announce
from executor.training import Training
from executor.worker import PATIENCE_S, clock_offset, join
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.rehearsal import Rehearsal


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of a rehearsal are told."""

    rehearsal: Rehearsal
    plan: Plan
    steps: int
    seed: int
    folder: str
    patience_s: float


def rehearse(
    rehearsal: Rehearsal,
    plan: Plan,
    *,
    steps: int,
    seed: int,
    folder: Path,
    capacity_bytes: tuple[float, ...],
    expected_step_s: float,
    watches: Sequence[Watch] = (),
) -> Outcome:
    """Perform so many steps of a plan and return what was measured; nothing is trained.

    `folder` receives each rank's results and log. Raises `PlanError` when a rank fails (exit 6), and
    `KeyboardInterrupt` at Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        rehearsal=rehearsal,
        plan=plan,
        steps=steps,
        seed=seed,
        folder=str(folder.resolve()),
        patience_s=max(PATIENCE_S, 10 * expected_step_s),
    )
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    with following(folder, len(plan.devices), watches):
        launch(main, str(path.resolve()), len(plan.devices), folder / "logs")
    measured = gathered(plan, folder, capacity_bytes)
    return msgspec.structs.replace(
        measured,
        source="rehearsed",
        losses=(),
        rates=(),
        norms=(),
        asked_steps=0,
        training_s=sum(measured.step_times_s),
    )


@record
def main(path: str) -> None:
    """Perform one rank of the job written at `path`. Rank and world come from torchrun's environment."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    folder, backend = Path(job.folder), join("cpu", 1, job.patience_s)
    rank = dist.get_rank()
    me = RehearsedRank(job.rehearsal, job.plan, backend, rank, seed=job.seed)
    gc.collect()
    offset = clock_offset(backend)
    if rank == 0:
        announce(folder, Extent(steps=job.steps))
    Training(me, None, backend, folder, offset=offset, where=f"rehearsal of {job.plan}").run(job.steps)
    found = memory_step(me, rank, backend, offset)
    (folder / f"rank{rank}.memory.json").write_bytes(msgspec.json.encode(found))
    dist.barrier()
    dist.destroy_process_group()
