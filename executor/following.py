"""Follow a run from outside while its ranks train: their steps, as they write them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from executor.evaluations import evaluated
from executor.notes import noted
from executor.steps import Extent, announced, joined
from planner.values.evaluation import Evaluation
from planner.values.step import Step

Watch = Callable[[Extent, Sequence[Step], Sequence[Evaluation]], None]
"""Is told how many steps a run has, those that have been finished since the last time, and what was evaluated."""

EVERY_S = 0.5
"""Ranks write about once a second."""


@contextmanager
def following(
    folder: Path, ranks: int, watches: Sequence[Watch], say: Callable[[str], object] = lambda text: None
) -> Iterator[None]:
    """Tell all `watches`, in a thread of its own, the steps that all ranks have finished since the last time,
    and what the model was found to be behind them; `say` what ranks have noted.

    They are told once more when the run has ended, in whatever way, and not after that.
    """
    over = threading.Event()

    def follow() -> None:
        seen = judged = read = 0
        while True:
            last = over.wait(EVERY_S)
            for line in noted(folder, skip=read):
                say(line)
                read += 1
            extent = announced(folder)
            if extent is not None:
                steps = joined(folder, ranks, skip=seen)
                found = [e for e in evaluated(folder, skip=judged) if e.step <= seen + len(steps)]
                for watch in watches:
                    watch(extent, steps, found)
                seen += len(steps)
                judged += len(found)
            if last:
                return

    thread = threading.Thread(target=follow, name="following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
