"""What collectives take on a cluster's links, which links their bytes pass, and what of them hides behind computing.

A collective is as measured where it was measured (`Cluster.all_reduces`), else the quickest of the patterns that the
devices allow (`planner.costs.patterns`), as NCCL chooses. Several groups may run theirs at the same time (every tensor
rank reduces its own part): links that they share carry all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from planner.basis.memo import memoised
from planner.costs import patterns
from planner.costs.flows import Flow
from planner.costs.patterns import PATTERNS, Group, Phase
from planner.values.cluster import Cluster, by_size
from planner.values.hardware import Link
from planner.values.routes import Path

Groups = tuple[tuple[str, ...], ...]
"""Devices that reduce together, and the other such groups that do so at the same time."""

ALL_REDUCE, HALF = 2, 1
"""Passes over the bytes: an all-reduce is a reduce-scatter and an all-gather."""

_WRITTEN_OUT = 4
"""Hosts of a regular group that are written out to find its seconds: from four on a tree's fullest link is as full."""

_AT_ONCE = 64
"""Groups side by side on regular hosts that are looked at: no host has more devices, so the rest repeats them."""


class Timed(NamedTuple):
    """A phase, as its seconds need it: the largest share of the bytes per round on any link with the same figures."""

    rounds: int
    latency_s: float
    loads: tuple[tuple[Link, float], ...]

    def seconds(self, size: float) -> float:
        """Seconds of all rounds: the latencies, and the bytes of the slowest link."""
        slowest = max((link.seconds(load * size) - link.seconds(0.0) for link, load in self.loads), default=0.0)
        return self.latency_s + self.rounds * slowest


class Collective(NamedTuple):
    """A pattern: the sum of its phases; or a measured curve, read at a number of bytes, times a factor."""

    name: str
    phases: tuple[Timed, ...] = ()
    points: tuple[tuple[int, float], ...] = ()
    bytes_factor: float = 1.0
    factor: float = 1.0

    def seconds(self, size: float) -> float:
        """Seconds for `size` bytes."""
        if self.points:
            return self.factor * by_size(self.points, self.bytes_factor * size)
        return sum(phase.seconds(size) for phase in self.phases)


class Choice:
    """What groups of devices can do to reduce or gather; `passes` is `ALL_REDUCE` or `HALF`.

    `groups` are those that were measured, or all; then `rest` are the others, which go by their links.
    """

    def __init__(self, cluster: Cluster, groups: Groups, passes: int) -> None:
        self.cluster, self.passes = cluster, passes
        able = tuple(group for group in groups if len(group) > 1)
        measured = tuple(group for group in able if _measured(cluster, group, passes))
        others = tuple(group for group in able if group not in measured) if measured else ()
        self.groups = measured or able
        self.rest = Choice(cluster, others, passes) if others else None
        self.collectives = self._collectives() if self.groups else ()

    @property
    def figures(self) -> tuple[object, ...]:
        """What its seconds follow from: equal for groups that take as long, whatever their devices are called."""
        return self.collectives, self.rest.figures if self.rest else ()

    def quickest(self, size: float) -> Collective:
        """Return the pattern that is taken for `size` bytes."""
        return min(self.collectives, key=lambda one: one.seconds(size))

    def seconds(self, size: float) -> float:
        """Seconds of `size` bytes of every group, all groups at the same time."""
        own = self.quickest(size).seconds(size) if self.collectives else 0.0
        return max(own, self.rest.seconds(size)) if self.rest else own

    def flows(self, size: float, *, calls: int = 1) -> tuple[Flow, ...]:
        """Return what passes the links while `size` bytes of every group are reduced, in so many calls.

        A measured collective may use links in a pattern that is not known: it loads those of a ring, with as much as
        they can carry in the time that was measured.
        """
        if not self.collectives or size <= 0:
            return ()
        chosen = self.quickest(size / calls)
        name = "ring" if chosen.points else chosen.name
        hops = memoised(self.cluster, ("hops", name, self.groups, self.passes), lambda: self._hops(name))
        scale = size
        if chosen.points:
            loads = _loads(self.cluster, hops)
            per_byte = max(load / self.cluster.link_of(n).bandwidth_bytes_per_s for n, load in loads.items())
            scale = min(size, calls * chosen.seconds(size / calls) / per_byte)
        others = self.rest.flows(size, calls=calls) if self.rest else ()
        return (*(Flow(path, share * scale) for path, share in hops), *others)

    def _collectives(self) -> tuple[Collective, ...]:
        measured = _measured(self.cluster, self.groups[0], self.passes)
        if measured:
            return (measured,)
        groups = _representative(self.cluster, self.groups)
        found = {name: [_timed(self.cluster, phase) for phase in self._phases(name, groups)] for name in PATTERNS}
        return tuple(Collective(name, tuple(phases)) for name, phases in found.items() if phases)

    def _phases(self, name: str, groups: Sequence[Group]) -> list[Phase]:
        """The phases of all groups at the same time; none where one of the groups cannot have the pattern."""
        each = [PATTERNS[name](self.cluster, group, self.passes) for group in groups]
        own = [phases for phases in each if phases is not None]
        if len(own) < len(each):
            return []
        return [
            Phase(max(p.rounds for p in at), max(p.latency_s for p in at), [hop for p in at for hop in p.hops])
            for at in zip(*own, strict=True)
        ]

    def _hops(self, name: str) -> tuple[tuple[Path, float], ...]:
        """Every path with its share of the bytes over all rounds."""
        groups = [_group(patterns.by_host(self.cluster, devices)) for devices in self.groups]
        shares: dict[Path, float] = {}
        for phase in self._phases(name, groups):
            for path, share in phase.hops:
                shares[path] = shares.get(path, 0.0) + phase.rounds * share
        return tuple(shares.items())


