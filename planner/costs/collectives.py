"""What collectives take on a cluster's links: rings, trees, and what of them hides behind a backward or a forward."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.basis.memo import memoised
from planner.costs.flows import Flow
from planner.values.cluster import Cluster
from planner.values.routes import Path


def all_reduce(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of an all-reduce of `size` bytes: as measured, or the quicker of a ring and a tree, as NCCL chooses."""
    if len(devices) < 2:
        return 0.0
    if cluster.all_reduce:
        return cluster.all_reduce_seconds(devices, size)
    return min(ring(cluster, devices, size), tree(cluster, devices, size))


def ring(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of a ring all-reduce: 2 (n - 1) rounds of size / n (Patarasu and Yuan, JPDC 2009)."""
    n = len(devices)
    return 2 * (n - 1) * max(cluster.transfer_seconds(path, size / n) for path in _hops(cluster, devices))


def tree(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of a double binary tree all-reduce (Sanders, Speck, Träff, Parallel Computing 2009).

    Up and down 2 ceil(log2 n) latencies; each of two trees moves half of the bytes, pipelined, so every link carries
    2 x size bytes less one n-th.
    """
    n = len(devices)
    paths = _hops(cluster, devices)
    latency = max(cluster.transfer_seconds(path, 0.0) for path in paths)
    bulk = max(cluster.transfer_seconds(path, size) for path in paths) - latency
    return 2 * math.ceil(math.log2(n)) * latency + 2 * bulk


def half(cluster: Cluster, devices: tuple[str, ...], size: float) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes: one half of a ring all-reduce, n - 1 rounds."""
    if len(devices) < 2:
        return 0.0
    whole = cluster.all_reduce_seconds(devices, size) if cluster.all_reduce else ring(cluster, devices, size)
    return whole / 2


def ring_flows(cluster: Cluster, devices: tuple[str, ...], size: float, halves: int) -> tuple[Flow, ...]:
    """Return what each hop of a ring carries: (n - 1) / n of `size` in each half, of which an all-reduce has two."""
    if len(devices) < 2:
        return ()
    carried = halves * (len(devices) - 1) / len(devices) * size
    return tuple(Flow(path, carried) for path in ring_paths(cluster, devices))


def ring_paths(cluster: Cluster, devices: tuple[str, ...]) -> list[Path]:
    """Return the links from each device to the next around the ring, kept with the cluster."""
    pairs = zip(devices, (*devices[1:], devices[0]), strict=True)
    return memoised(cluster, ("ring", devices), lambda: [cluster.path(a, b) for a, b in pairs])


def _hops(cluster: Cluster, devices: tuple[str, ...]) -> list[Path]:
    """Return one of each sort of hop around the ring: hops over links with the same figures take equally long."""

    def make() -> list[Path]:
        figures = [(link.latency_s, link.bandwidth_bytes_per_s, link.points) for link in cluster.links]
        sorts = {tuple(figures[number // 2] for number in path): path for path in ring_paths(cluster, devices)}
        return list(sorts.values())

    return memoised(cluster, ("hops", devices), make)


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
    """Return how long before its first use a chain of gathers must begin so that no layer waits.

    Layer i is reached `needed[i]` after the compute's begin, and has its parameters after the first i + 1 gathers.

    >>> lead([0.0, 1.0], [0.5, 0.5]), lead([0.0, 1.0], [0.5, 2.0])
    (0.5, 1.5)
    """
    gathered = most = 0.0
    for used, own in zip(needed, seconds, strict=True):
        gathered += own
        most = max(most, gathered - used)
    return most
