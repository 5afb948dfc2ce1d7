"""Links that are shared while they work: everything on them gets its max-min fair rate, as long flows do.

A transfer takes one rate along its whole path and loads every link with that rate only. Rates grow together until a
link is full; what passes this link keeps its rate, the others grow on (progressive filling: Bertsekas and Gallager,
Data Networks, 2nd edition, section 6.5.2). What no full link holds back runs as fast as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import simpy
from simpy.events import EventPriority

from planner.costs.flows import Flow
from planner.simulate.resources import Then

_SLACK = 1e-9  # relative: so much more than its bandwidth may a link be asked for before it counts as full
_ROUNDING = 1e-12  # of the clock, whose times are added up from many pieces


class Load(NamedTuple):
    """What a transfer asks of the network when nothing holds it back: bytes/s on each of its shared links.

    Flows of one transfer advance in step, as the hops of a ring do, and `rate` is that of one of them on the link that
    it fills most: what is compared when transfers share. Alone, no transfer asks more of a link than it has: what a
    price list says that it takes alone is true, however its own flows meet on a link.
    """

    links: tuple[int, ...]
    rates: tuple[float, ...]
    rate: float

    @property
    def free(self) -> bool:
        """Whether nothing that it uses is shared."""
        return not self.links


def carried(flows: Sequence[Flow], seconds: float, bandwidth: Sequence[float]) -> dict[int, float]:
    """Return the bytes that a transfer of `seconds` brings over each shared link: no more than it can in that time."""
    total: dict[int, float] = {}
    for path, size in flows:
        for number in path:
            if size > 0 and bandwidth[number] < math.inf:
                total[number] = total.get(number, 0.0) + size
    return {number: min(size, bandwidth[number] * seconds) for number, size in total.items()}


def load(flows: Sequence[Flow], seconds: float, bandwidth: Sequence[float]) -> Load:
    """Return the load of a transfer that takes `seconds` alone on links of so many bytes/s (infinite: not shared)."""
    total = carried(flows, seconds, bandwidth)
    if not total or seconds <= 0:
        return Load((), (), 0.0)
    tightest = max(total, key=lambda number: total[number] / bandwidth[number])
    largest = max(size for path, size in flows if tightest in path)
    rates = tuple(size / seconds for size in total.values())
    return Load(tuple(total), rates, min(largest / seconds, bandwidth[tightest]))


class _Sending:
    """A transfer under way: `left` seconds of being alone, which pass at `speed`."""

    __slots__ = ("due", "late", "left", "load", "since", "speed", "then", "timer")

    def __init__(self, load: Load, seconds: float, then: Then, now: float) -> None:
        self.load, self.left, self.then, self.since = load, seconds, then, now
        self.speed = 0.0
        self.due = math.inf
        self.late = False
        self.timer: simpy.Event | None = None


class Network:
    """Directed links of so many bytes/s that share themselves max-min fairly among what is on them.

    Only what meets, over however many links, on links that are asked for more than they have is looked at when
    something comes or goes; changes at the same moment are settled together, after everything else at that moment.
    """

    def __init__(self, env: simpy.Environment, bandwidth: Sequence[float]) -> None:
        self.env, self.bandwidth = env, bandwidth
        self.full = [capacity * (1 + _SLACK) for capacity in bandwidth]
        self.asked = [0.0] * len(bandwidth)
        self.users: list[dict[_Sending, float]] = [{} for _ in bandwidth]
        """What passes each link, with the bytes/s that it would like to pass there."""
        self._changed: dict[int, None] = {}

    def send(self, load: Load, seconds: float, then: Then) -> None:
        """Call `then` when what takes `seconds` alone has been sent."""
        sending = _Sending(load, seconds, then, self.env.now)
        users, asked, full, crowded = self.users, self.asked, self.full, []
        for link, rate in zip(load.links, load.rates, strict=True):
            users[link][sending] = rate
            asked[link] += rate
            if asked[link] > full[link]:
                crowded.append(link)
        if crowded:
            self._settle_later(crowded)
        else:
            sending.speed = 1.0
            sending.due = sending.since + seconds
            self._set_timer(sending, seconds)

    def _leave(self, sending: _Sending) -> None:
        crowded = []
        for link, rate in zip(sending.load.links, sending.load.rates, strict=True):
            users = self.users[link]
            del users[sending]
            if not users:
                self.asked[link] = 0.0
                continue
            if self.asked[link] > self.full[link]:
                crowded.append(link)
            self.asked[link] -= rate
        if crowded:
            self._settle_later(crowded)

    def _run_at(self, sending: _Sending, speed: float) -> None:
        """Go on at another speed; a timer that comes too early now is set again when it comes."""
        now = self.env.now
        sending.left = max(0.0, sending.left - (now - sending.since) * sending.speed)
        sending.since, sending.speed = now, speed
        earlier = now + sending.left / speed < sending.due
        sending.due = now + sending.left / speed
        sending.late = not (sending.timer is None or earlier)
        if not sending.late:
            self._set_timer(sending, sending.left / speed)

    def _set_timer(self, sending: _Sending, seconds: float) -> None:
        sending.timer = timer = simpy.Timeout(self.env, seconds)
        timer.callbacks.append(partial(self._expire, sending))

    def _expire(self, sending: _Sending, timer: simpy.Event) -> None:
        if timer is not sending.timer:
            return  # another one was set since
        if sending.late:  # it goes slower than when the timer was set
            rest = sending.due - self.env.now
            if rest > _ROUNDING * self.env.now:
                self._set_timer(sending, rest)
                return
        self._leave(sending)
        sending.then(timer)

    def _settle_later(self, links: list[int]) -> None:
        if not self._changed:
            _Last(self.env).callbacks.append(self._settle)
        self._changed.update(dict.fromkeys(links))

    def _settle(self, _: simpy.Event) -> None:
        """Give everything that meets on crowded links its fair speed."""
        changed, self._changed = list(self._changed), {}
        if len(changed) == 1 and all(len(sending.load.links) == 1 for sending in self.users[changed[0]]):
            self._divide(changed[0])
            return
        links, sendings = self._together(changed)
        for sending, speed in _fair(sendings, {link: self.bandwidth[link] for link in links}, self.users):
            self._run_at(sending, speed)

    def _divide(self, link: int) -> None:
        """Settle one link whose users pass no other: the slower ones first, each its part of what is left."""
        users = self.users[link]
        room, weight = self.bandwidth[link], sum(rate / sending.load.rate for sending, rate in users.items())
        for sending in sorted(users, key=_own_rate):
            own, asked = sending.load.rate, users[sending]
            speed = min(1.0, room / (weight * own))
            self._run_at(sending, speed)
            room, weight = room - asked * speed, weight - asked / own

    def _together(self, links: list[int]) -> tuple[list[int], list[_Sending]]:
        """Return what depends on these links' users: crowded links that share a user, and all users of these."""
        seen = dict.fromkeys(links)
        found: dict[_Sending, None] = {}
        for link in links:  # grows meanwhile
            for sending in self.users[link]:
                if sending in found:
                    continue
                found[sending] = None
                for other in sending.load.links:
                    if other not in seen and self.asked[other] > self.full[other]:
                        seen[other] = None
                        links.append(other)
        return [link for link in links if self.asked[link] > self.full[link]], list(found)


