"""What the user's code raises, said in their terms: their file's line, the library's, and what to do about it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from planner.basis import sources
from planner.basis.errors import DEVICE, PlanError

LONGEST = 400
"""Characters of a library's message that are passed on."""
IMPORTING = "importing it"
"""What is done with a model file first."""


class explained:  # noqa: N801 - reads as a clause: with explained(path, "model()")
    """Turn an exception of the user's code into a `PlanError` that shows where in their file it came from."""

    def __init__(self, path: str, call: str, fix: str = "") -> None:
        self.path, self.call, self.fix = path, call, fix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (PlanError, KeyboardInterrupt, GeneratorExit)):
            return
        file = self.path.partition(":")[0]
        if _out_of_memory(error):
            raise PlanError(
                what=f"{self.call} needs more memory than this host gives",
                where=_where(file, error),
                why=_why(error),
                fix="run it where there is more memory, free some, or make it smaller: fewer samples, layers or tokens",
                code=DEVICE,
            ) from error
        raise PlanError(
            what=f"{self.call} fails",
            where=_where(file, error),
            why=_why(error),
            fix=self.fix or _fix(file, self.call, error),
        ) from error


def _out_of_memory(error: BaseException) -> bool:
    """Whether the host's memory was too small, which Python says with a class of its own and torch in words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def as_script(path: str) -> Iterator[None]:
    """Give a model file's code the arguments of a script without any, and go back to the folder it leaves.

    What it prints goes to stderr: stdout is for answers.
    """
    arguments, folder = sys.argv, os.getcwd()
    sys.argv = [path.partition(":")[0]]
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.argv = arguments
        if os.getcwd() != folder:
            os.chdir(folder)


def check_default_device(path: str) -> None:
    """Raise `PlanError` where a model file leaves a default device behind on which nothing can be computed."""
    with explained(path, "torch.set_default_device"):
        kind = torch.get_default_device().type
    if kind == "meta":
        raise PlanError(
            what="the default device has no data",
            where=path,
            why="torch.set_default_device('meta'): no layer can be timed there",
            fix="leave it out, or set it around what is made without data: with torch.device('meta')",
        )


def _where(file: str, error: BaseException) -> str:
    """The last line of the model file that was run, and what it called when that failed.

    That is the user's, where a file beside the model file failed, and a library's else.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename, file)}:{error.lineno}"
    source = Path(file).resolve()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    own = [frame for frame in frames if Path(frame.filename).resolve() == source]
    users = [frame for frame in frames if frame in own or sources.is_beside(source, frame.filename)]
    where = f"{file}:{own[-1].lineno}, in {own[-1].name}" if own else file
    last = users[-1] if users and users[-1] not in own else frames[-1] if frames else None
    if last is None or last in own:
        return where
    return f"{where}; inside {_short(last.filename, file)}:{last.lineno}, in {last.name}"


def _is_ours(filename: str) -> bool:
    folder = Path(__file__).resolve().parent.parent
    return filename.startswith("<") or any(Path(filename).is_relative_to(folder / room) for room in sources.OURS)


def _short(filename: str, file: str) -> str:
    """A file's path from where it is imported: the model file's folder, or a library's."""
    for start in (str(Path(file).resolve().parent), *sorted(sys.path, key=len, reverse=True)):
        if start and Path(filename).is_relative_to(start):
            return str(Path(filename).relative_to(start))
    return Path(filename).name


def _why(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ends the program with exit code {error.code}"
    text = str(error).strip()
    first = text.splitlines()[0] if text else "no message"
    if isinstance(error, FileNotFoundError) and error.filename and not os.path.isabs(str(error.filename)):
        first += f" (looked for from {os.getcwd()})"
    return f"{type(error).__name__}: {first if len(first) <= LONGEST else first[:LONGEST] + ' ...'}"


def _fix(file: str, call: str, error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return (
            "leave it out, or put it under if __name__ == '__main__'; the file is run without arguments, so those that "
            "it takes need defaults"
        )
    if "attempted relative import" in str(error):
        return "import what lies beside the model file by its name: import blocks, not from . import blocks"
    if call == IMPORTING:
        return f"correct it until python {file} works"
    tried = {"model()": "m.model()", "batch(": "m.batch(2)", "data()": "m.data()", "evaluate()": "m.evaluate()"}
    what = next((code for begin, code in tried.items() if call.startswith(begin)), None)
    if what is None:
        return f"correct it in {file}"
    return f'correct it until python -c "import {Path(file).stem} as m; {what}" works'
