"""Waiting instead of computing, for as long as a profile says, and holding as many bytes: without core or memory."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from executor.devices import own_mapping
from planner.values.rehearsal import Row

_PR_SET_TIMERSLACK = 29  # from linux/prctl.h
LATENESS_WAITS, LATENESS_WAIT_S = 50, 2e-3
_PIECE = 2**30
"""Bytes of one allocation at most: the kernel refuses a single one that is larger than the memory."""


class Waits:
    """The waits of one rank: medians, or with `jitter` drawn from their percentiles, from a seed of the rank's own.

    They end by the clock, without spinning: the cores are for those who have something to do.
    """

    def __init__(self, row: Row, quantiles: Sequence[float], *, jitter: bool, seed: int) -> None:
        self.seconds, self.quantiles, self.jitter = row.seconds, tuple(quantiles), jitter
        self.random = random.Random(seed)
        self.middle = min(range(len(quantiles)), key=lambda i: abs(quantiles[i] - 0.5))
        precise_sleep()

    @contextmanager
    def waiting(self, stage: int, op: str) -> Iterator[None]:
        """Let what is done inside take as long as an operation of a stage: wait for what is left at its end."""
        end = time.monotonic() + self.seconds_of(stage, op)
        yield
        left = end - time.monotonic()
        if left > 0:
            time.sleep(left)

    def seconds_of(self, stage: int, op: str) -> float:
        """Return how long the next one takes; 0 of an operation that takes no time."""
        spread = self.seconds.get(f"{stage}{op}")
        if spread is None:
            return 0.0
        return self._drawn(spread) if self.jitter else spread[self.middle]

    def _drawn(self, spread: Sequence[float]) -> float:
        """Draw as the simulator does (`planner.costs.priced.Costs.drawn`): never beyond what was measured."""
        share = min(max(self.random.random(), self.quantiles[0]), self.quantiles[-1])
        points = zip(pairwise(self.quantiles), pairwise(spread), strict=True)
        for (low, high), (below, above) in points:
            if share <= high:
                return below + (above - below) * (share - low) / (high - low)
        return spread[-1]


def precise_sleep() -> None:
    """Tell the kernel to wake this thread as soon as its time has come, where it would gather wake-ups for 50 us."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)


def lateness() -> float:
    """Return by how many seconds a wait ends late on this machine: the median of some."""
    precise_sleep()
    late = []
    for _ in range(LATENESS_WAITS):
        begin = time.monotonic()
        time.sleep(LATENESS_WAIT_S)
        late.append(time.monotonic() - begin - LATENESS_WAIT_S)
    return statistics.median(late)


def untouched(size: int) -> tuple[torch.Tensor, ...]:
    """Allocate so many bytes in which nothing is ever written: the allocator counts them, the machine has none of them.

    They get mappings of their own, so that they never lie where a message has been.
    """
    if size <= 0:
        return ()
    with own_mapping():
        return tuple(torch.empty(min(_PIECE, size - start), dtype=torch.uint8) for start in range(0, size, _PIECE))
