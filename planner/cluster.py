"""The hardware a plan runs on: devices, the hosts whose cores they share, and the links between them.

A cluster is measured (`local`, inside a profile), or written by hand as TOML. It does not know the model.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import msgspec
import networkx as nx

from planner.errors import DEVICE, USAGE, PlanError

_DETOUR_S = 1e6  # longer than any link: never chosen where there is a link


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A machine whose CPU devices share cores and memory.

    `slowdown` pairs a number of busy processes with how much slower each becomes than its share of the cores allows:
    shared caches and memory bandwidth, and beyond `cores` busy threads the switching between processes.
    `memory_bytes_per_s` is what an update on the host reads and writes; by default about one DDR4-3200 channel's.
    """

    name: str
    cores: int
    memory_bytes: int
    slowdown: tuple[tuple[int, float], ...] = ((1, 1.0),)
    memory_bytes_per_s: float = 20e9

    def speed(self, active: int, threads: int) -> float:
        """Return the speed of each of `active` busy processes of `threads` threads, relative to one alone.

        >>> Host(name="h", cores=2, memory_bytes=1).speed(4, 1)
        0.5
        """
        known = [factor for processes, factor in self.slowdown if processes <= max(1, active)]
        sharing = known[-1] if known else 1.0
        return min(1.0, self.cores / (active * threads)) / sharing


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One place where a stage computes. `speed` is relative to the profiled device (2 = twice as fast).

    Devices with the same `host` share its cores when `shares_cores` (CPU processes); a GPU does not.
    """

    name: str
    memory_bytes: int
    host: str
    speed: float = 1.0
    threads: int = 1
    shares_cores: bool = False


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A connection between two nodes (devices or hosts), with its transfer time by message size.

    `points` pairs message bytes with measured seconds; without them, `latency_s` + bytes / `bandwidth_bytes_per_s`.
    Transfers that are on the link at the same time share it fairly when `shared`.
    """

    between: tuple[str, str]
    latency_s: float
    bandwidth_bytes_per_s: float
    points: tuple[tuple[int, float], ...] = ()
    shared: bool = True

    def seconds(self, size: float) -> float:
        """Time for one message of `size` bytes that has the link to itself."""
        if not self.points:
            return self.latency_s + size / self.bandwidth_bytes_per_s
        return by_size(self.points, size)


def by_size(points: tuple[tuple[int, float], ...], size: float) -> float:
    """Interpolate seconds measured by message bytes: constant below the smallest, the last slope beyond the largest.

    >>> by_size(((10, 1.0), (20, 3.0)), 5), by_size(((10, 1.0), (20, 3.0)), 15), by_size(((10, 1.0), (20, 3.0)), 30)
    (1.0, 2.0, 5.0)
    """
    if size <= points[0][0] or len(points) == 1:
        return points[0][1]
    pairs = list(pairwise(points))
    (small, quick), (large, slow) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
    return quick + (slow - quick) * (size - small) / (large - small)


