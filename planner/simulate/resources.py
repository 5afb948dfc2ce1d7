"""Hardware that is shared while it works: cores, as a SimPy resource whose users slow each other down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import simpy

Speed = Callable[[int], float]
"""The speed of each user, relative to being alone, when so many are active."""
Then = Callable[[Any], Any]
"""What to do when work is done; it is called with the event that says so, or None."""


class FairShare:
    """A resource that serves all its users at once, each at the speed that their number allows.

    Processor sharing in virtual time: virtual time advances by `speed(active)` per second, and a user who brings
    `work` seconds leaves when it has advanced by that much. Arrivals and departures cost O(log n). A timer is set for
    the first to leave. One that comes too early, because somebody arrived meanwhile, is set again; those behind an
    earlier one stay, and may be all that the next to leave needs.
    """

    def __init__(self, env: simpy.Environment, speed: Speed) -> None:
        self.env, self.speed = env, cache(speed)
        self._virtual = self._updated = 0.0
        self._speed = 1.0
        self._leaving: list[tuple[float, int, Then]] = []
        self._arrivals = 0
        self._due = math.inf
        """When the first leaves if nobody comes."""
        self._timers: list[float] = []
        """When timers come, the next one last."""
        self._serving = False
        """Whether some are leaving at this moment: what they begin at once is settled with that."""

    def serve(self, work: float, then: Then) -> None:
        """Call `then` when `work` seconds (of being alone) are done."""
        now, leaving = self.env.now, self._leaving
        if leaving:
            self._virtual += (now - self._updated) * self._speed
        self._updated = now
        self._arrivals += 1
        heapq.heappush(leaving, (self._virtual + work, self._arrivals, then))
        if not self._serving:
            self._settle(now)

    def _settle(self, now: float) -> None:
        """Find when the first leaves, at the speed that there is now."""
        leaving = self._leaving
        self._speed = speed = self.speed(len(leaving))
        remaining = (leaving[0][0] - self._virtual) / speed
        self._due = due = now + remaining if remaining > 0 else now
        if not self._timers or due < self._timers[-1]:
            self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        self._timers.append(self._due)
        simpy.Timeout(self.env, self._due - now).callbacks.append(self._expire)

    def _expire(self, timer: simpy.Event) -> None:
        now, leaving, timers = self.env.now, self._leaving, self._timers
        timers.pop()
        if not leaving:
            return
        if self._due - now > _ROUNDING * now:
            if not timers or self._due < timers[-1]:
                self._set_timer(now)
            return
        self._virtual += (now - self._updated) * self._speed
        self._updated = now
        due = self._virtual + _ROUNDING * max(1.0, self._virtual)
        self._serving = True
        while leaving and leaving[0][0] <= due:
            target, _, then = heapq.heappop(leaving)
            if target > self._virtual:
                self._virtual = target
            then(timer)
        self._serving = False
        if leaving:
            self._settle(now)


_ROUNDING = 1e-12  # of virtual time, which is added up from many small pieces


class Alone:
    """The same face for hardware that one user has for itself."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env

    def serve(self, work: float, then: Then) -> None:
        """Call `then` after `work` seconds."""
        simpy.Timeout(self.env, work).callbacks.append(then)
