"""The same hardware with something wrong, or something better: what a plan would meet there."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from planner.basis.errors import PlanError, unknown
from planner.simulate.contention import Failure
from planner.values.cluster import AllReduce, Cluster, Link


def slow_device(cluster: Cluster, name: str, factor: float) -> Cluster:
    """Return the cluster with one device `factor` times slower."""
    _known(cluster, name)
    devices = tuple(
        msgspec.structs.replace(d, speed=d.speed / factor) if d.name == name else d for d in cluster.devices
    )
    return msgspec.structs.replace(cluster, name=f"{cluster.name}, {name} {factor:g} x slower", devices=devices)


def slow_link(cluster: Cluster, ends: tuple[str, str], factor: float) -> Cluster:
    """Return the cluster with all links between two nodes `factor` times slower.

    Raises `PlanError` (exit 2) when there is none.
    """
    if not any(set(link.between) == set(ends) for link in cluster.links):
        known = sorted({":".join(link.between) for link in cluster.links})
        raise unknown("link", ":".join(ends), known, where="--slow-link", fix="name the two ends of a link")
    links = tuple(_slower(link, factor) if set(link.between) == set(ends) else link for link in cluster.links)
    return msgspec.structs.replace(cluster, name=f"{cluster.name}, {':'.join(ends)} {factor:g} x slower", links=links)


def with_bandwidth(cluster: Cluster, factor: float) -> Cluster:
    """Return the cluster with every link, and measured all-reduces, `factor` times as fast."""
    return msgspec.structs.replace(
        cluster,
        name=f"{cluster.name}, bandwidth x {factor:g}",
        links=tuple(_slower(link, 1 / factor) for link in cluster.links),
        all_reduces=tuple(
            AllReduce(devices=curve.devices, points=tuple((size, seconds / factor) for size, seconds in curve.points))
            for curve in cluster.all_reduces
        ),
    )


def with_memory(cluster: Cluster, factor: float) -> Cluster:
    """Return the cluster with the memory of every device and host `factor` times as large."""
    return msgspec.structs.replace(
        cluster,
        name=f"{cluster.name}, memory x {factor:g}",
        devices=tuple(
            msgspec.structs.replace(device, memory_bytes=int(device.memory_bytes * factor))
            for device in cluster.devices
        ),
        hosts=tuple(
            msgspec.structs.replace(host, memory_bytes=int(host.memory_bytes * factor)) for host in cluster.hosts
        ),
    )


def _slower(link: Link, factor: float) -> Link:
    return msgspec.structs.replace(
        link,
        latency_s=link.latency_s * factor,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / factor,
        points=tuple((size, seconds * factor) for size, seconds in link.points),
    )


def inject(
    cluster: Cluster, *, slow_devices: Sequence[str] = (), slow_links: Sequence[str] = (), failing: Sequence[str] = ()
) -> tuple[Cluster, tuple[Failure, ...]]:
    """Read `d3=2` (a device twice as slow), `d0:d1=4` (a link) and `d2@1.5+3` (stops at 1.5 s, back 3 s later).

    Raises `PlanError` (exit 2) for anything else, and for names that the cluster does not have.
    """
    for text in slow_devices:
        name, factor = _parse(text, r"(.+)=(.+)", "--slow-device", "d3=2")
        cluster = slow_device(cluster, name, _number(factor, text, "--slow-device"))
    for text in slow_links:
        one, other, factor = _parse(text, r"(.+):(.+)=(.+)", "--slow-link", "d0:d1=4")
        cluster = slow_link(cluster, (one, other), _number(factor, text, "--slow-link"))
    failures = []
    for text in failing:
        name, at, down = _parse(text, r"(.+)@(.+)\+(.+)", "--fail", "d2@1.5+3")
        _known(cluster, name)
        failures.append(Failure(name, _number(at, text, "--fail"), _number(down, text, "--fail")))
    return cluster, tuple(failures)


def _known(cluster: Cluster, name: str) -> None:
    names = [device.name for device in cluster.devices]
    if name not in names:
        raise unknown("device", name, names, where=f"cluster '{cluster.name}'", fix="name a device of the cluster")


def _parse(text: str, pattern: str, flag: str, example: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise PlanError(
            what=f"'{text}' is not understood", where=flag, why=f"it is not like {example}", fix=f"{flag} {example}"
        )
    return match.groups()


def _number(text: str, whole: str, flag: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise PlanError(
            what=f"'{whole}' has no positive number",
            where=flag,
            why=f"'{text}' is none",
            fix="give a factor or seconds above 0",
        )
    return number
