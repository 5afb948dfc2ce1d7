"""The hardware a plan runs on: devices, the hosts whose cores they share, and the links between them.

A cluster is measured (`local`, inside a profile), or written by hand as TOML. It does not know the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import networkx as nx

from planner.basis.errors import DEVICE, USAGE, PlanError, unknown

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

    `price_per_hour` is in any currency.
    Devices with the same `host` share its cores when `shares_cores` (CPU processes); a GPU does not.
    """

    name: str
    memory_bytes: int
    host: str
    speed: float = 1.0
    threads: int = 1
    price_per_hour: float = 0.0
    shares_cores: bool = False


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A connection between two nodes (devices, hosts or switches), with its transfer time by message size.

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
    """Hosts, devices and links. `switches` name the nodes that only pass messages on (NVSwitch, InfiniBand).

    `posts` pairs message bytes with the seconds that posting a send or a receive costs the device itself: making the
    buffer, and what the backend copies before it returns. `transfer_work` pairs message bytes with the core seconds
    that a transfer takes from each end's host: the backend's own threads compute where CPU devices do.

    `all_reduce` pairs bytes with the measured seconds of an all-reduce over `all_reduce_devices` devices; without
    measurements it follows from the links (ring: 2 (n - 1) messages of bytes / n).
    Where messages are `buffered` they begin when they are sent; otherwise (rendezvous, as NCCL and large messages of
    gloo have it) when the receive has been posted, too.
    `elastic` hosts make as many CPU devices as a plan asks for, each with its share of the threads and the memory.
    """

    name: str
    hosts: tuple[Host, ...]
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    switches: tuple[str, ...] = ()
    posts: tuple[tuple[int, float], ...] = ()
    transfer_work: tuple[tuple[int, float], ...] = ()
    all_reduce: tuple[tuple[int, float], ...] = ()
    all_reduce_devices: int = 2
    buffered: bool = False
    elastic: bool = False

    def __post_init__(self) -> None:
        if not self.elastic and not self.devices:
            raise ValueError("devices: a cluster needs at least one device")
        _check_nodes(self)
        _check_links(self)
        if self.all_reduce_devices < 2:
            raise ValueError("all_reduce_devices: an all-reduce needs two devices")
        for name in ("posts", "transfer_work", "all_reduce"):
            _check_points(name, getattr(self, name))

    def take(self, count: int) -> Cluster:
        """Return the cluster with exactly the first `count` devices.

        The others on the same hosts still pass messages on, as switches; those on other hosts go, with their links.
        Raises `PlanError` (exit 5) when it has fewer.
        """
        if count not in self._taken:
            self._taken[count] = self._reduced(count)
        return self._taken[count]

    @cached_property
    def tables(self) -> dict[object, object]:
        """What others have derived from this cluster and keep with it (`planner.basis.memo`)."""
        return {}

    @cached_property
    def identity(self) -> object:
        """What this cluster's own tables are kept under elsewhere: another one may have the same name."""
        return object()

    @cached_property
    def speeds(self) -> dict[str, float]:
        """Every device's speed by its name."""
        return {device.name: device.speed for device in self.devices}

    @cached_property
    def _taken(self) -> dict[int, Cluster]:
        return {}

    def _reduced(self, count: int) -> Cluster:
        if not self.elastic:
            if count > len(self.devices):
                raise PlanError(
                    what=f"{count} devices are asked for, the cluster has {len(self.devices)}",
                    where=f"cluster '{self.name}'",
                    why="each partition needs a device of its own",
                    fix=f"plan simulate --k {len(self.devices)}",
                    code=DEVICE,
                )
            if count == len(self.devices):
                return self
            hosts = {device.host for device in self.devices[:count]}
            left = self.devices[count:]
            gone = {device.name for device in left if device.host not in hosts}
            return msgspec.structs.replace(
                self,
                devices=self.devices[:count],
                switches=(*self.switches, *(device.name for device in left if device.host in hosts)),
                links=tuple(link for link in self.links if gone.isdisjoint(link.between)),
            )
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
        """Devices, hosts, switches and links as a networkx graph.

        The way through a host weighs as much as that host's link to itself, so a direct link between two of its
        devices is preferred only where it is quicker; a host without such a link is no way between its own devices.
        """
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from((*(host.name for host in self.hosts), *self.switches))
        inside = {link.between[0]: link.seconds(2**20) for link in self.links if link.between[0] == link.between[1]}
        for device in self.devices:
            graph.add_edge(device.name, device.host, links=(), seconds=inside.get(device.host, _DETOUR_S) / 2)
        for index, link in enumerate(self.links):
            if link.between[0] != link.between[1]:
                graph.add_edge(*link.between, links=(index,), seconds=link.seconds(2**20))
        return graph

    def path(self, source: str, target: str) -> tuple[int, ...]:
        """Return the indices of the links from one device to another, the quickest way for 1 MiB.

        Devices of one host talk through that host's link to itself, where there is one. Devices of a third host pass
        messages on only where there is no other way. Every pair is looked up once.
        Raises `PlanError` (exit 2) when there is no way.
        """
        if (source, target) not in self._ways:
            self._ways[source, target] = self._way(source, target)
        return self._ways[source, target]

    @cached_property
    def _ways(self) -> dict[tuple[str, str], tuple[int, ...]]:
        return {}

    @cached_property
    def _near(self) -> dict[tuple[str, str], nx.Graph[str]]:
        return {}

    @cached_property
    def _host_of(self) -> dict[str, str]:
        return {device.name: device.host for device in self.devices}

    @cached_property
    def _devices_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {host.name: [] for host in self.hosts}
        for device in self.devices:
            found[device.host].append(device.name)
        return found

    @cached_property
    def _own_links(self) -> dict[str, tuple[int, ...]]:
        """Every host's link to itself, where it has one."""
        found = [(i, link.between) for i, link in enumerate(self.links)]
        return {one: (i,) for i, (one, other) in reversed(found) if one == other}

    @cached_property
    def _backbone(self) -> list[tuple[str, str, dict[str, object]]]:
        """The edges between hosts and switches."""
        return [(a, b, d) for a, b, d in self.graph.edges(data=True) if not {a, b} & self._host_of.keys()]

    def _between(self, one: str, other: str) -> nx.Graph[str]:
        """The part of the graph that joins the devices of two hosts: small, however large the cluster."""
        if (one, other) not in self._near:
            own = {*self._devices_of[one], *self._devices_of[other]}
            near: nx.Graph[str] = nx.Graph()
            near.add_nodes_from(own)
            near.add_edges_from(self._backbone)
            near.add_edges_from(
                (a, b, d) for a, b, d in self.graph.edges(own, data=True) if b in own or b not in self._host_of
            )
            self._near[one, other] = near
        return self._near[one, other]

    def _way(self, source: str, target: str) -> tuple[int, ...]:
        own: tuple[int, ...] = ()
        if self._host_of[source] == self._host_of[target]:
            own = self._own_links.get(self._host_of[source], ())
        for graph in (self._between(self._host_of[source], self._host_of[target]), self.graph):
            try:
                nodes = nx.shortest_path(graph, source, target, weight="seconds")
            except nx.NetworkXNoPath:
                continue
            way = tuple(i for a, b in pairwise(nodes) for i in graph.edges[a, b]["links"])
            if len(nodes) > 1 and own and not self._quicker(way, own):
                way = own  # also where both devices have links of their own to the host's memory
            if way:
                return way
        raise PlanError(
            what=f"no link leads from {source} to {target}",
            where=f"cluster '{self.name}'",
            why="two neighbouring stages must be able to talk",
            fix="add a [[links]] entry between them, or from their host to itself, to the cluster file",
            code=USAGE,
        )

    def _quicker(self, way: tuple[int, ...], other: tuple[int, ...]) -> bool:
        mine, theirs = (sum(self.links[i].seconds(2**20) for i in links) for links in (way, other))
        return bool(way) and mine < theirs

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


