"""Seconds and memory of every run of layers as a stage, in tables that `planner.placement.partition` cuts by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from planner.basis.memo import memoised
from planner.costs.stage_costs import MEDIAN, layer_table
from planner.orders import codes, schedules
from planner.orders.codes import Order
from planner.placement import partition
from planner.placement.question import Question
from planner.programs.lowering import compute_order
from planner.values.cluster import Device
from planner.values.plan import Plan
from planner.values.profile import LayerProfile, Profile, interpolate, value_bytes

if TYPE_CHECKING:
    from planner.placement.partition import Table


class StageTables:
    """Seconds and share of memory of every run of layers as a stage of `plan`, for `planner.placement.partition`.

    A stage takes a micro-batch's forward and backward and the posting of its messages, and at least as long as the
    slower of its two links needs for one message. Its memory is that of static bytes and of as many micro-batches as
    the schedule keeps at once, with the largest transient peak of any layer on top: an upper bound for choosing cuts;
    `planner.costs.memory` has the last word on the finished plan.
    """

    def __init__(self, q: Question, plan: Plan) -> None:
        self.q, self.plan = q, plan
        self.held = in_flight(plan)
        self.names = {device.name: device for device in q.devices}
        self.device = [self.weakest(stage.devices) for stage in plan.stages]
        self.cluster = q.cluster.only(plan.device_names)
        self.tables: dict[tuple[object, ...], Table] = {}

    def weakest(self, names: Sequence[str]) -> Device:
        """Return the first of a stage's devices, as slow and as small as any of them: replicas wait for each other."""
        own = [self.names[name] for name in names]
        speed, memory = min(device.speed for device in own), min(device.memory_bytes for device in own)
        if speed == own[0].speed and memory == own[0].memory_bytes:
            return own[0]
        return msgspec.structs.replace(own[0], speed=speed, memory_bytes=memory)

    def seconds(self, stage: int) -> Table:
        """Seconds per micro-batch on the stage's device."""
        device = self.device[stage]
        other = self.plan.stages[stage - 1 if stage else 1 % len(self.plan.stages)].devices[0]
        path = self.cluster.path(device.name, other) if other != device.name else ()
        figures = tuple((link.latency_s, link.bandwidth_bytes_per_s) for link in map(self.cluster.link_of, path))
        return self._once(("seconds", device.speed, device.threads, figures), lambda: self._seconds(device, path))

    def computing(self, stage: int) -> Table:
        """Seconds per micro-batch without waiting for links: what is evened out where links are the bottleneck."""
        return self.computing_on(self.device[stage])

    def computing_on(self, device: Device) -> Table:
        """Seconds per micro-batch on a device."""
        found: Table = run_seconds(self.q.profile, self.q.samples, device.threads) / device.speed
        return found

    def _seconds(self, device: Device, path: tuple[int, ...]) -> Table:
        import numpy as np

        q, computing = self.q, self.computing_on(device)
        if not path:
            return computing
        sizes = crossing(q.profile, q.samples)
        posts, wires = [0.0] * len(sizes), [0.0] * len(sizes)
        for i, (forward, backward) in list(enumerate(sizes))[1:-1]:
            posts[i] = self.cluster.post_seconds(forward) + self.cluster.post_seconds(backward)
            wires[i] = max(self.cluster.transfer_seconds(path, size) for size in (forward, backward))
        posting = partition.spans([0.0] * len(q.profile.layers), posts, posts)
        found: Table = np.maximum(computing + posting, np.maximum.outer(np.array(wires), np.array(wires)))
        return found

    def filled(self, stage: int) -> Table:
        """Share of the stage's device that its layers would fill."""
        return self.filled_on(stage, self.device[stage])

    def filled_on(self, stage: int, device: Device) -> Table:
        """Share of a device that a stage's layers would fill."""
        share = device.memory_bytes / self.plan.chunks
        return self._once(("filled", self.held[stage], share), lambda: self._filled(self.held[stage], share))

    def _filled(self, held: int, share: float) -> Table:
        q, whole = self.q, self.plan.recompute
        sizes = layer_bytes(q.profile, q.samples)
        keeps = 0 if whole else held
        weights = [own.static + keeps * own.saved for own in sizes]
        cuts = [held * forward for forward, _ in crossing(q.profile, q.samples)]
        peak = max(own.peak for own in sizes) + (max(own.saved for own in sizes) if whole else 0.0)
        found: Table = (partition.spans(weights, cuts, cuts) + peak) / share
        return found

    def _once(self, key: tuple[object, ...], make: Callable[[], Table]) -> Table:
        """Return the table of all stages that are alike."""
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]


