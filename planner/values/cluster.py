"""The hardware a plan runs on: devices, the hosts whose cores they share, and the links between them.

A cluster is measured (`local`, inside a profile), or written by hand as TOML (`planner.values.cluster_file`). It does
not know the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec

from planner.basis.errors import DEVICE, PlanError
from planner.values.hardware import AllReduce, Device, Host, Link, by_size
from planner.values.routes import Path, Routes

__all__ = ["AllReduce", "Cluster", "Communication", "Device", "Host", "Link", "by_size"]


class Communication(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What holds for messages and collectives on all links of a cluster: fields that its file has, too.

    `posts` pairs message bytes with the seconds that posting a send or a receive costs the device itself: making the
    buffer, and what the backend copies before it returns. `transfer_work` pairs message bytes with the core seconds
    that a transfer takes from each end's host: the backend's own threads compute where CPU devices do.

    `all_reduces` are measured, each for a number of devices of one host; others follow from the links
    (`planner.costs.collectives`).
    Where messages are `buffered` they begin when they are sent; otherwise (rendezvous, as NCCL and large messages of
    gloo have it) when the receive has been posted, too.
    """

    posts: tuple[tuple[int, float], ...] = ()
    transfer_work: tuple[tuple[int, float], ...] = ()
    all_reduces: tuple[AllReduce, ...] = ()
    buffered: bool = False


