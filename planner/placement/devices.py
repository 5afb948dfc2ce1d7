"""Which of a cluster's devices a question gets, and what lies between them: links within a host and over hosts."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from planner.basis.memo import memoised
from planner.values.cluster import Cluster, Device


def choose(cluster: Cluster, count: int) -> tuple[Device, ...]:
    """Return the `count` devices that a plan takes, in the cluster's order: the fastest, on as few hosts as possible.

    Of equally fast ones those with the most memory. Of those that are alike in both, devices of hosts that are used
    already; then of the first host that has as many as are missing, or, where none has, of the one that has the most.
    Equal shares of a batch and balanced stages both wait for the slowest device, so a faster one is never left out for
    the sake of a link. Raises `PlanError` (exit 5) when the cluster has fewer.
    """
    if cluster.elastic or count >= len(cluster.devices):
        return cluster.take(count).devices

    def make() -> tuple[Device, ...]:
        chosen: list[Device] = []
        for _, alike in groupby(sorted(cluster.devices, key=_rank), key=_rank):
            group = list(alike)
            missing = count - len(chosen)
            chosen += group if len(group) <= missing else _compact(group, missing, {d.host for d in chosen})
        names = {device.name for device in chosen}
        return tuple(device for device in cluster.devices if device.name in names)

    return memoised(cluster, ("chosen", count), make)


def _compact(group: list[Device], missing: int, used: set[str]) -> list[Device]:
    """Choose among equal devices: on hosts that are used already, then on as few others as possible."""
    by_host: dict[str, list[Device]] = {}
    for device in group:
        by_host.setdefault(device.host, []).append(device)
    chosen: list[Device] = []
    order = sorted(by_host, key=lambda h: (h not in used, -len(by_host[h])))
    for host in order:
        left = missing - len(chosen)
        if host not in used and len(by_host[host]) >= left:
            return chosen + next(own for h, own in by_host.items() if h not in used and len(own) >= left)[:left]
        chosen += by_host[host][:left]
        used = used | {host}
    return chosen


def _rank(device: Device) -> tuple[float, int]:
    return -device.speed, -device.memory_bytes


class Levels(NamedTuple):
    """The two levels of a cluster: devices of one host, and hosts.

    `inside` and `across` are links from one device to another of the same host and of another one, empty where there
    is none; `rails` is how many devices of a host can send to another at the same time without sharing.
    """

    cluster: Cluster
    inside: tuple[int, ...]
    across: tuple[int, ...]
    rails: int

    def inside_seconds(self, size: float) -> float:
        """Seconds to move bytes from one device to another of the same host."""
        return self.cluster.transfer_seconds(self.inside, size) if self.inside else 0.0

    def across_seconds(self, size: float) -> float:
        """Seconds to move bytes from one host to another, over all that the host has."""
        return self.cluster.transfer_seconds(self.across, size / self.rails) if self.across else 0.0


def levels(cluster: Cluster, devices: tuple[Device, ...]) -> Levels:
    """Return what lies between devices, by the example of the first host that has two, and of the first two hosts."""

    def make() -> Levels:
        own = cluster.only([device.name for device in devices])
        homes: dict[str, list[str]] = {}
        for device in devices:
            homes.setdefault(device.host, []).append(device.name)
        pair = next((names for names in homes.values() if len(names) > 1), None)
        inside = own.path(pair[0], pair[1]) if pair else ()
        if len(homes) == 1:
            return Levels(own, inside, (), 1)
        here, there = list(homes.values())[:2]
        paths = [own.path(name, there[min(i, len(there) - 1)]) for i, name in enumerate(here)]
        slowest = {max(path, key=lambda i: own.transfer_seconds((i,), 2.0**20)) for path in paths}
        return Levels(own, inside, paths[0], len(slowest))

    return memoised(cluster, ("levels", tuple(device.name for device in devices)), make)
