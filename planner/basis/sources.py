"""The files that a model consists of: the model file, and what it imports from its own folder."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

OURS = ("planner", "executor", "profiles", "reports")


def imported(model: Path) -> tuple[str, ...]:
    """Return the files beside or below a model file that are imported now, by their paths from its folder."""
    folder = model.resolve().parent
    found = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name.partition(".")[0] in OURS:
            continue
        if is_beside(model, file):
            found.add(Path(file).resolve().relative_to(folder).as_posix())
    return tuple(sorted(found))


def is_beside(model: Path, file: str) -> bool:
    """Whether a file is another one than the model file, beside or below it, and no installed library's."""
    path, own = Path(file).resolve(), model.resolve()
    return path != own and path.is_relative_to(own.parent) and "site-packages" not in path.parts


def digest(model: Path, sources: Iterable[str] = ()) -> str:
    """Return the hash of a model file and of what it imports; a file that is gone counts as empty."""
    found = hashlib.sha256(model.read_bytes())
    for source in sources:
        path = model.resolve().parent / source
        found.update(source.encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()
