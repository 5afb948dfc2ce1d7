"""What a cluster is made of: hosts, the devices on them, and the links between nodes, each with its own times."""

from __future__ import annotations

from itertools import pairwise

import msgspec


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """A machine whose CPU devices share cores and memory.

    `slowdown` pairs a number of busy processes with how much slower each becomes than its share of the cores allows:
    shared caches and memory bandwidth, and beyond `cores` busy threads the switching between processes.
    `price_per_hour` is the whole machine's, beside what its devices cost, in any currency.
    `memory_bytes_per_s` is what all of the host's updates and copies to and from its memory read and write together; by
    default two DDR4-3200 channels', as desktops have them: servers say theirs.
    Who waits for a time instead of computing goes on `wake_s` late, and needs a core for that.
    """

    name: str
    cores: int
    memory_bytes: int
    slowdown: tuple[tuple[int, float], ...] = ((1, 1.0),)
    memory_bytes_per_s: float = 51.2e9
    wake_s: float = 0.0
    price_per_hour: float = 0.0

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

    `kind` is what it is, as in `profiles/data/hardware.toml`, "" where nobody says. In a cluster file, `speed_of` names
    the kind that `speed` is relative to; without, it is whatever was profiled.
    `price_per_hour` is in any currency.
    Devices with the same `host` share its cores when `shares_cores` (CPU processes); a GPU does not. One that `waits`
    instead of computing, as in a rehearsal, needs a core for everything else only.
    """

    name: str
    memory_bytes: int
    host: str
    kind: str = ""
    speed: float = 1.0
    speed_of: str = ""
    threads: int = 1
    price_per_hour: float = 0.0
    shares_cores: bool = False
    waits: bool = False


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


class AllReduce(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured all-reduces over so many devices of one host, the first: `points` pairs bytes with seconds."""

    devices: int
    points: tuple[tuple[int, float], ...]


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