def _check_nodes(cluster: Cluster) -> None:
    """Raise `ValueError` for a host or device whose numbers make no sense, or two nodes with one name."""
    hosts = {host.name for host in cluster.hosts}
    for kind, names in (
        ("hosts", [host.name for host in cluster.hosts]),
        ("devices", [device.name for device in cluster.devices]),
    ):
        if len(set(names)) != len(names):
            raise ValueError(f"{kind}: two {kind} have the same name")
    for host in cluster.hosts:
        if host.cores < 1 or host.memory_bytes <= 0:
            raise ValueError(f"hosts '{host.name}': cores and memory_bytes must be positive")
        if not all(active > 0 and 0 < factor < math.inf for active, factor in host.slowdown):
            raise ValueError(f"hosts '{host.name}': slowdown needs positive, finite numbers")
    for device in cluster.devices:
        if device.host not in hosts:
            raise ValueError(f"devices '{device.name}': there is no host '{device.host}'")
        if device.memory_bytes <= 0 or not 0 < device.speed < math.inf:
            raise ValueError(f"devices '{device.name}': memory_bytes and speed must be positive and finite")
        if device.threads < 1:
            raise ValueError(f"devices '{device.name}': threads must be positive")
    every = [*hosts, *(device.name for device in cluster.devices), *cluster.switches]
    if len(set(every)) != len(every):
        twice = next(name for name in every if every.count(name) > 1)
        raise ValueError(f"'{twice}' names two of the hosts, devices and switches")


def _check_links(cluster: Cluster) -> None:
    """Raise `ValueError` for a link to nowhere or with numbers that make no sense."""
    known = {
        *(host.name for host in cluster.hosts),
        *(device.name for device in cluster.devices),
        *cluster.switches,
    }
    for link in cluster.links:
        bandwidth, latency = link.bandwidth_bytes_per_s, link.latency_s
        if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
            raise ValueError(f"links {link.between}: the bandwidth must be positive and the latency not negative")
        _check_points(f"links {link.between}", link.points)
        for end in link.between:
            if end not in known and not cluster.elastic:
                raise ValueError(f"links {link.between}: there is no device, host or switch '{end}'")