class LayerBytes(NamedTuple):
    """A layer's bytes: always there, kept per micro-batch (of which its output), and at most in passing."""

    static: float
    saved: float
    output: float
    peak: float


def layer_bytes(profile: Profile, samples: int) -> list[LayerBytes]:
    """Return every layer's bytes at a micro-batch size, kept with the profile."""

    def make() -> list[LayerBytes]:
        found = []
        for layer in profile.layers:

            def at(field: str, layer: LayerProfile = layer) -> float:
                return interpolate([(float(s.samples), float(getattr(s, field))) for s in layer.sizes], samples)

            static = layer.parameter_bytes + layer.buffer_bytes + layer.gradient_bytes + layer.optimizer_bytes
            output = at("output_bytes") if layer.output_saved else 0.0
            saved = at("saved_bytes") + output
            peak = max(at("forward_peak_bytes"), at("backward_peak_bytes"), at("backward_first_peak_bytes"))
            found.append(LayerBytes(float(static), saved, output, peak))
        return found

    return memoised(profile, ("bytes", samples), make)


def run_seconds(profile: Profile, samples: int, threads: int) -> Table:
    """Return the seconds of a micro-batch's forward and backward for every run of layers, kept with the profile."""

    def make() -> Table:
        table = layer_table(profile, samples, threads)
        both = (table.forward[MEDIAN] + table.backward[MEDIAN]).tolist()
        weights = [b - a for a, b in pairwise(both)]
        *weights, loss = weights
        weights[-1] += loss  # the loss is the last layer's
        return partition.spans(weights)

    return memoised(profile, ("runs", samples, threads), make)


def crossing(profile: Profile, samples: int) -> list[tuple[float, float]]:
    """Bytes that cross every cut position per micro-batch, forward and backward; nothing crosses the two ends."""

    def make() -> list[tuple[float, float]]:
        ends = [[0.0, 0.0] for _ in range(len(profile.layers) + 1)]
        for value in profile.values:
            size = value_bytes(value, samples)
            for cut in range(max(1, value.source + 1), max(value.targets, default=0) + 1):
                ends[cut][0] += size
                ends[cut][1] += size if value.gradient else 0.0
        return [(forward, backward) for forward, backward in ends]

    return memoised(profile, ("crossing", samples), make)


def in_flight(plan: Plan) -> tuple[int, ...]:
    """Most micro-batches that each stage of a plan holds at once, from the schedule's own order."""
    if plan.uneven:
        return _in_flight(compute_order(plan), len(plan.stages))
    shape = schedules.Shape(plan.depth, plan.microbatches // plan.replicas, plan.chunks)
    return _held(plan.schedule, shape)


@functools.lru_cache(maxsize=4096)
def _held(schedule: str, shape: schedules.Shape) -> tuple[int, ...]:
    # An order by measured seconds keeps the same limits whatever the seconds are.
    return _in_flight(schedules.arrange(schedule, shape), shape.stages)


def _in_flight(order: Order, stages: int) -> tuple[int, ...]:
    import numpy as np

    held = [1] * stages
    for row in order:
        for stage in np.unique(codes.stages(row)).tolist():
            own = row[codes.stages(row) == stage]
            change = codes.has(own, "F").astype(int) - codes.has(own, "B", "W")
            held[stage] = max(held[stage], int(np.cumsum(change).max()))
    return tuple(held)
