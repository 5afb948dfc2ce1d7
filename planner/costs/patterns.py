"""Which bytes pass which links in a collective: a ring, a double binary tree, rings among peers of several hosts.

A pattern is a few phases; a phase is a number of rounds in which every hop carries its share of the bytes. Seconds and
flows follow from that (`planner.costs.collectives`). Messages between hosts use every NIC: as many rings, or trees, run
at the same time as a host has devices in the group, each entering and leaving a host by another of them, as NCCL's
channels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise, permutations
from typing import NamedTuple

from planner.values.cluster import Cluster
from planner.values.routes import Path

Hosts = tuple[tuple[str, ...], ...]
"""The devices of a group, host by host."""


class Group(NamedTuple):
    """Devices that reduce or gather together. `hosts` are written out, or the first few that stand for all `spans`."""

    hosts: Hosts
    spans: int
    size: int

    @property
    def rails(self) -> int:
        """The most devices that the group has on one host."""
        return max(map(len, self.hosts))


class Phase(NamedTuple):
    """`rounds` of messages in step, with `latency_s` over all of them; `hops` are (path, share of bytes per round)."""

    rounds: int
    latency_s: float
    hops: list[tuple[Path, float]]


Pattern = Callable[[Cluster, Group, int], list[Phase] | None]
"""From a group, and 1 (reduce-scatter, all-gather) or 2 passes (all-reduce), to the phases; None if it cannot be."""


def by_host(cluster: Cluster, devices: tuple[str, ...]) -> Hosts:
    """Sort a group's devices by their hosts, which stay in the order in which they first come."""
    found: dict[str, list[str]] = {}
    for device in devices:
        found.setdefault(cluster.routes.host_of[device], []).append(device)
    return tuple(map(tuple, found.values()))


def ring(cluster: Cluster, group: Group, passes: int) -> list[Phase] | None:
    """n - 1 rounds a pass of 1 / n of the bytes around a ring, host by host (Patarasu and Yuan, JPDC 69(2), 2009).

    Over H hosts with g devices each, g rings with 1 / g of the bytes run at the same time: ring r enters a host at its
    device r and leaves it from device r - 1, so every NIC carries (n - 1) / n of the bytes per pass, over the host's
    number of NICs. Inside one host whose devices have links to each other, there are as many rings as the links allow
    (`circles`). A chunk passes every hop of its ring once per pass, less one.
    """
    if len(group.hosts) == 1:
        orders = circles(cluster, group.hosts[0])
        rings, hops = len(orders), [(path, 1) for order in orders for path, _ in _ring_hops(cluster, (order,), 1)]
    else:
        rings, hops = group.rails, list(_ring_hops(cluster, group.hosts, group.rails))
    drawn = sum(count for _, count in hops)
    waits = sum(count * cluster.transfer_seconds(path, 0.0) for path, count in hops) / drawn
    rounds, share = passes * (group.size - 1), 1 / (rings * group.size)
    return [Phase(rounds, rounds * waits, [(path, count * share) for path, count in hops])]


