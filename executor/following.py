"""Follow a run from outside while its ranks train: their steps, as they write them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from executor.steps import Extent, announced, joined
from planner.values.step import Step

Watch = Callable[[Extent, Sequence[Step]], None]
"""Is told how many steps a run has, and those that have been finished since the last time."""

EVERY_S = 0.5
"""Ranks write about once a second."""


@contextmanager
def following(folder: Path, ranks: int, watches: Sequence[Watch]) -> Iterator[None]:
    """Tell all `watches`, in a thread of its own, the steps that all ranks have finished since the last time.

    They are told once more when the run has ended, in whatever way, and not after that.
    """
    over = threading.Event()

    def follow() -> None:
        seen = 0
        while True:
            last = over.wait(EVERY_S)
            extent = announced(folder)
            if extent is not None:
                steps = joined(folder, ranks, skip=seen)
                for watch in watches:
                    watch(extent, steps)
                seen += len(steps)
            if last:
                return

    thread = threading.Thread(target=follow, name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