class Cluster(Communication, frozen=True, kw_only=True, dict=True):
    """Hosts, devices and links. `switches` name the nodes that only pass messages on (NVSwitch, InfiniBand).

    `elastic` hosts make as many CPU devices as a plan asks for, each with its share of the threads and the memory.
    Messages and collectives have `message_scale` times the bytes of what they carry: a rehearsal's may have fewer.
    """

    name: str
    hosts: tuple[Host, ...]
    devices: tuple[Device, ...] = ()
    links: tuple[Link, ...] = ()
    switches: tuple[str, ...] = ()
    elastic: bool = False
    message_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.elastic and not self.devices:
            raise ValueError("devices: a cluster needs at least one device")
        _check_nodes(self)
        _check_links(self)
        _check_all_reduces(self.all_reduces)
        for name in ("posts", "transfer_work"):
            _check_points(name, getattr(self, name))

    def take(self, count: int) -> Cluster:
        """Return the cluster with exactly the first `count` devices.

        The others on the same hosts still pass messages on, as switches; those on other hosts go, with their links.
        Raises `PlanError` (exit 5) when it has fewer.
        """
        if count not in self._taken:
            self._taken[count] = self._reduced(count)
        return self._taken[count]

    def only(self, names: Sequence[str]) -> Cluster:
        """Return the cluster with exactly the devices called `names`, in its own order; the rest as in `take`.

        An elastic host makes as many devices as there are names. Raises `PlanError` (exit 5) for an unknown name.
        """
        asked = tuple(names)
        if asked not in self._asked:
            self._asked[asked] = self._called(frozenset(asked), len(asked))
        return self._asked[asked]

    def _called(self, wanted: frozenset[str], count: int) -> Cluster:
        if self.elastic or wanted == {device.name for device in self.devices[:count]}:
            return self.take(count)
        if wanted not in self._chosen:
            unknown_names = wanted - {device.name for device in self.devices}
            if unknown_names:
                raise PlanError(
                    what=f"the cluster has no device {', '.join(sorted(unknown_names))}",
                    where=f"cluster '{self.name}'",
                    why="the plan places stages there",
                    fix="name devices of the cluster in the plan, or give the cluster that the plan is for (--cluster)",
                    code=DEVICE,
                )
            self._chosen[wanted] = self._with(tuple(d for d in self.devices if d.name in wanted))
        return self._chosen[wanted]

    @cached_property
    def tables(self) -> dict[object, object]:
        """What others have derived from this cluster and keep with it (`planner.basis.memo`)."""
        return {}

    @cached_property
    def identity(self) -> object:
        """What this cluster's own tables are kept under elsewhere: another one may have the same name."""
        return object()

    @cached_property
    def _taken(self) -> dict[int, Cluster]:
        return {}

    @cached_property
    def _asked(self) -> dict[tuple[str, ...], Cluster]:
        return {}

    @cached_property
    def _chosen(self) -> dict[frozenset[str], Cluster]:
        return {}

    def _with(self, devices: tuple[Device, ...]) -> Cluster:
        """The cluster with these of its devices; others on their hosts pass messages on, the rest goes."""
        if len(devices) == len(self.devices):
            return self
        hosts, names = {device.host for device in devices}, {device.name for device in devices}
        left = [device for device in self.devices if device.name not in names]
        gone = {device.name for device in left if device.host not in hosts}
        return msgspec.structs.replace(
            self,
            devices=devices,
            switches=(*self.switches, *(device.name for device in left if device.host in hosts)),
            links=tuple(link for link in self.links if gone.isdisjoint(link.between)),
        )

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
            return self._with(self.devices[:count])
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
    def routes(self) -> Routes:
        """The paths between its devices."""
        return Routes(
            f"cluster '{self.name}'",
            hosts=self.hosts,
            devices=self.devices,
            links=self.links,
            switches=self.switches,
        )

    def path(self, source: str, target: str) -> Path:
        """Return the directed links from one device to another, the quickest path for 1 MiB (`Routes.path`).

        Raises `PlanError` (exit 2) when there is no path.
        """
        return self.routes.path(source, target)

    @cached_property
    def bandwidths(self) -> tuple[float, ...]:
        """Bytes/s that all transfers together get: on each directed link (infinite: not shared), each port, each host.

        The last are the hosts' memories, in their order.
        """
        links = [link.bandwidth_bytes_per_s if link.shared else math.inf for link in self.links for _ in range(2)]
        ports = [self.link_of(number).bandwidth_bytes_per_s for _, number in self._ports]
        return (*links, *ports, *(host.memory_bytes_per_s for host in self.hosts))

    @cached_property
    def memories(self) -> dict[str, int]:
        """The number under which flows pass each host's memory, by the host's name."""
        first = 2 * len(self.links) + len(self._ports)
        return {host.name: first + index for index, host in enumerate(self.hosts)}

    @cached_property
    def _ports(self) -> dict[tuple[str, int], int]:
        """The number of every port, by whose it is and the directed link.

        Of a link between two nodes each direction is one, nobody's (""). Of a host's link to itself each of the host's
        devices has two: what it sends (the link's first number), and what it receives (its second).
        Between switches that join hosts there is none: what several hosts send meets there.
        """
        ends: list[tuple[str, int]] = []
        for index, link in enumerate(self.links):
            one, other = link.between
            if link.shared or (one != other and not {one, other} & self._inside):
                continue
            for owner in self.routes.devices_of.get(one, ()) if one == other else ("",):
                ends += (owner, 2 * index), (owner, 2 * index + 1)
        return {end: 2 * len(self.links) + place for place, end in enumerate(ends)}

    @cached_property
    def _inside(self) -> frozenset[str]:
        """Devices, hosts, and the switches that are linked with one host, or with its devices, alone: its NICs."""
        home = {host.name: host.name for host in self.hosts} | self.routes.host_of
        homes: dict[str, set[str]] = {}
        for one, other in (ends for link in self.links for ends in (link.between, link.between[::-1])):
            if one not in home and other in home:
                homes.setdefault(one, set()).add(home[other])
        return frozenset((*home, *(switch for switch, hosts in homes.items() if len(hosts) == 1)))

    def through_ports(self, path: Path, source: str, target: str) -> Path:
        """Return the path with the ports on it, for a device that talks to many at the same time.

        Links that are not shared disturb no two transfers, but what one end (a device, a host or its NIC) sends or
        receives over one of them, to or from however many others, passes its port there, at the link's bandwidth.
        """
        wanted = (*(("", number) for number in path), (source, path[0]), (target, path[-1] | 1))
        return (*path, *(self._ports[port] for port in wanted if port in self._ports))

    def link_of(self, number: int) -> Link:
        """Return the link of a directed number: both directions have the same figures."""
        return self.links[number // 2]

    def figures(self, path: Path) -> object:
        """Return what tells how quickly messages pass a path: equal for paths that are as quick, alone or not."""
        links = map(self.link_of, path)
        return tuple((link.latency_s, link.bandwidth_bytes_per_s, link.points, link.shared) for link in links)

    @cached_property
    def ends(self) -> dict[str, object]:
        """The figures of the links that end at each node."""
        found: dict[str, set[object]] = {}
        for index, link in enumerate(self.links):
            for node in link.between:
                found.setdefault(node, set()).add(self.figures((2 * index,)))
        return {node: frozenset(figures) for node, figures in found.items()}

    def transfer_seconds(self, path: Path, size: float) -> float:
        """Time of one undisturbed message over the links of `path`: all latencies, and the slowest link's bytes."""
        slowest = max(path, key=lambda number: self.link_of(number).seconds(size))
        latencies = sum(self.link_of(number).latency_s for number in path if number != slowest)
        return self.link_of(slowest).seconds(size) + latencies

    def post_seconds(self, size: float) -> float:
        """Time that posting a message of `size` bytes keeps the device from computing."""
        return by_size(self.posts, size) if self.posts else 0.0


def _check_nodes(cluster: Cluster) -> None:
    """Raise `ValueError` for a host or device whose numbers make no sense, or two nodes with one name."""
    hosts = {host.name for host in cluster.hosts}
    for kind, names in (
        ("hosts", [host.name for host in cluster.hosts]),
        ("devices", [device.name for device in cluster.devices]),
    ):
        if len(set(names)) != len(names):
            raise ValueError(f"{kind}: two {kind} have the same name")
        odd = next((name for name in names if not name.strip() or not name.isprintable()), None)
        if odd is not None:
            raise ValueError(f"{kind}: {odd!r} is no name that can be printed")
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


def _check_all_reduces(curves: tuple[AllReduce, ...]) -> None:
    """Raise `ValueError` unless every curve is one of several devices, and the only one of so many."""
    for curve in curves:
        if curve.devices < 2 or not curve.points:
            raise ValueError("all_reduces: an all-reduce needs two devices, and points")
        _check_points(f"all_reduces of {curve.devices} devices", curve.points)
    if len({curve.devices for curve in curves}) < len(curves):
        raise ValueError("all_reduces: two curves are of the same number of devices")


def _check_points(what: str, points: Sequence[tuple[int, float]]) -> None:
    """Raise `ValueError` unless the measured (bytes, seconds) are finite, not negative and in order of size."""
    if not all(size >= 0 and 0 <= seconds < math.inf for size, seconds in points):
        raise ValueError(f"{what}: bytes and seconds must be finite and not negative")
    if any(small >= large for (small, _), (large, _) in pairwise(points)):
        raise ValueError(f"{what}: the sizes must increase")
