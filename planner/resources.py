"""Hardware that is shared while it works: cores and links, as SimPy resources whose users slow each other down."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator
from functools import cache
from typing import Any

import simpy

Speed = Callable[[int], float]
"""The speed of each user, relative to being alone, when so many are active."""


class FairShare:
    """A resource that serves all its users at once, each at the speed that their number allows.

    Processor sharing in virtual time: virtual time advances by `speed(active)` per second, and a user who brings
    `work` seconds leaves when it has advanced by that much. Arrivals and departures cost O(log n). One timer is enough:
    it is set for the first to leave, and when it comes too early because somebody arrived meanwhile, it is set again.
    """

    def __init__(self, env: simpy.Environment, speed: Speed) -> None:
        self.env, self.speed = env, cache(speed)
        self._virtual = self._updated = 0.0
        self._leaving: list[tuple[float, int, simpy.Event]] = []
        self._arrivals = 0
        self._timer: simpy.Event | None = None
        self._due = math.inf

    def use(self, work: float) -> simpy.Event:
        """Return the event that fires when `work` seconds (of being alone) are done."""
        now, leaving = self.env.now, self._leaving
        self._advance(now)
        done = simpy.Event(self.env)
        self._arrivals += 1
        heapq.heappush(leaving, (self._virtual + work, self._arrivals, done))
        self._set_timer(now)
        return done

    def _advance(self, now: float) -> None:
        if now > self._updated:
            if self._leaving:
                self._virtual += (now - self._updated) * self.speed(len(self._leaving))
            self._updated = now

    def _set_timer(self, now: float) -> None:
        remaining = (self._leaving[0][0] - self._virtual) / self.speed(len(self._leaving))
        if now + remaining < self._due:
            remaining = max(0.0, remaining)
            self._due = now + remaining
            self._timer = simpy.Timeout(self.env, remaining)
            self._timer.callbacks.append(self._expire)

    def _expire(self, timer: simpy.Event) -> None:
        if timer is not self._timer:
            return  # an earlier one was set since
        now = self.env.now
        self._due = math.inf
        self._advance(now)
        leaving = self._leaving
        while leaving and leaving[0][0] - self._virtual <= _ROUNDING * max(1.0, leaving[0][0]):
            target, _, done = heapq.heappop(leaving)
            self._virtual = max(self._virtual, target)
            done.succeed()
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


Process = Generator[simpy.Event, Any, None]
