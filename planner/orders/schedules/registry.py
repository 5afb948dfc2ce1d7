"""The registry of schedules: what they are called, where their stages live, what they can be asked for.

A schedule is a function from the shape of a pipeline to the computes of each device, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from planner.basis.errors import PlanError, unknown
from planner.orders.codes import Order

Placement = Literal["straight", "looped", "vee", "both-ways"]
Updates = Literal["step", "microbatch", "window", "never"]
Reads = Literal["own stage", "input stage", "window before"]


class Shape(NamedTuple):
    """What a schedule has to arrange: a pipeline of p devices with v stages (chunks) each, and M micro-batches.

    `replicas` is how many devices share each stage's micro-batches, when they are not the same everywhere.
    `seconds` are forward, backward-input and backward-weight of each stage, for schedules that order by them; empty
    means that all are equal.
    """

    devices: int
    microbatches: int
    chunks: int = 1
    replicas: tuple[int, ...] = ()
    seconds: tuple[tuple[float, float, float], ...] = ()

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.devices * self.chunks


Generate = Callable[[Shape], Order]
Versions = Callable[[int, Sequence[int]], int]


Idles = Literal["", "fill and drain", "one at a time"]


class Schedule(NamedTuple):
    """A registered schedule.

    `chunks` is the least and the most stages per device (the most is None where there is no limit). `updates` says
    when parameters change: once per step; asynchronously after each micro-batch or each window of M; or never.
    `versions` is how many versions of its parameters stage s keeps, given how many replicas take each stage's
    micro-batches in turn; `reads` says which of them a micro-batch's gradient is computed with: the stage's or the
    input stage's at its forward, or that before the last window.
    `splits` tells that input and weight gradients are computed apart. `uneven` schedules can share a stage among
    several devices. `limit` is how many activations of its stages a device may hold, whatever the seconds are, of
    schedules that order by them. `idles` says why devices wait where nothing else makes them: while a pipeline is
    filled and drained, or because one works at a time. `impossible` returns why a shape cannot be arranged, if it
    cannot.
    """

    name: str
    order: Generate
    placement: Placement
    chunks: tuple[int, int | None]
    updates: Updates
    versions: Versions
    reads: Reads
    splits: bool
    uneven: bool
    limit: Callable[[Shape], int] | None
    idles: Idles
    impossible: Callable[[Shape], str | None]

    @property
    def asynchronous(self) -> bool:
        """Whether the pipeline is never flushed."""
        return self.updates in ("microbatch", "window")

    @property
    def measured(self) -> bool:
        """Whether it orders by seconds."""
        return self.limit is not None

    @property
    def trains(self) -> bool:
        """Whether there is a backward at all."""
        return self.updates != "never"

    @property
    def copies(self) -> int:
        """How many devices of one pipeline hold each stage."""
        return 2 if self.placement == "both-ways" else 1

    def homes(self, stage: int, devices: int) -> tuple[int, ...]:
        """Devices of the pipeline that hold a stage."""
        match self.placement:
            case "straight":
                return (stage,)
            case "looped":
                return (stage % devices,)
            case "vee":
                return (stage if stage < devices else 2 * devices - 1 - stage,)
            case "both-ways":
                return (stage, devices - 1 - stage)


_REGISTRY: dict[str, Schedule] = {}


def schedule(
    name: str,
    *,
    placement: Placement = "straight",
    chunks: tuple[int, int | None] = (1, 1),
    updates: Updates = "step",
    versions: Versions = lambda stage, replicas: 1,
    reads: Reads = "own stage",
    splits: bool = False,
    uneven: bool = False,
    limit: Callable[[Shape], int] | None = None,
    idles: Idles = "",
    impossible: Callable[[Shape], str | None] = lambda shape: None,
) -> Callable[[Generate], Generate]:
    """Register `Shape -> Order` under `name`; see `Schedule` for the rest."""

    def register(function: Generate) -> Generate:
        _REGISTRY[name] = Schedule(
            name, function, placement, chunks, updates, versions, reads, splits, uneven, limit, idles, impossible
        )
        return function

    return register


def names() -> tuple[str, ...]:
    """List the registered schedules."""
    return tuple(_REGISTRY)


def get(name: str) -> Schedule:
    """Return a schedule. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("schedule", name, names(), where="plan.schedule", fix="choose one of the known schedules")
    return _REGISTRY[name]


def why_not(chosen: Schedule, shape: Shape) -> str | None:
    """Return why `chosen` cannot arrange `shape`, or None when it can."""
    least, most = chosen.chunks
    if shape.chunks < least or (most is not None and shape.chunks > most):
        allowed = f"v={least}" if least == most else f"v>={least}" if most is None else f"v={least} to {most}"
        return f"it needs {allowed} stages per device, not v={shape.chunks}"
    if shape.replicas and not chosen.uneven:
        return "its stages cannot have different numbers of replicas"
    most = max(shape.replicas, default=1)
    if shape.microbatches < most and not chosen.asynchronous:
        return f"a stage has {most} replicas, and only {shape.microbatches} of them would get a micro-batch"
    return chosen.impossible(shape)


def arrange(name: str, shape: Shape) -> Order:
    """Return the computes of every device, in order.

    Raises `PlanError` (exit 2) for an unknown schedule, or a shape that it cannot arrange.
    """
    chosen = get(name)
    reason = why_not(chosen, shape)
    if reason is not None:
        raise PlanError(
            what=f"the schedule {name} cannot arrange this pipeline",
            where=f"{shape.devices} devices, v={shape.chunks} stages each, M={shape.microbatches}",
            why=reason,
            fix="choose another M or v, or another schedule",
        )
    return chosen.order(shape)
