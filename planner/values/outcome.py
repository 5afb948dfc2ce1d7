"""An outcome: one plan with what it did, predicted or measured, and the figures people compare.

Prediction and measurement are two uses of one type; every figure is a pure function of the traces.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import msgspec

from planner.orders.action import parse
from planner.orders.operations import OPERATIONS
from planner.values.evaluation import Evaluation
from planner.values.plan import Plan, full, windows
from planner.values.trace import COMPUTE, KINDS, Event, MemoryPoint, Trace

ROUNDING = 1e-9
"""Shares of time are sums of floats: below 0 by less than this they are 0."""
Source = Literal["simulated", "measured", "rehearsed"]


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of a device or a host: the most bytes that a plan needs of it at once, and how many it has."""

    name: str
    need_bytes: float
    has_bytes: float

    @property
    def lack(self) -> float:
        """Need over capacity: above 1 it does not fit."""
        return self.need_bytes / self.has_bytes


def rooms(need: Mapping[str, float], has: Mapping[str, float]) -> tuple[Room, ...]:
    """Return the hosts whose memory a plan uses."""
    return tuple(Room(name=name, need_bytes=n, has_bytes=has[name]) for name, n in need.items() if n > 0)


class Outcome(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A plan and its steps.

    `interval_s` bounds the step time: from the profile's spread when simulated, the 10th to 90th percentile of the
    steps when measured. `capacity_bytes` is each device's memory, `hosts` what the plan keeps in its
    hosts'. `profiled_s` has a prediction's median seconds per
    stage and operation, before jitter and contention. `samples_s` are the simulated steps in ascending order.
    `idle` and `synchronised` are the bubble and the share of synchronising where the trace does not hold the step.
    `estimated` says that no layer was measured.

    Of a measured run `steps` are those that were recorded, `step_times_s` have those behind them, too, and `losses` and
    `rates` are the mean loss and the learning rate of every step from the first on: the warm-up trains as all others.
    `norms` are the gradients' before they were clipped, where they are; None where they overflow in float16.
    It took `training_s`, and was to have `asked_steps`; `evaluations` were made in between, and are in no time. Of a
    prediction for such a run `evaluation_rate` is with how many samples per second the plan's stages evaluate.
    """

    plan: Plan
    source: Source
    steps: tuple[Trace, ...]
    interval_s: tuple[float, float]
    capacity_bytes: tuple[float, ...]
    hosts: tuple[Room, ...] = ()
    profiled_s: dict[str, float] = {}
    memory_step: Trace | None = None
    step_times_s: tuple[float, ...] = ()
    samples_s: tuple[float, ...] = ()
    idle: float | None = None
    synchronised: float | None = None
    estimated: bool = False
    losses: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    norms: tuple[float | None, ...] = ()
    training_s: float = 0.0
    asked_steps: int = 0
    evaluations: tuple[Evaluation, ...] = ()
    evaluation_rate: float = 0.0

    @property
    def performed(self) -> int:
        """How many steps of a run there were, with the warm-up where it was trained."""
        return len(self.losses) or len(self.step_times_s)

    @property
    def stopped(self) -> bool:
        """Whether a measured run has ended before it was to."""
        return len(self.losses) < self.asked_steps

    @cached_property
    def trace(self) -> Trace:
        """The step whose time is the median: the one to draw."""
        return sorted(self.steps, key=lambda trace: trace.end)[(len(self.steps) - 1) // 2]

    @cached_property
    def step_s(self) -> float:
        """Seconds per step: the median over the steps."""
        return statistics.median(self.step_times_s or [trace.end for trace in self.steps])

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return self.plan.batch / self.step_s

    @property
    def throughput_interval(self) -> tuple[float, float]:
        """Samples per second at the two ends of the interval, low first."""
        low, high = self.interval_s
        return self.plan.batch / high, self.plan.batch / low

    @cached_property
    def bubble(self) -> float:
        """Idle share of the devices' time: the median over the steps; of a plan without flush that of its steady state.

        There, what a device works per step is what it worked in all the steps of the trace, over their number.
        """
        if self.idle is not None:
            return _whole(self.idle)
        if self.source == "simulated" and self.step_times_s:
            return max(0.0, 1.0 - self._steady(self.trace.computing) - self.synchronising)
        return _whole(statistics.median(trace.makespan_bubble for trace in self.steps))

    @cached_property
    def synchronising(self) -> float:
        """Share of the devices' time that goes into agreeing with others instead of computing; no part of the bubble.

        Reductions, gathers, pulls and pushes that nothing hides, the median over the steps.
        """
        if self.synchronised is not None:
            return self.synchronised
        if self.source == "simulated" and self.step_times_s:
            begin, end = self._full
            spent = self.trace.agreeing(begin, end)
            return sum(spent) / (len(spent) * (end - begin)) if end > begin else 0.0
        return statistics.median(
            sum(trace.synchronising) / (len(trace.devices) * trace.end) if trace.end else 0.0 for trace in self.steps
        )

    def _steady(self, spent: tuple[float, ...]) -> float:
        """Share of the devices' time in the steady state, of seconds that were spent in all unrolled steps."""
        return sum(spent) / windows(self.plan) / (len(spent) * self.step_s)

    @property
    def _full(self) -> tuple[float, float]:
        """When the steps are over between which the pipeline of a plan without flush is full; else the whole step."""
        plan, count, steady = self.plan, windows(self.plan), full(self.plan)
        if count == 1:
            return 0.0, self.trace.end
        share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
        over = [0.0] * count
        for event in self.trace.events:
            if event.lane == COMPUTE:
                action = parse(event.action)
                if OPERATIONS[action.op].gradients == "adds":
                    window = (action.microbatch or 0) % (share * count) // share
                    over[window] = max(over[window], event.end)
        return over[steady.start - 1], over[steady.stop - 1]

    @property
    def peak(self) -> tuple[MemoryPoint, ...]:
        """Each device's memory at its own peak, by kind."""
        return self.memory_trace.peak

    @cached_property
    def peak_actions(self) -> tuple[str, ...]:
        """The action at each device's peak: inside which, or at whose end, it is reached; empty where none is known."""
        running: dict[int, list[Event]] = defaultdict(list)
        for event in self.memory_trace.events:
            if event.lane == COMPUTE:
                running[event.device].append(event)
        found = []
        for point in self.peak:
            inside = [e for e in running[point.device] if e.ready <= point.time <= e.end]
            longest = max(inside, key=lambda e: e.end - e.ready, default=None)
            found.append(longest.action if longest else "")
        return tuple(found)

    @property
    def memory_trace(self) -> Trace:
        """The step that carries the memory curve: a measured run records it in a step of its own."""
        return self.memory_step or self.trace

    @property
    def peak_bytes(self) -> float:
        """Peak memory of the device that needs most, in bytes; 0 when it was not recorded."""
        return max((point.total for point in self.peak), default=0.0)

    @cached_property
    def fits(self) -> bool:
        """Whether every device's peak is within its memory, and what hosts keep within theirs."""
        return all(p.total <= c for p, c in zip(self.peak, self.capacity_bytes, strict=False)) and all(
            host.lack <= 1 for host in self.hosts
        )

    @cached_property
    def tightest(self) -> Room:
        """The device or the host whose memory is fullest."""
        devices = zip(self.trace.devices, self.peak, self.capacity_bytes, strict=False)
        own = (Room(name=name, need_bytes=point.total, has_bytes=has) for name, point, has in devices)
        return max((*own, *self.hosts), key=lambda room: room.lack)


def _whole(share: float) -> float:
    """A share that is 0 where only rounding made it negative."""
    return 0.0 if -ROUNDING < share < 0 else share


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """A relative difference: (predicted - measured) / measured."""

    name: str
    predicted: float
    measured: float

    @property
    def relative(self) -> float:
        """Signed, 0.1 = 10 % too much predicted."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Why two outcomes differ, split by cause (DESIGN.md section 8).

    `total` compares step times; `replay` the simulated replay of the measured durations with the measured step;
    `costs` the seconds per operation and stage; `memory` the peaks per device; `inside` is the share of measured
    steps within the predicted interval; `noise` half the spread of the measured steps over their median.
    """

    total: Error
    replay: Error | None
    costs: tuple[Error, ...]
    memory: tuple[Error, ...]
    memory_kinds: tuple[tuple[Error, ...], ...]
    inside: float
    noise: float


def compare(predicted: Outcome, measured: Outcome, *, replays: tuple[float, ...] = ()) -> Comparison:
    """Compare two outcomes of one plan. `replays` are the seconds of its measured steps put through the simulator."""
    times = measured.step_times_s or tuple(t.end for t in measured.steps)
    low, high = predicted.interval_s
    replay = None
    if replays:
        pairs = [(r, m.end) for r, m in zip(replays, measured.steps, strict=True)]
        replayed, real = sorted(pairs, key=lambda p: (p[0] - p[1]) / p[1])[len(pairs) // 2]
        replay = Error(name="step", predicted=replayed, measured=real)
    mine, theirs = _work(predicted), _work(measured)
    costs = tuple(
        Error(name=name, predicted=mine[name], measured=theirs[name]) for name in sorted(mine.keys() & theirs.keys())
    )
    names = measured.memory_trace.devices
    pairs_of_peaks = list(zip(predicted.peak, measured.peak, strict=False))
    return Comparison(
        total=Error(name="step", predicted=predicted.step_s, measured=measured.step_s),
        replay=replay,
        costs=costs,
        memory=tuple(Error(name=names[m.device], predicted=p.total, measured=m.total) for p, m in pairs_of_peaks),
        memory_kinds=tuple(
            tuple(Error(name=k, predicted=p.bytes[i], measured=m.bytes[i]) for i, k in enumerate(KINDS))
            for p, m in pairs_of_peaks
        ),
        inside=sum(low <= t <= high for t in times) / len(times),
        noise=(measured.interval_s[1] - measured.interval_s[0]) / 2 / measured.step_s,
    )


def _work(outcome: Outcome) -> dict[str, float]:
    """Seconds of each operation per stage: as profiled, or the median over the trace's micro-batches and steps."""
    if outcome.profiled_s:
        return outcome.profiled_s
    table: dict[str, list[float]] = defaultdict(list)
    for trace in outcome.steps:
        for action, seconds in (item for device in trace.work for item in device.items()):
            table[f"{action.stage}{action.op}"].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in table.items()}
