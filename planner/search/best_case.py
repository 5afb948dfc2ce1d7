"""What the devices that a plan takes can do at most: their speed, memory and copies, and the links of their hosts."""

from __future__ import annotations

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.placement.devices import choose
from planner.values.cluster import Cluster
from planner.values.profile import Profile


def fastest(cluster: Cluster, count: int) -> tuple[float, int]:
    """Speed and threads of the fastest of the `count` devices that a plan takes, kept with the cluster."""

    def make() -> tuple[float, int]:
        devices = choose(cluster, count)
        return max(d.speed for d in devices), max(d.threads for d in devices)

    return memoised(cluster, ("fastest", count), make)


def roomiest(cluster: Cluster, count: int) -> float:
    """Bytes of the largest of the devices that a plan takes, kept with the cluster."""
    return memoised(
        cluster, ("roomiest", count), lambda: float(max(device.memory_bytes for device in choose(cluster, count)))
    )


def copying(cluster: Cluster, count: int) -> float:
    """Most bytes/s that one of the devices that a plan takes copies to its host's memory, or back."""

    def make() -> float:
        rates = {host.name: host.memory_bytes_per_s for host in cluster.hosts}
        found = set()
        for device in choose(cluster, count):
            try:
                links = [cluster.link_of(number) for number in cluster.routes.to_host(device.name)]
            except PlanError:  # its plan will say so
                return float("inf")
            own = [link.bandwidth_bytes_per_s for link in links if not link.points]
            found.add(min([*own, rates[cluster.routes.host_of[device.name]]]))
        return max(found)

    return memoised(cluster, ("copying", count), make)


def hosts_memory(cluster: Cluster, count: int) -> float:
    """Bytes/s of the memories of all hosts of the devices that a plan takes."""

    def make() -> float:
        taken = {device.host for device in choose(cluster, count)}
        return float(sum(host.memory_bytes_per_s for host in cluster.hosts if host.name in taken))

    return memoised(cluster, ("hosts' memory", count), make)


def outward(cluster: Cluster) -> dict[str, float]:
    """Bytes/s that can leave each host: over all its links to nodes outside, infinite where one is not shared."""

    def make() -> dict[str, float]:
        home = {**cluster.routes.host_of, **{host.name: host.name for host in cluster.hosts}}
        return _outward(cluster, home)

    return memoised(cluster, "outward", make)


def from_devices(cluster: Cluster) -> dict[str, float]:
    """Bytes/s that can leave each device: over all its links, infinite where one is not shared."""
    return memoised(cluster, "from devices", lambda: _outward(cluster, {name: name for name in cluster.routes.host_of}))


def _outward(cluster: Cluster, home: dict[str, str]) -> dict[str, float]:
    found = dict.fromkeys(dict.fromkeys(home.values()), 0.0)
    for link in cluster.links:
        ends = [home.get(end, "") for end in link.between]
        if ends[0] != ends[1]:
            for end in filter(None, ends):
                found[end] += link.bandwidth_bytes_per_s if link.shared and not link.points else float("inf")
    return found


def seams_of(profile: Profile) -> float:
    """Most seconds that a forward, its repetition and a backward of all layers can be quicker than these measured.

    Each may be slower whole, too. That is not to be counted on: a stage of one layer is as slow as its layer.
    """
    gains = ((w.layers_forward_s - w.forward_s, w.layers_backward_s - w.backward_s) for w in profile.whole)
    return max((2 * max(0.0, forward) + max(0.0, backward) for forward, backward in gains), default=0.0)