def _own_rate(sending: _Sending) -> float:
    return sending.load.rate


class _Last(simpy.Event):
    """An event now, behind everything else at the same time: SimPy's own priorities are 0 and 1."""

    def __init__(self, env: simpy.Environment) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, cast("EventPriority", 2))


def _fair(
    sendings: list[_Sending], room: dict[int, float], users: list[dict[_Sending, float]]
) -> list[tuple[_Sending, float]]:
    """Return the max-min fair speeds: rates rise together until a link has no room, or its own is reached."""
    rising = dict.fromkeys(sendings)
    weight = {link: sum(rate / s.load.rate for s, rate in users[link].items()) for link in room}
    speeds: list[tuple[_Sending, float]] = []
    while rising:
        level = min((room[link] / w for link, w in weight.items()), default=math.inf)
        own = [s for s in rising if s.load.rate <= level]
        if own:  # no link holds these back
            stopped = [(s, 1.0) for s in own]
        else:
            full = [link for link, w in weight.items() if room[link] / w <= level * (1 + _ROUNDING)]
            held = dict.fromkeys(s for link in full for s in users[link] if s in rising)
            stopped = [(s, level / s.load.rate) for s in held]
            for link in full:
                del weight[link], room[link]
        for sending, speed in stopped:
            del rising[sending]
            for link, rate in zip(sending.load.links, sending.load.rates, strict=True):
                if link in room:
                    room[link] = max(0.0, room[link] - rate * speed)
                    weight[link] -= rate / sending.load.rate
                    if weight[link] <= _SLACK * rate / sending.load.rate:
                        del weight[link], room[link]
        speeds += stopped
    return speeds
