"""Hardware that is shared while it works: cores, as a SimPy resource whose users slow each other down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import simpy

Speed = Callable[[int], float]
"""The speed of each user, relative to being alone, when so many are active."""
Then = Callable[[], object]
"""What to do when work is done."""


class FairShare:
    """A resource that serves all its users at once, each at the speed that their number allows.

    Processor sharing in virtual time: virtual time advances by `speed(active)` per second, and a user who brings
    `work` seconds leaves when it has advanced by that much. Arrivals and departures cost O(log n). One timer is enough:
    it is set for the first to leave, and when it comes too early because somebody arrived meanwhile, it is set again.
    """

    def __init__(self, env: simpy.Environment, speed: Speed) -> None:
        self.env, self.speed = env, cache(speed)
        self._virtual = self._updated = 0.0
        self._speed = 1.0
        self._leaving: list[tuple[float, int, Then]] = []
        self._arrivals = 0
        self._timer: simpy.Event | None = None
        self._due = math.inf

    def use(self, work: float) -> simpy.Event:
        """Return the event that fires when `work` seconds (of being alone) are done."""
        done = simpy.Event(self.env)
        self.serve(work, done.succeed)
        return done

    def serve(self, work: float, then: Then) -> None:
        """Call `then` when `work` seconds are done: what `use` does, for those who need no event."""
        now, leaving = self.env.now, self._leaving
        if leaving:
            self._virtual += (now - self._updated) * self._speed
        self._updated = now
        self._arrivals += 1
        heapq.heappush(leaving, (self._virtual + work, self._arrivals, then))
        self._set_timer(now)

    def _set_timer(self, now: float) -> None:
        """Wait for the first to leave, at the speed that there is now, unless a timer comes before that anyway."""
        self._speed = speed = self.speed(len(self._leaving))
        remaining = (self._leaving[0][0] - self._virtual) / speed
        if now + remaining < self._due:
            remaining = max(0.0, remaining)
            self._due = now + remaining
            self._timer = timer = simpy.Timeout(self.env, remaining)
            timer.callbacks.append(self._expire)

    def _expire(self, timer: simpy.Event) -> None:
        if timer is not self._timer:
            return  # an earlier one was set since
        now, leaving = self.env.now, self._leaving
        self._due = math.inf
        self._virtual += (now - self._updated) * self._speed
        self._updated = now
        due = self._virtual + _ROUNDING * max(1.0, self._virtual)
        while leaving and leaving[0][0] <= due:
            target, _, then = heapq.heappop(leaving)
            if target > self._virtual:
                self._virtual = target
            then()
        if leaving:
            self._set_timer(now)


_ROUNDING = 1e-12  # of virtual time, which is added up from many small pieces


class Alone:
    """The same face for hardware that one user has for itself."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env

    def use(self, work: float) -> simpy.Event:
        """Return the event that fires after `work` seconds."""
        return self.env.timeout(work)

    def serve(self, work: float, then: Then) -> None:
        """Call `then` after `work` seconds."""

        def over(_: simpy.Event) -> None:
            then()

        self.env.timeout(work).callbacks.append(over)


Process = Generator[simpy.Event, Any, None]