def _check_points(what: str, points: Sequence[tuple[int, float]]) -> None:
    """Raise `ValueError` unless the measured (bytes, seconds) are finite, not negative and in order of size."""
    if not all(size >= 0 and 0 <= seconds < math.inf for size, seconds in points):
        raise ValueError(f"{what}: bytes and seconds must be finite and not negative")
    if any(small >= large for (small, _), (large, _) in pairwise(points)):
        raise ValueError(f"{what}: the sizes must increase")


T = TypeVar("T", Host, Device, Link)
_Count = Annotated[int, msgspec.Meta(ge=1)]


class _HostTable(Host, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: _Count = 1


class _DeviceTable(Device, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: _Count = 1


class _SwitchTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    count: _Count = 1


class _LinkTable(Link, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _ClusterFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    hosts: tuple[_HostTable, ...]
    devices: tuple[_DeviceTable, ...]
    switches: tuple[_SwitchTable, ...] = ()
    links: tuple[_LinkTable, ...] = ()
    posts: tuple[tuple[int, float], ...] = ()
    transfer_work: tuple[tuple[int, float], ...] = ()
    all_reduce: tuple[tuple[int, float], ...] = ()
    all_reduce_devices: int = 2

    def cluster(self) -> Cluster:
        """Write out what the tables abbreviate."""
        tables: list[_HostTable | _DeviceTable | _SwitchTable] = [*self.hosts, *self.switches, *self.devices]
        groups = {table.name: _numbered(table.name, table.count) for table in tables}
        return Cluster(
            name=self.name,
            hosts=tuple(_copy(Host, t, name=name) for t in self.hosts for name in _numbered(t.name, t.count)),
            devices=tuple(
                _copy(Device, t, name=name, host=host)
                for t in self.devices
                for name, host in _dealt(_numbered(t.name, t.count), _named(t.host, groups))
            ),
            switches=tuple(name for t in self.switches for name in _numbered(t.name, t.count)),
            links=tuple(
                _copy(Link, t, between=between)
                for t in self.links
                for between in _dealt(_named(t.between[0], groups), _named(t.between[1], groups))
            ),
            posts=self.posts,
            transfer_work=self.transfer_work,
            all_reduce=self.all_reduce,
            all_reduce_devices=self.all_reduce_devices,
        )


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return (name,) if count == 1 else tuple(f"{name}{index}" for index in range(count))


def _copy(kind: type[T], table: T, **changes: object) -> T:
    return kind(**{f: getattr(table, f) for f in kind.__struct_fields__} | changes)


def _named(name: str, groups: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The node of that name; `name*` stands for all of a table."""
    if not name.endswith("*"):
        return (name,)
    if name[:-1] not in groups:
        raise ValueError(f"'{name}': there is no table '{name[:-1]}', only {', '.join(groups)}")
    return groups[name[:-1]]


def _dealt(left: Sequence[str], right: Sequence[str]) -> list[tuple[str, str]]:
    """Join every name of the longer list with one of the shorter, in equal blocks.

    >>> _dealt(["d0", "d1", "d2", "d3"], ["h0", "h1"])
    [('d0', 'h0'), ('d1', 'h0'), ('d2', 'h1'), ('d3', 'h1')]
    """
    count = max(len(left), len(right))
    if count % len(left) or count % len(right):
        raise ValueError(f"{len(left)} of '{left[0]}' … and {len(right)} of '{right[0]}' … cannot be dealt out evenly")
    return [(left[i * len(left) // count], right[i * len(right) // count]) for i in range(count)]


def find(given: str, shipped: Mapping[str, Path]) -> Cluster:
    """Read a cluster by the path of its file, or by the name of one in `shipped`.

    Raises `PlanError` (exit 2), for an unknown name with the nearest that is known.
    """
    path = Path(given)
    if path.is_file() or path.suffix == ".toml" or os.sep in given:
        return read(path)
    if given in shipped:
        return read(shipped[given])
    fix = "give one of the known names, or the path of a TOML file such as examples/eight_devices.toml"
    raise unknown("cluster", given, sorted(shipped), where="--cluster", fix=fix)


def read(path: Path) -> Cluster:
    """Read a cluster from TOML.

    `count = 8` in a table of a host, device or switch stands for eight of them, name0 to name7. Where a device names
    its host, or a link its ends, `name*` means all of them, each with the one in whose block it stands: of 16 `gpu*`
    on 2 `node*`, gpu0 to gpu7 are on node0.
    Raises `PlanError` (exit 2) that names the field, also where two devices have no way to each other.
    """
    try:
        cluster = msgspec.toml.decode(path.read_bytes(), type=_ClusterFile).cluster()
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
    for one, other in pairwise(cluster.devices):
        cluster.path(one.name, other.name)
    return cluster