def over(cluster: Cluster, groups: Groups, passes: int) -> Choice:
    """Return the choices of groups that reduce (`ALL_REDUCE`) or gather (`HALF`) together, kept with the cluster."""
    return memoised(cluster, ("collective", groups, passes), lambda: Choice(cluster, groups, passes))


def all_reduce(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    return over(cluster, (devices,), ALL_REDUCE).seconds(size)


def half(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes."""
    return over(cluster, (devices,), HALF).seconds(size)


def _loads(cluster: Cluster, parts: Iterable[tuple[Path, float]]) -> dict[int, float]:
    """What passes every directed link at the same time; where a link is not shared, the most of one part."""
    loads: dict[int, float] = {}
    for path, size in parts:
        for number in path:
            before = loads.get(number, 0.0)
            loads[number] = before + size if cluster.link_of(number).shared else max(before, size)
    return loads


def _timed(cluster: Cluster, phase: Phase) -> Timed:
    """Add up what every link carries in a round; of links with the same figures the fullest counts."""
    loads = _loads(cluster, phase.hops)
    fullest: dict[object, tuple[Link, float]] = {}
    for number, load in loads.items():
        link = cluster.link_of(number)
        figures = link.bandwidth_bytes_per_s, link.points
        if figures not in fullest or fullest[figures][1] < load:
            fullest[figures] = link, load
    return Timed(phase.rounds, phase.latency_s, tuple(fullest.values()))


def _group(hosts: patterns.Hosts) -> Group:
    return Group(hosts, len(hosts), sum(map(len, hosts)))


def _representative(cluster: Cluster, groups: Groups) -> list[Group]:
    """The groups with as few of their hosts as tell their seconds: all, or four of hosts that are alike."""
    found, routes = [], cluster.routes
    for devices in groups[:_AT_ONCE] if len(set(routes.kinds.values())) == 1 else groups:
        whole = _group(patterns.by_host(cluster, devices))
        alike = {(routes.kinds[routes.host_of[own[0]]], *map(routes.rank.__getitem__, own)) for own in whole.hosts}
        found.append(whole._replace(hosts=whole.hosts[:_WRITTEN_OUT]) if len(alike) == 1 else whole)
    return found


def _measured(cluster: Cluster, group: tuple[str, ...], passes: int) -> Collective | None:
    """The measured all-reduce of a group inside one host that is joined as those were that it was measured on.

    Half of it for one pass. Devices that share their host's cores are alike: measured with another number of them, an
    all-reduce takes the seconds of as many bytes per round, times the ratio of the rounds (2 (n - 1) of a ring).
    """
    n, host_of = len(group), cluster.routes.host_of
    if not cluster.all_reduces or len({host_of[name] for name in group}) > 1:
        return None
    curve = min(cluster.all_reduces, key=lambda curve: abs(curve.devices - n))
    if all(device.shares_cores for device in cluster.devices):
        ratio = (n - 1) / (curve.devices - 1)
        return Collective("measured", (), curve.points, curve.devices / n, ratio * passes / ALL_REDUCE)
    if curve.devices == n and _as_measured(cluster, group):
        return Collective("measured", (), curve.points, 1.0, passes / ALL_REDUCE)
    return None


def _as_measured(cluster: Cluster, group: tuple[str, ...]) -> bool:
    """Whether a group is joined like the first devices of its host, on which measurements are made."""

    def joints(devices: Sequence[str]) -> list[tuple[tuple[float, float], ...]]:
        links = [[cluster.link_of(n) for n in cluster.path(a, b)] for a in devices for b in devices if a < b]
        return sorted(tuple((link.latency_s, link.bandwidth_bytes_per_s) for link in path) for path in links)

    first = cluster.routes.devices_of[cluster.routes.host_of[group[0]]][: len(group)]
    return sorted(first) == sorted(group) or joints(first) == joints(group)


def tail(ready: Sequence[float], seconds: Sequence[float], end: float) -> float:
    """Return what is left behind `end` of reductions that start one after the other as their input gets ready.

    Reduction i cannot end before `ready[i]` and then its own and all later ones' seconds: the last of them all ends at
    the maximum of these.

    >>> tail([1.0, 2.0], [1.0, 1.0], end=2.0), tail([2.0, 2.0], [1.0, 1.0], end=2.0)
    (1.0, 2.0)
    """
    left = over = 0.0
    for begin, own in zip(reversed(ready), reversed(seconds), strict=True):
        left += own
        over = max(over, begin + left - end)
    return over


def lead(needed: Sequence[float], seconds: Sequence[float]) -> float:
    """Return how long before its first use a chain of gathers must begin so that no block waits.

    Block i is reached `needed[i]` after the compute's begin, and has its parameters after the first i + 1 gathers.

    >>> lead([0.0, 1.0], [0.5, 0.5]), lead([0.0, 1.0], [0.5, 2.0])
    (0.5, 1.5)
    """
    gathered = most = 0.0
    for used, own in zip(needed, seconds, strict=True):
        gathered += own
        most = max(most, gathered - used)
    return most