class Cluster(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Hosts, devices and links.

    `posts` pairs message bytes with the seconds that posting a send or a receive costs the device itself: making the
    buffer, and what the backend copies before it returns. `transfer_work` pairs message bytes with the core seconds
    that a transfer takes from each end's host: the backend's own threads compute where CPU devices do.

    `all_reduce` pairs bytes with the measured seconds of an all-reduce over `all_reduce_devices` devices; without
    measurements it follows from the links (ring: 2 (n - 1) messages of bytes / n).
    `elastic` hosts make as many CPU devices as a plan asks for, each with its share of the threads and the memory.
    """

    name: str
    hosts: tuple[Host, ...]
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    posts: tuple[tuple[int, float], ...] = ()
    transfer_work: tuple[tuple[int, float], ...] = ()
    all_reduce: tuple[tuple[int, float], ...] = ()
    all_reduce_devices: int = 2
    elastic: bool = False

    def __post_init__(self) -> None:
        names = [device.name for device in self.devices]
        if len(set(names)) != len(names):
            raise ValueError("devices: two devices have the same name")
        if not self.elastic and not self.devices:
            raise ValueError("devices: a cluster needs at least one device")
        hosts = {host.name for host in self.hosts}
        for device in self.devices:
            if device.host not in hosts:
                raise ValueError(f"devices '{device.name}': there is no host '{device.host}'")
            if device.memory_bytes <= 0 or not device.speed > 0:
                raise ValueError(f"devices '{device.name}': memory_bytes and speed must be positive")
        for link in self.links:
            bandwidth, latency = link.bandwidth_bytes_per_s, link.latency_s
            if not (bandwidth > 0 and math.isfinite(bandwidth) and latency >= 0):
                raise ValueError(f"links {link.between}: the bandwidth must be positive and the latency not negative")

    def take(self, count: int) -> Cluster:
        """Return the cluster with exactly the first `count` devices.

        Raises `PlanError` (exit 5) when it has fewer.
        """
        if not self.elastic:
            if count > len(self.devices):
                raise PlanError(
                    what=f"{count} devices are asked for, the cluster has {len(self.devices)}",
                    where=f"cluster '{self.name}'",
                    why="each partition needs a device of its own",
                    fix=f"plan simulate --k {len(self.devices)}",
                    code=DEVICE,
                )
            return msgspec.structs.replace(self, devices=self.devices[:count])
        host = self.hosts[0]
        threads = max(1, host.cores // count)
        devices = tuple(
            Device(
                name=f"d{index}",
                memory_bytes=host.memory_bytes // count,
                host=host.name,
                threads=threads,
                shares_cores=True,
            )
            for index in range(count)
        )
        return msgspec.structs.replace(self, devices=devices, elastic=False)

    @cached_property
    def graph(self) -> nx.Graph[str]:
        """Devices, hosts and links as a networkx graph.

        The way through a host weighs as much as that host's link to itself, so a direct link between two of its
        devices is preferred only where it is quicker; a host without such a link is no way between its own devices.
        """
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from(host.name for host in self.hosts)
        inside = {link.between[0]: link.seconds(2**20) for link in self.links if link.between[0] == link.between[1]}
        for device in self.devices:
            graph.add_edge(device.name, device.host, links=(), seconds=inside.get(device.host, _DETOUR_S) / 2)
        for index, link in enumerate(self.links):
            if link.between[0] != link.between[1]:
                graph.add_edge(*link.between, links=(index,), seconds=link.seconds(2**20))
        return graph

    def path(self, source: str, target: str) -> tuple[int, ...]:
        """Return the indices of the links from one device to another, the quickest way for 1 MiB.

        Devices of one host talk through that host's link to itself, where there is one.
        Raises `PlanError` (exit 2) when there is no way.
        """
        way: tuple[int, ...] = ()
        if nx.has_path(self.graph, source, target):
            nodes = nx.shortest_path(self.graph, source, target, weight="seconds")
            way = tuple(i for a, b in pairwise(nodes) for i in self.graph.edges[a, b]["links"])
            if not way:
                way = tuple(i for i, link in enumerate(self.links) if link.between == (nodes[1], nodes[1]))
        if not way:
            raise PlanError(
                what=f"no link leads from {source} to {target}",
                where=f"cluster '{self.name}'",
                why="two neighbouring stages must be able to talk",
                fix="add a [[links]] entry between them, or from their host to itself, to the cluster file",
                code=USAGE,
            )
        return way

    def transfer_seconds(self, way: tuple[int, ...], size: float) -> float:
        """Time of one undisturbed message over the links of `way`: all latencies, and the slowest link's bytes."""
        slowest = max(way, key=lambda i: self.links[i].seconds(size))
        return self.links[slowest].seconds(size) + sum(self.links[i].latency_s for i in way if i != slowest)

    def post_seconds(self, size: float) -> float:
        """Time that posting a message of `size` bytes keeps the device from computing."""
        return by_size(self.posts, size) if self.posts else 0.0

    def all_reduce_seconds(self, devices: tuple[str, ...], size: float) -> float:
        """Time of a ring all-reduce of `size` bytes over `devices`.

        A ring moves bytes / n in each of 2 (n - 1) rounds (Patarasu and Yuan, JPDC 2009). Seconds measured with
        another number of devices are those of as many bytes per round, times the ratio of the rounds.
        """
        count = len(devices)
        if count < 2:
            return 0.0
        if self.all_reduce:
            rounds, measured_rounds = 2 * (count - 1), 2 * (self.all_reduce_devices - 1)
            round_bytes, measured_devices = size / count, self.all_reduce_devices
            return by_size(self.all_reduce, round_bytes * measured_devices) * rounds / measured_rounds
        ring = [self.path(a, b) for a, b in zip(devices, (*devices[1:], devices[0]), strict=True)]
        return 2 * (count - 1) * max(self.transfer_seconds(way, size / count) for way in ring)


class _DeviceTable(Device, frozen=True, kw_only=True):
    count: int = 1


class _ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    hosts: tuple[Host, ...]
    devices: tuple[_DeviceTable, ...]
    links: tuple[Link, ...] = ()
    posts: tuple[tuple[int, float], ...] = ()
    transfer_work: tuple[tuple[int, float], ...] = ()


def read(path: Path) -> Cluster:
    """Read a cluster from TOML; `count = 8` in a device table stands for eight such devices, name0 to name7.

    Raises `PlanError` (exit 2) that names the field.
    """
    try:
        file = msgspec.toml.decode(path.read_bytes(), type=_ClusterFile)
        devices = tuple(
            Device(
                name=table.name if table.count == 1 else f"{table.name}{index}",
                **{f: getattr(table, f) for f in Device.__struct_fields__ if f != "name"},
            )
            for table in file.devices
            for index in range(table.count)
        )
        return Cluster(
            name=file.name,
            hosts=file.hosts,
            devices=devices,
            links=file.links,
            posts=file.posts,
            transfer_work=file.transfer_work,
        )
    except OSError as error:
        raise PlanError(
            what="the cluster file cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix="give the path of a TOML file, for example --cluster examples/eight_devices.toml",
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise PlanError(
            what="the cluster file is not valid",
            where=str(path),
            why=str(error),
            fix="compare it with examples/eight_devices.toml",
        ) from error
