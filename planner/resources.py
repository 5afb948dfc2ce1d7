"""Hardware that is shared while it works: cores and links, as SimPy resources whose users slow each other down."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from typing import Any

import simpy

Speed = Callable[[int], float]
"""The speed of each user, relative to being alone, when so many are active."""


class FairShare:
    """A resource that serves all its users at once, each at the speed that their number allows.

    Processor sharing in virtual time: virtual time advances by `speed(active)` per second, and a user who brings
    `work` seconds leaves when it has advanced by that much. Arrivals and departures cost O(log n).
    """

    def __init__(self, env: simpy.Environment, speed: Speed) -> None:
        self.env, self.speed = env, speed
        self._virtual = self._updated = 0.0
        self._leaving: list[tuple[float, int, simpy.Event]] = []
        self._arrivals = 0
        self._epoch = 0

    def use(self, work: float) -> simpy.Event:
        """Return the event that fires when `work` seconds (of being alone) are done."""
        self._advance()
        done = self.env.event()
        self._arrivals += 1
        heapq.heappush(self._leaving, (self._virtual + work, self._arrivals, done))
        self._schedule()
        return done

    def _advance(self) -> None:
        now = self.env.now
        if self._leaving:
            self._virtual += (now - self._updated) * self.speed(len(self._leaving))
        self._updated = now

    def _schedule(self) -> None:
        self._epoch += 1
        if self._leaving:
            remaining = max(0.0, self._leaving[0][0] - self._virtual) / self.speed(len(self._leaving))
            timer = self.env.timeout(remaining, value=self._epoch)
            timer.callbacks.append(self._depart)

    def _depart(self, timer: simpy.Event) -> None:
        if timer.value != self._epoch:
            return  # somebody came or went since: a newer timer is set
        self._advance()
        target, _, done = heapq.heappop(self._leaving)
        self._virtual = max(self._virtual, target)
        done.succeed()
        self._schedule()


class Alone:
    """The same face for hardware that one user has for itself."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env

    def use(self, work: float) -> simpy.Event:
        """Return the event that fires after `work` seconds."""
        return self.env.timeout(work)


Process = Generator[simpy.Event, Any, None]
