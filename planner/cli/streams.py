"""stdout and stderr as they come: of any encoding, closed, full, or read by somebody who has seen enough."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import Any

from planner.basis.errors import ARTEFACT, PlanError

ALIKE = {"µ": "u", "·": ".", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "≤": "<=", "≥": ">=", "±": "+-"}
ALIKE |= {"→": "->", "←": "<-", "✓": "yes", "✗": "no", "─": "-", "━": "-", "│": "|", "┃": "|"}
"""What is printed where a terminal's encoding lacks a character; other lines of boxes are corners, others escaped."""


def _alike(character: str) -> str:
    if character in ALIKE:
        return ALIKE[character]
    if "\u2500" <= character <= "\u257f":
        return "+"
    return character.encode("ascii", "backslashreplace").decode()


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replace what cannot be encoded by ASCII that reads alike: an error handler of Python's codecs.

    >>> "2 µs … 3 µs".encode("ascii", "plain")
    b'2 us ... 3 us'
    """
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_alike, error.object[error.start : error.end])), error.end


codecs.register_error("plain", plain)


class UnprintableError(OSError):
    """stdout or stderr takes nothing more: the disk behind it is full, for instance."""


class _Stream(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnprintableError(*error.args) from None


def prepare() -> None:
    """Let stdout and stderr take any text, or go nowhere where they were closed; a full one raises `UnprintableError`.

    The answer alone goes to stdout: what a model file, its libraries or their processes print there goes to stderr.
    """
    for name in ("stderr", "stdout"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open as long as the program runs
            continue
        answers = name == "stdout"
        raw = _Stream(os.dup(stream.fileno()) if answers else stream.fileno(), "w", closefd=False)
        direct = stream.isatty() or not answers
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "plain", line_buffering=direct))
        if answers:
            os.dup2(sys.stderr.fileno(), stream.fileno())


def unprintable(error: UnprintableError) -> PlanError:
    """The error of an answer that nobody can read."""
    return PlanError(
        what="the answer cannot be printed",
        where="stdout",
        why=error.strerror or str(error),
        fix="free some space, or let stdout go elsewhere; what the command saved under .plan is there",
        code=ARTEFACT,
    )


def end() -> None:
    """Print what is left; what is printed from now on, by destructors for instance, goes to stderr.

    stdout and stderr go nowhere where they take nothing more, so that the program's end finds them writable.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # a stream of a test has no number
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
    sys.stdout = sys.stderr
