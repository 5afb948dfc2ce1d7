"""The flows of a transfer: which links its bytes pass, for whoever simulates how transfers share hardware."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from planner.values.cluster import Cluster
from planner.values.routes import Path


class Flow(NamedTuple):
    """Bytes that pass one path of directed links while a transfer runs.

    All flows of a transfer run at the same time, in step, and it is done when they are. A ring has one flow per hop,
    with the bytes that the hop carries in all rounds.
    """

    path: Path
    bytes: float


def together(cluster: Cluster, flows: Sequence[Flow]) -> float:
    """Seconds until all of these are over when they start together and nobody else is on their links.

    Each takes at least what a message of its bytes takes, and a shared link at least what all that it carries takes.
    """
    own = (cluster.transfer_seconds(path, size) for path, size in flows)
    return max((*own, carrying(cluster, flows)), default=0.0)


def carrying(cluster: Cluster, flows: Sequence[Flow]) -> float:
    """Seconds that the busiest of the shared links and ports on these paths needs for all bytes that it carries."""
    carried: dict[int, float] = defaultdict(float)
    for path, size in flows:
        for number in path:
            carried[number] += size
    return max((size / cluster.bandwidths[number] for number, size in carried.items()), default=0.0)


def latency(cluster: Cluster, flows: Sequence[Flow], seconds: float) -> float:
    """Seconds of a transfer that are not its bytes': it takes `seconds` alone, less what its slowest link needs.

    Within a host there is no wire: what a message takes there beside its bytes is the host's own work on it.
    """
    links = 2 * len(cluster.links)
    ends = {
        end for path, _ in flows for number in path[:1] if number < links for end in cluster.link_of(number).between
    }
    if len(ends) < 2:
        return 0.0
    own = (size / cluster.link_of(n).bandwidth_bytes_per_s for path, size in flows for n in path if n < links)
    waiting = seconds - max((*own, carrying(cluster, flows)), default=0.0)
    return waiting if waiting > _ROUNDING * seconds else 0.0


_ROUNDING = 1e-12  # of a transfer's seconds
