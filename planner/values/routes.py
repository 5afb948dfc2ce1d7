"""Which links a message passes from one device to another: directed link numbers, looked up once per pair.

Links are full duplex: what goes from its first end to its second does not disturb what comes back. So every link has
two numbers, 2 x index from `between[0]` to `between[1]` and 2 x index + 1 the other way. A host's link to itself is
what its devices talk over (loopback, its memory): it has no two ends, and everything on it shares its first number.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import networkx as nx

from planner.basis.errors import DEVICE, USAGE, PlanError
from planner.values.hardware import Device, Host, Link

Path = tuple[int, ...]
"""Directed link numbers in the order in which a message passes them."""

_DETOUR_S = 1e6  # longer than any link: never chosen where there is a link
_USUAL_BYTES = 2**20  # the message for which the quickest path is chosen


class Routes:
    """The paths between the devices of one cluster, called `where` in errors."""

    def __init__(
        self,
        where: str,
        *,
        hosts: tuple[Host, ...],
        devices: tuple[Device, ...],
        links: tuple[Link, ...],
        switches: tuple[str, ...],
    ) -> None:
        self.where, self.hosts, self.devices, self.links, self.switches = where, hosts, devices, links, switches
        self.host_of = {device.name: device.host for device in devices}
        self.devices_of: dict[str, list[str]] = {host.name: [] for host in hosts}
        for device in devices:
            self.devices_of[device.host].append(device.name)
        self.rank = {name: rank for names in self.devices_of.values() for rank, name in enumerate(names)}
        """Every device's place among those of its host."""
        self._known: dict[tuple[str, str], Path] = {}
        self._near: dict[tuple[str, str], nx.Graph[str]] = {}
        self._alike: dict[tuple[object, ...], list[tuple[int, int | str]] | None] = {}

    @cached_property
    def graph(self) -> nx.Graph[str]:
        """Devices, hosts, switches and links as a networkx graph; links between the same two nodes are one edge.

        The edge between a device and its host weighs half as much as that host's link to itself, so a direct link
        between two of its devices is preferred only where it is quicker; a host without such a link is no way between
        its own devices.
        """
        graph: nx.Graph[str] = nx.Graph()
        graph.add_nodes_from((*(host.name for host in self.hosts), *self.switches))
        inside = {name: self.links[path[0] // 2].seconds(_USUAL_BYTES) for name, path in self._own.items()}
        for device in self.devices:
            graph.add_edge(device.name, device.host, links=(), seconds=inside.get(device.host, _DETOUR_S) / 2)
        between: dict[frozenset[str], list[int]] = {}
        for index, link in enumerate(self.links):
            if link.between[0] != link.between[1]:
                between.setdefault(frozenset(link.between), []).append(index)
        for ends, indices in between.items():
            quickest = min(self.links[i].seconds(_USUAL_BYTES) for i in indices)
            equal = tuple(i for i in indices if self.links[i].seconds(_USUAL_BYTES) == quickest)
            graph.add_edge(*ends, links=equal, seconds=quickest)
        return graph

    def path(self, source: str, target: str) -> Path:
        """Return the links from one device to another, the quickest path for 1 MiB.

        Devices of one host talk through that host's link to itself, where there is one. Devices of a third host pass
        messages on only where there is no other path. Of several equal links between two nodes (a host's NICs) each
        device uses the one in whose turn it stands among those of its host.
        Raises `PlanError` (exit 2) when there is no path.
        """
        if (source, target) not in self._known:
            one, other = self.host_of[source], self.host_of[target]
            key = self.kinds[one], self.kinds[other], self.rank[source], self.rank[target], one == other
            if key not in self._alike:
                self._alike[key] = self._roles(self._nodes(source, target), one, other)
            roles = self._alike[key]
            nodes = self._nodes(source, target) if roles is None else self._named(roles, one, other)
            self._known[source, target] = self._path(nodes, source, target)
        return self._known[source, target]

    def to_host(self, device: str) -> Path:
        """Return the link from a device to its host's memory; the way back is `back(...)`.

        Raises `PlanError` (exit 5) where there is none: a CPU's memory is its host's already.
        """
        host = self.host_of.get(device, "its host")
        path = self._to_host.get(device, ())
        if not path:
            raise PlanError(
                what=f"{device} has no link to its host's memory",
                where=self.where,
                why="swapping, a host's optimizer and central storage copy between a device and its host",
                fix=f'add a [[links]] entry with between = ["{device}", "{host}"], or plan without them',
                code=DEVICE,
            )
        return path

    def apart(self, device: str) -> bool:
        """Whether a device has a link to its host's memory, as one has whose memory is its own."""
        return device in self._to_host

    def back(self, path: Path) -> Path:
        """Return the same links in the other direction."""
        ends = (self.links[number // 2].between for number in reversed(path))
        return tuple(number if a == b else number ^ 1 for number, (a, b) in zip(reversed(path), ends, strict=True))

    @cached_property
    def _to_host(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for index, link in reversed(list(enumerate(self.links))):
            for direction, (one, other) in enumerate((link.between, link.between[::-1])):
                if one != other and self.host_of.get(one) == other:
                    found[one] = (2 * index + direction,)
        return found

    @cached_property
    def _own(self) -> dict[str, Path]:
        """Every host's link to itself, where it has one."""
        found = [(i, link.between) for i, link in enumerate(self.links)]
        return {one: (2 * i,) for i, (one, other) in reversed(found) if one == other}

    @cached_property
    def _backbone(self) -> list[tuple[str, str, dict[str, object]]]:
        """The edges between hosts and switches."""
        return [(a, b, d) for a, b, d in self.graph.edges(data=True) if not {a, b} & self.host_of.keys()]

    def _between(self, one: str, other: str) -> nx.Graph[str]:
        """The part of the graph that joins the devices of two hosts: small, however large the cluster."""
        if (one, other) not in self._near:
            own = dict.fromkeys((*self.devices_of[one], *self.devices_of[other]))  # a set has another order each time
            near: nx.Graph[str] = nx.Graph()
            near.add_nodes_from(own)
            near.add_edges_from(self._backbone)
            near.add_edges_from(
                (a, b, d) for a, b, d in self.graph.edges(own, data=True) if b in own or b not in self.host_of
            )
            self._near[one, other] = near
        return self._near[one, other]

    def _nodes(self, source: str, target: str) -> list[str]:
        """The nodes of the quickest path between two devices; none where there is none."""
        for graph in (self._between(self.host_of[source], self.host_of[target]), self.graph):
            try:
                nodes: list[str] = nx.shortest_path(graph, source, target, weight="seconds")
            except nx.NetworkXNoPath:
                continue
            if self._along(graph, nodes):
                return nodes
        return []

    def _path(self, nodes: list[str], source: str, target: str) -> Path:
        """The links along some nodes, or their host's link to itself where it is no slower."""
        own: Path = ()
        if self.host_of[source] == self.host_of[target]:
            own = self._own.get(self.host_of[source], ())
        path = self._along(self.graph, nodes)
        if own and not self._quicker(path, own):
            path = own  # also where both devices have links of their own to the host's memory
        if path:
            return path
        raise PlanError(
            what=f"no link leads from {source} to {target}",
            where=self.where,
            why="two neighbouring stages must be able to talk",
            fix="add a [[links]] entry between them, or from their host to itself, to the cluster file",
            code=USAGE,
        )

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        """The nodes of every host that no other host's devices are linked with: itself, its devices, its switches."""
        homes: dict[str, set[str]] = {}
        for device, host in self.host_of.items():
            for node in self.graph[device]:
                if node not in self.host_of:
                    homes.setdefault(node, set()).add(host)
        found = {host: [host, *devices] for host, devices in self.devices_of.items()}
        names = {host.name for host in self.hosts}
        for switch in self.switches:
            if switch not in names and len(homes.get(switch, ())) == 1:
                found[next(iter(homes[switch]))].append(switch)
        return found

    @cached_property
    def kinds(self) -> dict[str, object]:
        """What every host's neighbourhood looks like: equal for hosts whose devices have the same paths."""
        place = {node: i for nodes in self._members.values() for i, node in enumerate(nodes)}
        home = {node: host for host, nodes in self._members.items() for node in nodes}
        kinds: dict[object, object] = {}
        found: dict[str, object] = {}
        for host, nodes in self._members.items():
            edges = [
                (place[a], place[b] if home.get(b) == host else b, d["seconds"], len(d["links"]))
                for a in nodes
                for b, d in self.graph[a].items()
            ]
            look = tuple(sorted(edges, key=repr)), self._own.get(host) is not None
            found[host] = kinds.setdefault(look, len(kinds))
        return found

    def _roles(self, nodes: list[str], one: str, other: str) -> list[tuple[int, int | str]] | None:
        """What each node of a path is to the two hosts, or by its name; None where it passes through a third host."""
        found: list[tuple[int, int | str]] = []
        for node in nodes:
            side = next((i for i, host in enumerate((one, other)) if node in self._members[host]), 2)
            if side == 2 and (node in self.devices_of or node in self.host_of):
                return None
            found.append((side, self._members[(one, other)[side]].index(node) if side < 2 else node))
        return found

    def _named(self, roles: list[tuple[int, int | str]], one: str, other: str) -> list[str]:
        """The nodes that have these roles for two hosts."""
        hosts = self._members[one], self._members[other]
        return [hosts[side][role] if isinstance(role, int) else role for side, role in roles]

    def _along(self, graph: nx.Graph[str], nodes: list[str]) -> Path:
        """Return the directed links from node to node; near each end, of several links that end's own."""
        numbers = []
        for place, (a, b) in enumerate(pairwise(nodes)):
            links = graph.edges[a, b]["links"]
            if links:
                end = nodes[0] if 2 * place + 1 < len(nodes) else nodes[-1]
                index = links[self.rank[end] % len(links)]
                numbers.append(2 * index + (self.links[index].between[0] != a))
        return tuple(numbers)

    def _quicker(self, path: Path, other: Path) -> bool:
        mine, theirs = (sum(self.links[n // 2].seconds(_USUAL_BYTES) for n in links) for links in (path, other))
        return bool(path) and mine < theirs