def circles(cluster: Cluster, devices: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Order devices into as many rings as their own links to each other carry at full speed, as NCCL's search does.

    A link of twice the bandwidth carries two; every ring is there in both directions. Of a DGX-1's 8 GPUs, with six
    links each, six: 6 x 22.4 GB/s, of which nccl-tests reach 134.5. One, in the order given, where there is a switch,
    where no ring closes, or where there are too many devices to look (`_MESH`).
    """
    if not 2 < len(devices) <= _MESH:
        return [devices]
    direct: dict[tuple[str, str], float] = {}
    for one, other in combinations(devices, 2):
        path = cluster.path(one, other)
        if set(cluster.link_of(path[0]).between) == {one, other}:
            direct[one, other] = cluster.link_of(path[0]).bandwidth_bytes_per_s
    if not direct:
        return [devices]
    unit = min(direct.values())
    room = {frozenset(pair): int(bandwidth / unit + 1e-9) for pair, bandwidth in direct.items()}
    orders = ((devices[0], *rest) for rest in permutations(devices[1:]) if rest[0] < rest[-1])
    closed = [order for order in orders if all(pair in room for pair in _pairs(order))]
    most = min(sum(n for pair, n in room.items() if name in pair) for name in devices) // 2
    found = _packed(closed, room, most)
    return [ring for order in found for ring in (order, order[::-1])] or [devices]


_MESH = 8


def _pairs(order: tuple[str, ...]) -> list[frozenset[str]]:
    return [frozenset(pair) for pair in zip(order, (*order[1:], order[0]), strict=True)]


def _packed(rings: list[tuple[str, ...]], room: dict[frozenset[str], int], most: int) -> list[tuple[str, ...]]:
    """The most of `rings` (each any number of times, no more than `most`) that fit into `room` together."""
    best: list[tuple[str, ...]] = []
    for at, order in enumerate(rings):
        if len(best) >= most:
            break
        pairs = _pairs(order)
        if all(room[pair] > 0 for pair in pairs):
            left = room | {pair: room[pair] - 1 for pair in pairs}
            found = [order, *_packed(rings[at:], left, most - 1)]
            if len(found) > len(best):
                best = found
    return best


def _ring_hops(cluster: Cluster, hosts: Hosts, rails: int) -> Iterator[tuple[Path, int]]:
    """Every hop with the number of rings on it."""
    several = len(hosts) > 1
    for own in hosts:
        k = len(own)
        for i in range(k if k > 1 else 0):
            # Within a host a ring does not go from its last device to its first.
            broken = len(range((i + 1) % k, rails, k)) if several else 0
            if rails > broken:
                yield cluster.path(own[i], own[(i + 1) % k]), rails - broken
    for here, there in zip(hosts, (*hosts[1:], hosts[0]), strict=True):
        for rail in range(rails if several else 0):
            yield cluster.path(here[(rail - 1) % len(here)], there[rail % len(there)]), 1


def tree(cluster: Cluster, group: Group, passes: int) -> list[Phase] | None:
    """A double binary tree between hosts, a chain inside each (Sanders, Speck, Träff, Parallel Computing 35, 2009).

    Up and down the depth of the chain and of the tree. Each of two trees reduces and broadcasts half of the bytes,
    pipelined; a host is inside one tree and a leaf of the other, so its NICs carry at most 2 x the bytes (two
    children, one parent, one parent: four halves), and with two hosts, which are root and leaf in turn, 1 x. The trees
    are those of NCCL's `ncclGetDtree` (src/graph/trees.cc). Not inside one host, and not in halves, as in NCCL.
    """
    if passes == 1 or len(group.hosts) < 2:
        return None
    hosts, rails = group.hosts, group.rails
    share = 0.5 / rails
    hops: dict[Path, float] = {}

    def both(one: str, other: str, part: float) -> None:
        for ends in ((one, other), (other, one)):
            path = cluster.path(*ends)
            hops[path] = hops.get(path, 0.0) + part

    for rail in range(rails):
        for own in hosts:
            for i in range(len(own) - 1):
                both(own[(rail + i) % len(own)], own[(rail + i + 1) % len(own)], 2 * share)
        for child, parent in _tree_edges(len(hosts)):
            both(hosts[child][rail % len(hosts[child])], hosts[parent][rail % len(hosts[parent])], share)
    longest = max(hosts, key=len)
    chain = sum(cluster.transfer_seconds(cluster.path(a, b), 0.0) for a, b in pairwise(longest))
    edge = max(
        cluster.transfer_seconds(cluster.path(hosts[child][0], hosts[parent][0]), 0.0)
        for child, parent in _tree_edges(len(hosts))
    )
    latency = 2 * (chain + math.ceil(math.log2(group.spans)) * edge)
    return [Phase(1, latency, list(hops.items()))]


def _tree_edges(count: int) -> list[tuple[int, int]]:
    """The (child, parent) pairs of both trees over `count` hosts: the second is the first, mirrored or shifted by one.

    >>> _tree_edges(2), _tree_edges(4)[:3]
    ([(1, 0), (0, 1)], [(1, 2), (2, 0), (3, 2)])
    """
    first = []
    for rank in range(1, count):
        bit = rank & -rank
        parent = (rank ^ bit) | (bit << 1)
        first.append((rank, parent if parent < count else rank ^ bit))
    if count % 2:
        return first + [((child + 1) % count, (parent + 1) % count) for child, parent in first]
    return first + [(count - 1 - child, count - 1 - parent) for child, parent in first]


def hierarchical(cluster: Cluster, group: Group, passes: int) -> list[Phase] | None:
    """Reduce-scatter inside hosts, a ring among peers of every host, all-gather inside (Jia et al., arXiv 1807.11205).

    With g devices on each of H hosts: passes x (g - 1) rounds of 1 / g of the bytes inside, and passes x (H - 1) rounds
    of 1 / (g H) between hosts, in g rings at the same time. Only where every device of the group leaves its host
    over links of its own (rails): NCCL joins hosts by rings and trees elsewhere.
    """
    hosts, g = group.hosts, len(group.hosts[0])
    if len(hosts) < 2 or g < 2 or any(len(own) != g for own in hosts):
        return None
    around = list(zip(hosts, (*hosts[1:], hosts[0]), strict=True))
    across = [[cluster.path(here[rail], there[rail]) for rail in range(g)] for here, there in around]
    if any(len(set().union(*paths)) < sum(map(len, paths)) for paths in across):
        return None
    inside = [path for own in hosts for path, _ in _ring_hops(cluster, (own,), 1)]
    between = [path for paths in across for path in paths]
    rounds, peers = passes * (g - 1), passes * (group.spans - 1)
    return [
        Phase(rounds, rounds * _mean(cluster, inside), [(path, 1 / g) for path in inside]),
        Phase(peers, peers * _mean(cluster, between), [(path, 1 / (g * group.spans)) for path in between]),
    ]


def _mean(cluster: Cluster, paths: Iterable[Path]) -> float:
    waits = [cluster.transfer_seconds(path, 0.0) for path in paths]
    return sum(waits) / len(waits)


PATTERNS: dict[str, Pattern] = {"ring": ring, "tree": tree, "hierarchical": hierarchical}
"""What a collective can be; the quickest is taken, as NCCL's tuner does."""
