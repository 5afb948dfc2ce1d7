"""When a run ends before its last step: a person asks for it, and all ranks end behind the same one."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from executor.devices import Backend
from executor.steps import announced

BETWEEN_S = 0.5
"""Ranks agree about this often whether to go on; more often only where a step takes longer."""


def ask(folder: Path) -> bool:
    """Ask the ranks of a run to end it, and return whether they will: they train, so there is something to save."""
    if announced(folder) is None:
        return False
    _file(folder).touch()
    return True


def asked(folder: Path) -> bool:
    """Whether somebody has asked for the end."""
    return _file(folder).exists()


def _file(folder: Path) -> Path:
    """The file whose existence asks."""
    return folder / "stop"


class Ending:
    """The ranks' agreement on whether to go on.

    Rank 0 looks whether somebody asks for the end, and says to all others what it saw and behind which step they agree
    next. All agree behind the same steps, so nobody waits for a rank that has ended. How many steps that is follows
    from their time and at most doubles, as the first ones are slow. `start` steps have been done in an earlier run.
    """

    def __init__(self, folder: Path, backend: Backend, start: int = 0) -> None:
        self.file, self.backend = _file(folder), backend
        self.last, self.next, self.since = start, start + 1, time.monotonic()

    def here(self, done: int) -> bool:
        """Return whether the run ends behind `done` steps. Every rank asks that behind every step."""
        if done < self.next:
            return False
        said = torch.tensor([self.file.exists(), done + self._ahead(done)], device=self.backend.device)
        if dist.get_world_size() > 1:
            dist.broadcast(said, 0)
        end, following = said.tolist()
        self.last, self.next, self.since = done, following, time.monotonic()
        return bool(end)

    def _ahead(self, done: int) -> int:
        """How many steps take `BETWEEN_S`."""
        passed = done - self.last
        each = (time.monotonic() - self.since) / passed
        return max(1, min(2 * passed, int(BETWEEN_S / max(each, 1e-9))))
