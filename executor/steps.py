"""The steps of a run as its ranks write them while they train: a file per rank, five numbers per step.

    rank0.steps   begin, end, loss, rate, norm | begin, end, loss, rate, norm | ...

A rank's loss is its part of the mean, the norm is the whole model's. A step is known once every rank has written it
(`joined`).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import msgspec

from planner.basis.files import unwritable, write
from planner.values.step import Step

_FORMAT = struct.Struct("<5d")


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """How many steps a run has, and how many of them are an epoch; 0 where there are no epochs."""

    steps: int
    epoch: int = 0


def announce(folder: Path, extent: Extent) -> None:
    """Say that the training begins."""
    write(folder / "extent.json", msgspec.json.encode(extent))


def announced(folder: Path) -> Extent | None:
    """Return what a run's training will be, once it has begun."""
    path = folder / "extent.json"
    return msgspec.json.decode(path.read_bytes(), type=Extent) if path.exists() else None


def file_of(folder: Path, rank: int) -> Path:
    """Return where a rank writes its steps."""
    return folder / f"rank{rank}.steps"


def encode(steps: Iterable[Step]) -> bytes:
    """Return steps as they are written."""
    return b"".join(_FORMAT.pack(*step) for step in steps)


def append(path: Path, data: bytes) -> None:
    """Add to a file. Raises `PlanError` (exit 4) where that is impossible, such as on a full disk."""
    if not data:
        return
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise unwritable(path.parent, error) from error


def joined(folder: Path, ranks: int, skip: int = 0) -> list[Step]:
    """Return the steps that all ranks have written, without the first `skip`.

    A step begins when the one before it has ended on all ranks, or when the last of them goes on after a pause.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = file_of(folder, 0).write_bytes(encode([Step(0, 2, 0.0, 0.1), Step(2, 4, 0.0, 0.1)]))
    >>> _ = file_of(folder, 1).write_bytes(encode([Step(1, 3, 0.5, 0.1)]) + b"half")
    >>> joined(folder, 2)
    [Step(begin=1.0, end=3.0, loss=0.5, rate=0.1, norm=nan)]
    """
    found = [_read(file_of(folder, rank), skip) for rank in range(ranks)]
    return [
        Step(
            begin=max(step.begin for step in step_of),
            end=max(step.end for step in step_of),
            loss=sum(step.loss for step in step_of),
            rate=next((step.rate for step in step_of if not math.isnan(step.rate)), math.nan),
            norm=next((step.norm for step in step_of if not math.isnan(step.norm)), math.nan),
        )
        for step_of in zip(*found, strict=False)
    ]


def shorten(folder: Path, rank: int, steps: int) -> None:
    """Forget what a rank has written of the steps behind the first so many."""
    path = file_of(folder, rank)
    if path.exists():
        os.truncate(path, min(path.stat().st_size, steps * _FORMAT.size))


def begin_with(folder: Path, ranks: int, steps: Iterable[Step]) -> None:
    """Write the steps of an earlier run as if these ranks had done them: the first has all of their losses."""
    known = list(steps)
    for rank in range(ranks):
        own = known if rank == 0 else [step._replace(loss=0.0, rate=math.nan, norm=math.nan) for step in known]
        append(file_of(folder, rank), encode(own))


def _read(path: Path, skip: int) -> list[Step]:
    """The steps that were written to their end, behind the first `skip`."""
    try:
        with path.open("rb") as file:
            file.seek(skip * _FORMAT.size)
            data = file.read()
    except FileNotFoundError:
        return []
    whole = len(data) - len(data) % _FORMAT.size
    return [Step(*numbers) for numbers in _FORMAT.iter_unpack(data[:whole])]
