"""Files that are either there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from planner.basis.errors import ARTEFACT, PlanError


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that no reader and no crash ever sees half of it.

    Raises `PlanError` (exit 4) when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


def unwritable(folder: Path, error: OSError) -> PlanError:
    """The error of a folder that cannot be written."""
    return PlanError(
        what="a file cannot be written",
        where=str(folder),
        why=error.strerror or str(error),
        fix="make the folder writable or free some space, or run plan in another folder",
        code=ARTEFACT,
    )
