"""A trace: what every device did when, simulated or measured. Nobody who reads one can tell which."""

from __future__ import annotations

import bisect
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

import msgspec

from planner.orders.action import Action, parse
from planner.orders.operations import SYNCHRONISING

if TYPE_CHECKING:
    import pandas as pd

COMPUTE, LINK = "compute", "link"
LANES = (COMPUTE, LINK)
KINDS = (
    *("parameters", "versions", "buffers", "gradients", "optimizer", "activations", "communication", "input"),
    "transient",
)
"""Kinds of bytes, in the order of a memory point."""


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One action on one lane of a device, in seconds since the step began.

    From `start` to `ready` it waited for a message (or, in a reduction, for the other replicas); from `ready` to
    `end` it worked. On the link lane `action` is the receive that the transfer completes, and `bytes` its size.
    """

    device: int
    lane: str
    action: str
    start: float
    ready: float
    end: float
    bytes: float = 0.0

    @property
    def op(self) -> str:
        """The operation, without stage and micro-batch."""
        return parse(self.action).op

    @property
    def work(self) -> float:
        """Seconds that the action worked rather than waited."""
        return self.end - self.ready


class MemoryPoint(msgspec.Struct, frozen=True, array_like=True):
    """Bytes live on a device from `time` on, by kind (one entry per kind of `KINDS`)."""

    device: int
    time: float
    bytes: tuple[float, ...]

    @property
    def total(self) -> float:
        """All kinds together."""
        return sum(self.bytes)


class Trace(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The events of one step on all devices, in the order of their start per device, and the memory curve.

    `end` is when the step was over: its makespan, since it began at 0.
    """

    devices: tuple[str, ...]
    events: tuple[Event, ...]
    memory: tuple[MemoryPoint, ...] = ()

    @cached_property
    def end(self) -> float:
        """The step's makespan in seconds."""
        return max((event.end for event in self.events if event.lane == COMPUTE), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds that each device worked."""
        busy = [0.0] * len(self.devices)
        for event in self.events:
            if event.lane == COMPUTE:
                busy[event.device] += event.work
        return tuple(busy)

    @cached_property
    def synchronising(self) -> tuple[float, ...]:
        """Seconds in which each device agreed with others instead of computing: `agreeing` over the whole step."""
        return self.agreeing(0.0, float("inf"))

    def agreeing(self, since: float, until: float) -> tuple[float, ...]:
        """Return the seconds between two moments in which each device agreed with others: what of that nothing hides.

        It reduces, pulls or pushes (from when the last device has come to that), or waits for what goes on beside its
        computing, a gather or a reduction: for what ends when one on its link ends, as long as any is there.
        """
        beside: dict[int, list[tuple[float, float]]] = defaultdict(list)
        come: dict[str, float] = {}
        for event in self.events:
            if event.op in SYNCHRONISING and event.lane == LINK:
                beside[event.device].append((event.start, event.end))
            elif event.op in SYNCHRONISING:
                come[event.action] = max(come.get(event.action, 0.0), event.start)
        near = 1e-9 * self.end
        together = {device: _together(every, near) for device, every in beside.items()}
        spent = [0.0] * len(self.devices)
        for event in self.events:
            if event.lane != COMPUTE:
                continue
            if event.op in SYNCHRONISING:
                begin = min(event.ready, max(event.start, come[event.action]))
                spent[event.device] += max(0.0, min(event.end, until) - max(begin, since))
            elif event.ready > event.start and event.device in together:
                ends, begins = together[event.device]
                at = bisect.bisect_left(ends, event.ready - near)
                if at < len(ends) and ends[at] <= event.ready + near:
                    begin = max(event.start, begins[at])
                    spent[event.device] += max(0.0, min(event.ready, until) - max(begin, since))
        return tuple(spent)

    @cached_property
    def computing(self) -> tuple[float, ...]:
        """Seconds that each device worked on its own: `busy` without what it does to agree with others."""
        own = [0.0] * len(self.devices)
        for event in self.events:
            if event.lane == COMPUTE and event.op not in SYNCHRONISING:
                own[event.device] += event.work
        return tuple(own)

    @cached_property
    def span(self) -> tuple[float, ...]:
        """Seconds from each device's first work to its last."""
        first = [float("inf")] * len(self.devices)
        last = [0.0] * len(self.devices)
        for event in self.events:
            if event.lane == COMPUTE and event.work > 0:
                first[event.device] = min(first[event.device], event.ready)
                last[event.device] = max(last[event.device], event.end)
        return tuple(max(0.0, b - a) if a < b else 0.0 for a, b in zip(first, last, strict=True))

    @property
    def makespan_bubble(self) -> float:
        """Share of the devices' time that is neither computing nor synchronising, from the step's begin to its end."""
        used = sum(self.computing) + sum(self.synchronising)
        return 1.0 - used / (len(self.devices) * self.end) if self.end else 0.0

    @property
    def span_bubble_s(self) -> float:
        """Longest idle time inside a device's own span, in seconds (the zero-bubble papers' convention)."""
        return max((s - b for s, b in zip(self.span, self.busy, strict=True)), default=0.0)

    @cached_property
    def work(self) -> tuple[dict[Action, float], ...]:
        """Seconds that each device worked on each action."""
        table: tuple[dict[Action, float], ...] = tuple({} for _ in self.devices)
        for event in self.events:
            if event.lane == COMPUTE:
                table[event.device][parse(event.action)] = event.work
        return table

    @cached_property
    def peak(self) -> tuple[MemoryPoint, ...]:
        """Each device's memory point with the most bytes; empty without a memory curve."""
        points: dict[int, MemoryPoint] = {}
        for point in self.memory:
            if point.device not in points or point.total > points[point.device].total:
                points[point.device] = point
        return tuple(points[d] for d in sorted(points))

    def frame(self) -> pd.DataFrame:
        """Return the events as a pandas frame, one row per event."""
        import pandas as pd

        columns = Event.__struct_fields__
        return pd.DataFrame([msgspec.structs.astuple(event) for event in self.events], columns=list(columns))


def _together(spans: list[tuple[float, float]], near: float) -> tuple[list[float], list[float]]:
    """Return the ends of spans in ascending order, and since when there has been one of them without a gap."""
    ends: list[float] = []
    begins: list[float] = []
    for begin, end in sorted(spans, key=lambda span: span[1]):
        since = begin
        at = len(ends) - 1
        while at >= 0 and ends[at] >= begin - near:
            since = min(since, begins[at])
            at -= 1
        ends.append(end)
        begins.append(since)
    return ends, begins
