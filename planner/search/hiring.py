"""Which devices a plan hires where hosts cost differently: the fastest, or those of the hosts that cost least.

A person who asks about money may want slower devices. Trying every mix of hosts would make the space as large as their
number is to the power of two, so it has an axis of few orders in which hosts are hired until there are K devices.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.basis.memo import memoised
from planner.placement.devices import choose
from planner.search.cost import least_price_per_hour, price_per_hour, priced
from planner.values.cluster import Cluster, Device

FASTEST = ""
"""The fastest devices there are, whatever they cost."""
HIRES = (FASTEST, "cheapest", "thriftiest")
"""The fastest; those of hosts with the least price per device that is used; those with the least price per work."""


def hires(cluster: Cluster, count: int) -> tuple[str, ...]:
    """Return the hires of `count` devices that differ, the fastest first: one that costs no less is none."""

    def make() -> tuple[str, ...]:
        if not priced(cluster) or cluster.elastic or count >= len(cluster.devices):
            return (FASTEST,)
        seen = {device.name for device in choose(cluster, count)}
        most, known, found = price_per_hour(cluster, tuple(seen)), [seen], [FASTEST]
        if most <= least_price_per_hour(cluster, count):
            return (FASTEST,)
        for hire in HIRES[1:]:
            names = set(_hired(cluster, count, hire))
            if names not in known and price_per_hour(cluster, tuple(names)) < most:
                known.append(names)
                found.append(hire)
        return tuple(found)

    return memoised(cluster, ("hires", count), make)


def words(cluster: Cluster, counts: Sequence[int], tried: Sequence[str]) -> str:
    """Say which devices were tried, where others of these numbers cost less; "" where none does."""
    if all(len(hires(cluster, count)) == 1 for count in counts):
        return ""
    front = f"the front of time against cost also has those of the {' and the '.join(HIRES[1:])} hosts"
    if set(tried) <= {FASTEST}:
        return f"hosts' prices differ: of each number of devices only the fastest were tried; {front}"
    every = " and the ".join(map(named, tried))
    return f"hosts' prices differ: of each number of devices the {every} were tried, no other mix of hosts"


def named(hire: str) -> str:
    """Name a hire for people."""
    return hire or "fastest"


def offered(cluster: Cluster, count: int, hire: str) -> Cluster:
    """Return the cluster from which a plan takes `count` devices: of a hire that is not the fastest only its own."""
    if hire == FASTEST:
        return cluster
    return memoised(cluster, ("offered", count, hire), lambda: cluster.only(_hired(cluster, count, hire)))


def rents(cluster: Cluster, count: int, hire: str) -> float:
    """Return what the `count` devices of a hire cost per hour."""
    own = choose(offered(cluster, count, hire), count)
    return price_per_hour(cluster, tuple(device.name for device in own))


def _hired(cluster: Cluster, count: int, hire: str) -> tuple[str, ...]:
    """The fastest `count` devices of the hosts that are hired: always the one that gives most for its price.

    A host gives as many devices as are still missing, or as it has, its fastest first. In the end the dearest that can
    be done without goes.
    """
    homes: dict[str, list[Device]] = {}
    for device in sorted(cluster.devices, key=lambda device: -device.speed):
        homes.setdefault(device.host, []).append(device)
    price = {host: price_per_hour(cluster, (own[0].name,)) for host, own in homes.items()}
    taken: list[str] = []
    left = count
    while left > 0:
        given = {host: _given(own[:left], hire) for host, own in homes.items() if host not in taken}
        taken.append(min(given, key=lambda host: (price[host] / given[host], price[host], -given[host])))
        left -= len(homes[taken[-1]])
    for host in sorted(taken, key=lambda host: -price[host]):
        if len(homes[host]) <= -left:
            taken.remove(host)
            left += len(homes[host])
    own = cluster.only([device.name for host in taken for device in homes[host]])
    return tuple(device.name for device in choose(own, count))


def _given(own: Sequence[Device], hire: str) -> float:
    """What these devices are hired for: how many they are, or what they compute."""
    return float(len(own)) if hire == "cheapest" else sum(device.speed for device in own)
