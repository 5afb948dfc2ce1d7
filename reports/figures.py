"""The figures of an outcome as the page words them: the numbers on the cards, and what idle time is spent on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from planner.basis.units import percent, rate, size
from planner.orders.action import parse
from planner.orders.operations import OPERATIONS
from planner.values.outcome import Error, Outcome
from planner.values.trace import COMPUTE, Event, MemoryPoint, Trace

UNKNOWN = "not known"


class Figures(NamedTuple):
    """An outcome's numbers in SI units; None is not known. The field names are the keys of the page's JSON."""

    throughput_samples_per_s: float | None
    step_s: float | None
    bubble_fraction: float | None
    synchronising_fraction: float | None
    peak_bytes: float | None


def figures(outcome: Outcome) -> Figures:
    """Read the card's numbers off an outcome."""
    timed = outcome.step_s > 0
    return Figures(
        throughput_samples_per_s=_finite(outcome.throughput) if timed else None,
        step_s=_finite(outcome.step_s),
        bubble_fraction=_finite(outcome.bubble),
        synchronising_fraction=_finite(outcome.synchronising),
        peak_bytes=_finite(outcome.peak_bytes) if outcome.peak else None,
    )


def throughput_interval(outcome: Outcome) -> tuple[float, float] | None:
    """Samples per second at the ends of the interval, or None when the interval has no width to speak of."""
    low, high = outcome.interval_s
    if not (0 < low < high < math.inf):
        return None
    return outcome.throughput_interval


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def known(value: float | None, unit: Callable[[float], str]) -> str:
    """Format a number with its unit, or say that it is not known."""
    return UNKNOWN if value is None or not math.isfinite(value) else unit(value)


def signed(fraction: float) -> str:
    """Format a relative difference with its sign.

    >>> signed(0.0312), signed(-0.5), signed(-1e-9)
    ('+3.1 %', '−50.0 %', '0.0 %')
    """
    text = percent(abs(fraction))
    return text if text == percent(0.0) else ("−" if fraction < 0 else "+") + text


def relative(error: Error) -> float | None:
    """Return the signed relative difference, or None when nothing was measured to relate it to."""
    return error.relative if error.measured and math.isfinite(error.relative) else None


class Worst(NamedTuple):
    """The device that needs most memory."""

    device: str
    point: MemoryPoint
    capacity: float | None


def worst(outcome: Outcome) -> Worst | None:
    """Return the device with the highest peak, or None without a memory curve."""
    if not outcome.peak:
        return None
    point = max(outcome.peak, key=lambda p: p.total)
    return Worst(outcome.memory_trace.devices[point.device], point, capacity(outcome, point.device))


def capacity(outcome: Outcome, device: int) -> float | None:
    """Memory of a device in bytes, where it is known."""
    if device >= len(outcome.capacity_bytes) or not 0 < outcome.capacity_bytes[device] < math.inf:
        return None
    return outcome.capacity_bytes[device]


def share(fraction: float) -> str:
    """Format a share, and do not call a small one nothing.

    >>> share(0.2), share(1e-6)
    ('20.0 %', '< 0.1 %')
    """
    return "< 0.1 %" if 0 < fraction < 0.0005 else percent(fraction)


def of_capacity(peak: float, limit: float | None) -> str:
    """Say a peak and how much of the device's memory that is.

    >>> of_capacity(512, 2048), of_capacity(1.5 * 2**30, 2**32)
    ('512 B of 2.00 KiB (25.0 %)', '1.50 of 4.00 GiB (37.5 %)')
    """
    if limit is None:
        return size(peak)
    (number, unit), (_, common) = size(peak).split(), size(limit).split()
    return f"{number if unit == common else size(peak)} of {size(limit)} ({share(peak / limit)})"


class DeviceTime(NamedTuple):
    """What one device does with a step, in seconds; the three add up to the step."""

    name: str
    busy: float
    waiting: float
    idle: float
    by_op: dict[str, float]


def device_times(trace: Trace) -> tuple[DeviceTime, ...]:
    """Split each device's step into work, waits inside actions, and the rest."""
    waiting = [0.0] * len(trace.devices)
    by_op: list[dict[str, float]] = [{} for _ in trace.devices]
    for event in trace.events:
        if event.lane == COMPUTE:
            waiting[event.device] += event.ready - event.start
            table = by_op[event.device]
            table[event.op] = table.get(event.op, 0.0) + event.work
    return tuple(
        DeviceTime(name, busy, wait, max(0.0, trace.end - busy - wait), ops)
        for name, busy, wait, ops in zip(trace.devices, trace.busy, waiting, by_op, strict=True)
    )


def longest_wait(trace: Trace) -> Event | None:
    """Return the action that waited longest, if any waited."""
    waits = [event for event in trace.events if event.lane == COMPUTE and event.ready > event.start]
    return max(waits, key=lambda event: event.ready - event.start, default=None)


def action_name(text: str) -> str:
    """Say an action in words.

    >>> action_name("2F"), action_name("0RECV_B7")
    ('forward of stage 2', 'receiving gradients of stage 0, micro-batch 7')
    """
    action = parse(text)
    name = f"{OPERATIONS[action.op].words} of stage {action.stage}"
    return name if action.microbatch is None else f"{name}, micro-batch {action.microbatch}"


def interval_text(outcome: Outcome) -> str:
    """Say the throughput's interval, or nothing when it has none."""
    interval = throughput_interval(outcome)
    return f"{rate(interval[0]).split()[0]} to {rate(interval[1])}" if interval else ""
