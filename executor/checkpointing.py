"""When a run's ranks write checkpoints together, and how they agree on the one from which they go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from executor import checkpoint_files, checkpoints, state
from executor.checkpoints import Manifest, Sound
from executor.evaluations import shorten as shorten_evaluations
from executor.notes import note
from executor.rank import Rank
from executor.rates import Rates
from executor.recording import shorten as shorten_recording
from executor.steps import shorten
from planner.basis.errors import ARTEFACT, PlanError


class Checkpointing:
    """The checkpoints of one rank's run, `every` so many steps and at its end; none where it is 0.

    `about` is what each of them says of the run, but for its step.
    """

    def __init__(self, me: Rank, rates: Rates, folder: Path, about: Manifest, every: int) -> None:
        self.me, self.rates, self.folder, self.about, self.every = me, rates, folder, about, every
        self.rank, self.last = dist.get_rank(), about.step
        if every:
            state.check(me, rates, self.rank, about.model)

    def due(self, done: int, *, last: bool = False) -> bool:
        """Whether the run is remembered behind so many steps, or behind its last ones."""
        return bool(self.every) and done != self.last and (last or done % self.every == 0)

    def save(self, done: int) -> None:
        """Write a checkpoint, all ranks together. Where one cannot, it is noted and the run goes on without it."""
        home = self.folder / checkpoints.FOLDER
        part = checkpoints.begun(home, done)
        with self.me.whole():
            written = self._written(part, done)
        failed = self._anywhere(not written)
        if self.rank == 0 and not failed:
            try:
                checkpoint_files.join(part, dist.get_world_size())
                checkpoints.finish(part, msgspec.structs.replace(self.about, step=done))
            except OSError as error:
                failed = True
                self._note(done, error)
        if self.rank == 0 and failed:
            shutil.rmtree(part, ignore_errors=True)
        if not failed:
            self.last = done

    def _written(self, part: Path, done: int) -> bool:
        try:
            part.mkdir(parents=True, exist_ok=True)
            checkpoint_files.write(part, self.rank, state.tensors_of(self.me, self.rank))
            torch.save(state.rest_of(self.me, self.rates, self.rank), part / f"rank{self.rank}.pt")
        except (OSError, RuntimeError, CheckpointException) as error:  # torch's writer raises the latter two
            self._note(done, error)
            return False
        return True

    def _anywhere(self, failed: bool) -> bool:
        """Whether something is so on any rank."""
        found = torch.tensor(float(failed), device=self.me.backend.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(found)
        return bool(found.item())

    def _note(self, done: int, error: BaseException) -> None:
        first = next((e for e, _ in error.failures.values()), error) if hasattr(error, "failures") else error
        lines = str(first).strip().splitlines() or [type(first).__name__]
        note(
            self.folder,
            f"rank {self.rank} cannot write the checkpoint behind step {done} ({lines[0]}): the run goes on, and the "
            "checkpoint before it is kept",
        )


def found_by_all(folder: Path, other: str, device: torch.device) -> Sound | None:
    """Return the checkpoint from which all ranks go on: the newest of the run's folder, else of the `other` run's.

    The first rank looks, and cleans up what an earlier attempt has left half written. Raises `PlanError` (exit 4) where
    there is none though the other's was asked for.
    """
    homes = [folder / checkpoints.FOLDER, *([Path(other) / checkpoints.FOLDER] if other else [])]
    found = None
    if dist.get_rank() == 0:
        checkpoints.clear(homes[0])
        found = next(
            (one for home in homes if (one := checkpoints.newest(home, lambda text: note(folder, text)))), None
        )
    told = torch.tensor([homes.index(found.path.parent), found.manifest.step] if found else [-1, 0])
    if dist.get_world_size() > 1:
        dist.broadcast(told, 0)
    home, step = told.tolist()
    if home < 0:
        if other:
            raise none(homes[-1])
        return None
    return found or checkpoints.read(checkpoints.named(homes[home], step))


def none(home: Path) -> PlanError:
    """The error of a run without checkpoints."""
    return PlanError(
        what="there is no checkpoint to go on from",
        where=str(home),
        why="the run was not asked for any, did not come to its first, or all are damaged",
        fix="run with --checkpoint-every 100, or begin again without --resume",
        code=ARTEFACT,
    )


def forget_behind(folder: Path, rank: int, step: int) -> None:
    """Forget what a rank has written of steps that are to be trained again."""
    shorten(folder, rank, step)
    shorten_recording(folder, rank, step)
    if rank == 0:
        shorten_evaluations(folder, step)
