"""Files that are either there whole or not at all, and what people write by hand."""

from __future__ import annotations

import codecs
import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from planner.basis.errors import ARTEFACT, PlanError


def toml(path: Path) -> bytes:
    """Return what a TOML file says, without the mark that some editors put before UTF-8. Raises `OSError`."""
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that no reader and no crash ever sees half of it.

    Raises `PlanError` (exit 4) when the folder cannot be written, or what has that name is no file of its own: a
    folder, a device, a link.
    """
    _replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _replaceable(path: Path) -> None:
    """Raise `PlanError` (exit 4) where something else than a file would be replaced, or a link followed."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing is there, or whatever it is will be said when it is written
    if stat.S_ISREG(mode):
        return
    kind = next((word for is_one, word in KINDS if is_one(mode)), "something else")
    to = f" to {os.readlink(path)}" if stat.S_ISLNK(mode) else ""
    raise PlanError(
        what=f"{path} is no file that could be replaced",
        where=str(path),
        why=f"it is {kind}{to}",
        fix="give the name of a new file, or of an ordinary one",
        code=ARTEFACT,
    )


KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def unwritable(path: Path, error: OSError) -> PlanError:
    """The error of a file or a folder that cannot be written."""
    return PlanError(
        what="a file cannot be written",
        where=str(path),
        why=error.strerror or str(error),
        fix="give a shorter name"
        if error.errno == errno.ENAMETOOLONG
        else "make the folder writable or free some space, or run plan in another folder",
        code=ARTEFACT,
    )
