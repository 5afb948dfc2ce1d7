"""How far a command is, on stderr: bars on a terminal, elsewhere a line now and then, so that no wait is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from planner.basis.units import seconds
from planner.cli import output

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, Task

EVERY_S = 20.0
"""Where there is no terminal, a line comes so often."""


@contextmanager
def shown(*columns: ProgressColumn) -> Iterator[Progress]:
    """Show the tasks of what is done inside; nothing of it stays on a terminal."""
    from rich.progress import Progress

    bar = Progress(*columns, console=output.progress, transient=True)
    if output.progress.is_terminal:
        with bar:
            yield bar
        return
    done = threading.Event()
    begin = time.monotonic()

    def tell() -> None:
        while not done.wait(EVERY_S):
            for task in bar.tasks[-1:]:
                output.progress.print(f"{said(task)}, {seconds(time.monotonic() - begin)} so far", markup=False)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield bar
    finally:
        done.set()
        teller.join()


def said(task: Task) -> str:
    """Say in words how far a task is."""
    return f"{task.description}: {task.completed:g} of {task.total:g}" if task.total else task.description
