"""Devices as their data sheets describe them, and the seconds of one operation on them: a roofline with efficiencies.

The table is `data/hardware.toml`. It knows no model and needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Literal

import msgspec

from planner.basis.errors import unknown
from planner.values.cluster import Cluster, Device, Host, Link

Kind = Literal["matmul", "convolution", "attention", "memory", "random"]
"""What bounds an operation: units that multiply, the memory, or the drawing of random numbers (dropout)."""

LAUNCH_S = 4e-6
"""Seconds per kernel, whatever its size: starting it, and the gap before the next. An assumption of this order: the
launch latency of CUDA is a few microseconds."""

LINK_EFFICIENCY = 0.7
"""Share of a link's peak that NCCL reaches: all-reduces of 64 MiB and more inside 8 x A100 run at 200 to 230 of 300
GB/s (nccl-tests, measured by vTrain, github.com/VIA-Research/vTrain, trace/a100)."""

LINK_LATENCY_S = 5e-6
"""Seconds of an empty message. An assumption: the same all-reduces of 1 MiB take 6 us per round on eight devices and
20 us on two, most of it not the bytes' time."""

HOST_CORES, HOST_BYTES = 128, 2**40
"""A host of eight data-centre GPUs; nothing is estimated from it but what a plan keeps there."""

DEVICES = 8


class Operation(msgspec.Struct, frozen=True):
    """One kernel: what it computes, in which dtype (torch's name), and its FLOP and the bytes it reads and writes."""

    kind: Kind
    dtype: str
    flop: float
    bytes: float


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A share of a peak by size (FLOP or bytes): `scale` times the line through `points` in the logarithm of size."""

    points: tuple[tuple[float, float], ...]
    source: str
    scale: float = 1.0

    def at(self, size: float) -> float:
        """Return the share at one size.

        >>> curve = Curve(points=((1.0, 0.2), (100.0, 0.6)), scale=0.5, source="")
        >>> curve.at(0.1), round(curve.at(10), 6), curve.at(1e9)
        (0.1, 0.2, 0.3)
        """
        if size <= self.points[0][0]:
            return self.scale * self.points[0][1]
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if size <= x1:
                return self.scale * (y0 + (y1 - y0) * math.log(size / x0) / math.log(x1 / x0))
        return self.scale * self.points[-1][1]


class Efficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What share of its peaks a device reaches, by kind of operation."""

    matmul: Curve
    convolution: Curve
    attention: Curve
    memory: Curve
    random: Curve


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device: peak FLOP/s by dtype ("tf32" for float32 convolutions), peak bytes/s, bytes, and where that stands.

    `link_bytes_per_s` is one direction between two devices of a host.
    """

    title: str
    source: str
    flops: dict[str, float]
    memory_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float

    def peak(self, operation: Operation) -> float:
        """FLOP/s at best: float32 convolutions use tf32, as torch allows by default, float32 matmuls do not."""
        if operation.kind == "convolution" and operation.dtype == "float32":
            return self.flops.get("tf32", self.flops["float32"])
        return self.flops.get(operation.dtype, self.flops["float32"])

    def seconds(self, operation: Operation, efficiency: Efficiency) -> float:
        """Seconds of one operation: the larger of computing and moving bytes, and its launch.

        The roofline of Williams, Waterman and Patterson (CACM 2009), each roof lowered by its efficiency.
        """
        reached = efficiency.random if operation.kind == "random" else efficiency.memory
        moving = operation.bytes / (self.memory_bytes_per_s * reached.at(operation.bytes))
        if not operation.flop:
            return LAUNCH_S + moving
        curve: Curve = getattr(efficiency, operation.kind)
        return LAUNCH_S + max(moving, operation.flop / (self.peak(operation) * curve.at(operation.flop)))

    def total_seconds(self, operations: Iterable[Operation], efficiency: Efficiency | None = None) -> float:
        """Seconds of operations that run one after another."""
        using = efficiency or table().efficiency
        return sum(self.seconds(operation, using) for operation in operations)

    def cluster(self, name: str) -> Cluster:
        """Eight such devices in one host, joined by their own kind of link."""
        host = Host(name="local", cores=HOST_CORES, memory_bytes=HOST_BYTES)
        link = Link(
            between=("local", "local"),
            latency_s=LINK_LATENCY_S,
            bandwidth_bytes_per_s=LINK_EFFICIENCY * self.link_bytes_per_s,
            shared=False,
        )
        devices = tuple(
            Device(name=f"d{i}", memory_bytes=self.memory_bytes, host="local", kind=name) for i in range(DEVICES)
        )
        return Cluster(name=f"{DEVICES} x {name}", hosts=(host,), devices=devices, links=(link,))


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The data file: devices by name, and efficiencies by kind of operation."""

    gpu: dict[str, Hardware]
    efficiency: Efficiency


ALIASES = {"a100": "a100-80", "h100-80": "h100", "v100-32": "v100"}
"""Other names that people use."""


@cache
def table() -> Table:
    """Read the data file."""
    data = (resources.files("profiles") / "data" / "hardware.toml").read_bytes()
    return msgspec.toml.decode(data, type=Table)


def kind_of(described: str) -> str:
    """Return the kind of a device that torch describes so, "" where the table has none.

    >>> kind_of("NVIDIA A100-SXM4-40GB"), kind_of("NVIDIA H100 80GB HBM3"), kind_of("AMD EPYC 9354")
    ('a100-40', 'h100', '')
    """
    words = re.split(r"[^a-z0-9]+", described.lower())
    same = [name for name in table().gpu if name.partition("-")[0] in words or name in words]
    named = [name for name in same if f"{name.partition('-')[2]}gb" in words]
    return next(iter((*named, *same)), "")


def relative_speed(kind: str, of: str, dtype: str) -> float | None:
    """Return how much faster one kind of device is than another, None where the table does not know both.

    The smaller of the ratios of their peaks in this dtype and of their memories' bytes/s: layers are bound by one.

    >>> relative_speed("v100-16", "v100", "float32"), relative_speed("h100", "mine", "float32")
    (1.0, None)
    """
    known = table().gpu
    mine, theirs = (known.get(ALIASES.get(name, name)) for name in (kind, of))
    if mine is None or theirs is None:
        return None
    peaks = [device.flops.get(dtype, device.flops["float32"]) for device in (mine, theirs)]
    return min(peaks[0] / peaks[1], mine.memory_bytes_per_s / theirs.memory_bytes_per_s)


def get(name: str) -> tuple[str, Hardware]:
    """Return a device's own name and its description.

    Raises `PlanError` (exit 2) with the nearest name when there is none.
    """
    known = table().gpu
    own = ALIASES.get(name.lower(), name.lower())
    if own not in known:
        raise unknown("hardware", name, known, where="--estimate", fix="plan profile model.py --estimate h100")
    return own, known[own]
