"""A stopwatch for the parts of a model, and a budget of seconds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from executor.devices import Backend
from planner.values.profile import Timing

Setting = tuple[int, int]
"""(threads, samples)"""

WHOLE = -1
"""The part that is the unsplit model, loss included."""


class Budget:
    """Seconds that measuring may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the measuring began."""
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        """Seconds that are left; negative behind the end."""
        return self.seconds - self.spent


class Stopwatch:
    """Collects seconds by setting, part and kind."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.seconds: dict[tuple[Setting, int, str], list[float]] = defaultdict(list)
        self.setting: Setting = (1, 1)
        self.watched: dict[Setting, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """Seconds that were timed with a setting, and those of processors that this process got meanwhile."""

    @contextmanager
    def around(self, part: int, kind: str) -> Iterator[None]:
        """Time what is done inside."""
        self.backend.synchronize()
        clock, worked = time.monotonic(), time.process_time()
        begin = self.backend.stamp()
        yield
        end = self.backend.stamp()
        self.backend.synchronize()
        self.note(part, kind, begin, end)
        watched = self.watched[self.setting]
        watched[0] += time.monotonic() - clock
        watched[1] += time.process_time() - worked

    def note(self, part: int, kind: str, begin: Any, end: Any) -> None:
        """Add the seconds between two stamps."""
        self.seconds[self.setting, part, kind].append(self.backend.seconds(end) - self.backend.seconds(begin))

    def note_pair(self, part: int, kind: str, stamps: Sequence[Any]) -> None:
        """Add the seconds between two stamps, if there are two."""
        self.backend.synchronize()
        if len(stamps) == 2:
            self.note(part, kind, *stamps)

    def cores(self, setting: Setting) -> float:
        """How many cores this process had at a time while a setting was timed: all its threads, where no one waits."""
        seconds, worked = self.watched.get(setting, (0.0, 0.0))
        return min(worked / seconds, setting[0]) if seconds > 0 else setting[0]

    @property
    def waiting(self) -> float:
        """The share of what was timed in which not even one thread had a core, because other programs had them all."""
        seconds, worked = (
            (sum(column) for column in zip(*self.watched.values(), strict=True)) if self.watched else (0, 0)
        )
        return max(0.0, 1 - worked / seconds) if seconds > 0 else 0.0

    def timing(self, setting: Setting, part: int, kind: str) -> Timing:
        """The quantiles of what was collected; zero for what was never run."""
        return Timing.of(setting[1], self.seconds.get((setting, part, kind), []))
