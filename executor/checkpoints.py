"""The checkpoints of a run: a folder each, there whole or not at all, of which the newest that is sound is taken.

    checkpoints/step-00000040/   checkpoint.json   what it is of, and every file's size and checksum
                                 .metadata *.distcp   weights and optimizer, by name (executor.checkpoint_files)
                                 rank0.pt rank1.pt    what has no name in the model (executor.state)

A checkpoint is written beside its name and renamed when all of it is on disk. The last two stay: one may be damaged.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from planner.basis.errors import ARTEFACT, PlanError
from planner.values.plan import Plan

FOLDER, PREFIX, MANIFEST = "checkpoints", "step-", "checkpoint.json"
KEPT = 2
_BLOCK = 2**20


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is of: so many steps of `steps`, of which `epoch` are an epoch (0: there are none)."""

    step: int
    steps: int
    epoch: int
    seed: int
    model: str
    plan: Plan
    files: dict[str, tuple[int, int]] = {}
    """Every file's bytes and checksum (CRC-32)."""


class Sound(msgspec.Struct, frozen=True):
    """A checkpoint that is as it was written."""

    path: Path
    manifest: Manifest


def begun(folder: Path, step: int) -> Path:
    """Return where the checkpoint behind a step is written before it has its name."""
    return folder / f".{_name(step)}.part"


def steps(folder: Path) -> list[int]:
    """Return the steps behind which a folder has checkpoints, the newest first."""
    return [int(path.name.removeprefix(PREFIX)) for path in _all(folder)]


def named(folder: Path, step: int) -> Path:
    """Return where the checkpoint behind a step is."""
    return folder / _name(step)


def finish(part: Path, manifest: Manifest) -> None:
    """Give what has been written its name, and remove what is older than the one before. Raises `OSError`."""
    files = {path.name: _sum(path) for path in sorted(part.iterdir())}
    body = msgspec.json.encode(msgspec.structs.replace(manifest, files=files))
    with (part / MANIFEST).open("wb") as file:
        file.write(b"%08x\n" % zlib.crc32(body) + body)
        file.flush()
        os.fsync(file.fileno())
    _sync(part)
    target = part.parent / _name(manifest.step)
    shutil.rmtree(target, ignore_errors=True)  # damaged, or the run would have gone on behind it
    part.rename(target)
    _sync(part.parent)
    for old in _all(part.parent)[KEPT:]:
        gone = old.with_name(f".{old.name}.part")
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what a run has left half written."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True)


def newest(folder: Path, say: Callable[[str], object]) -> Sound | None:
    """Return the newest checkpoint of a folder that is sound; `say` what is wrong with those that are newer."""
    for path in _all(folder):
        try:
            return opened(path)
        except PlanError as error:
            say(f"{error.what}: {path} ({error.why}); the one before it is used, if there is one")
    return None


def opened(path: Path) -> Sound:
    """Return a checkpoint when every file is as it was written; raises `PlanError` (exit 4) when not."""
    try:
        manifest = read(path).manifest
        for name, expected in manifest.files.items():
            if _sum(path / name) != expected:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError) as error:
        raise PlanError(
            what="a checkpoint is damaged",
            where=str(path),
            why=getattr(error, "strerror", None) or str(error),
            fix="use the one before it, or begin again",
            code=ARTEFACT,
        ) from error
    return Sound(path, manifest)


def read(path: Path) -> Sound:
    """Return a checkpoint that somebody else has found to be sound. Raises `OSError` or `ValueError` when it is not."""
    first, _, body = (path / MANIFEST).read_bytes().partition(b"\n")
    if int(first, 16) != zlib.crc32(body):
        raise ValueError(f"{MANIFEST} is damaged")
    return Sound(path, msgspec.json.decode(body, type=Manifest))


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    return sorted(folder.glob(f"{PREFIX}*"), reverse=True)


def _name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def _sum(path: Path) -> tuple[int, int]:
    size = found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, found = size + len(block), zlib.crc32(block, found)
    return size, found


def _sync(folder: Path) -> None:
    """Let the disk know what a folder has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
