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

    Where steps overlap, rank 0 comes to the end of a step later than others, and has begun the next ones. What it says
    is heard so many steps later (`notice`), when nobody has to wait for it, and the end is as many behind that.
    """

    def __init__(self, folder: Path, backend: Backend, start: int = 0, notice: int = 0) -> None:
        self.file, self.backend, self.notice = _file(folder), backend, notice
        self.last, self.next, self.since = start, start + 1, time.monotonic()
        self.said: torch.Tensor | None = None
        self.saying: dist.Work | None = None

    def here(self, done: int) -> int | None:
        """Return behind which step the run ends, once that is known. Every rank asks that behind every step."""
        if self.said is None and done >= self.next:
            self._say(done)
        if self.said is None or done < self.last + self.notice:
            return None
        end, following = self._heard()
        self.next = following
        return done + self.notice if end else None

    def close(self) -> None:
        """Hear what has been said: nobody asks any more."""
        if self.said is not None:
            self._heard()

    def _say(self, done: int) -> None:
        following = done + max(self._ahead(done), self.notice)
        self.said = torch.tensor([self.file.exists(), following], device=self.backend.device)
        if dist.get_world_size() > 1:
            self.saying = dist.broadcast(self.said, 0, async_op=True)
        self.last, self.since = done, time.monotonic()

    def _heard(self) -> tuple[int, int]:
        assert self.said is not None, "it has been said"
        if self.saying is not None:
            self.saying.wait()
        end, following = self.said.tolist()
        self.said = self.saying = None
        return end, following

    def _ahead(self, done: int) -> int:
        """How many steps take `BETWEEN_S`."""
        passed = done - self.last
        each = (time.monotonic() - self.since) / passed
        return max(1, min(2 * passed, int(BETWEEN_S / max(each, 1e-9))))
