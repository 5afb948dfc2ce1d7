"""The one kind of error a person is meant to see: what, where, why, and the command that fixes it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Exit codes of every command (DESIGN.md, "What a user meets").
OK = 0
INTERNAL = 1
USAGE = 2
NOTHING_FITS = 3
ARTEFACT = 4
DEVICE = 5
RUN_FAILED = 6
TOLERANCE = 7
INTERRUPTED = 130


class PlanError(Exception):
    """A failure with a remedy.

    `what` happened, `where` (file, layer, field or rank), `why` (the value against its limit) and `fix`, a command
    or an edit; `code` is the process's exit status. `details` carries facts for `--json`.

    >>> print(PlanError(what="no plan fits", where="d0", why="needs 2 GiB, has 1", fix="plan simulate --k 4"))
    error: no plan fits
    where: d0
    why:   needs 2 GiB, has 1
    fix:   plan simulate --k 4
    """

    def __init__(
        self,
        *,
        what: str,
        where: str,
        why: str,
        fix: str,
        code: int = USAGE,
        details: object = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.fix = what, where, why, fix
        self.code = code
        self.details = details

    def __str__(self) -> str:
        return f"error: {self.what}\nwhere: {self.where}\nwhy:   {self.why}\nfix:   {self.fix}"


def said(text: str, *, code: int, details: object = None) -> PlanError | None:
    """Return the error that a text holds as it is printed, such as another process's; None where it holds none.

    >>> error = PlanError(what="no plan fits", where="d0", why="needs 2 GiB, has 1", fix="plan simulate --k 4")
    >>> said(f"PlanError: {error}", code=3).why
    'needs 2 GiB, has 1'
    """
    found = re.search(r"error: (.*?)\nwhere: (.*?)\nwhy:   (.*?)\nfix:   (.*)", text, re.DOTALL)
    if found is None:
        return None
    what, where, why, fix = found.groups()
    return PlanError(what=what, where=where, why=why, fix=fix, code=code, details=details)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like `name`, if any does.

    >>> nearest("gpip", ["gpipe", "1f1b"])
    'gpipe'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return matches[0] if matches else None


def unknown(kind: str, name: str, known: Iterable[str], *, where: str, fix: str, code: int = USAGE) -> PlanError:
    """Build the error for a name that is not in a registry or a store, with the nearest one that is."""
    names = list(known)
    close = nearest(name, names)
    why = f"did you mean '{close}'? " if close else ""
    why += f"known: {', '.join(names)}" if names else f"there is no {kind} yet"
    return PlanError(what=f"unknown {kind} '{name}'", where=where, why=why, fix=fix, code=code)
