"""What the parts of this benchmark share: published tables, tables of results, layers and clusters made by hand."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.orders import codes, schedules
from planner.programs.lowering import lower
from planner.programs.waits import Linked
from planner.simulate.longest_path import walk
from planner.values.cluster import Cluster
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, ProfileKey, Timing, Value

DATA = Path(__file__).parent / "data"
GIB = 2**30


@dataclass
class Figure:
    """One number that has a target: it must not be larger."""

    name: str
    value: float
    target: float
    unit: str = "%"

    @property
    def met(self) -> bool:
        return self.value <= self.target


@dataclass
class Table:
    """Rows of published figures, ours, and the error."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]] = field(default_factory=list)


@dataclass
class Result:
    """What one part of the benchmark has to say."""

    tables: list[Table]
    figures: list[Figure]


def read(name: str) -> list[dict[str, str]]:
    """Read a published table; its first lines, with its source, begin with #."""
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def mean_percent(errors: Sequence[float]) -> float:
    """Return the mean of the absolute relative errors, in %."""
    return 100 * statistics.fmean(abs(e) for e in errors)


def timing(seconds: float, samples: int) -> tuple[Timing, ...]:
    """Return a time without spread, at one micro-batch size."""
    return (Timing.of(samples, [seconds]),)


def layer(
    name: str,
    samples: int,
    seconds: tuple[float, float, float],
    *,
    optimizer_s: float = 0.0,
    parameters: tuple[float, float, float] = (0.0, 0.0, 0.0),
    saved: float = 0.0,
    output: float = 0.0,
    transient: float = 0.0,
    recompute: float | None = None,
) -> LayerProfile:
    """A layer whose forward, backward-input and backward-weight take `seconds`; a whole backward takes both.

    `parameters` are bytes of parameters, gradients and optimizer state; `saved`, `output` and `transient` are bytes
    of one micro-batch: kept for the backward, sent on, and live inside a forward or backward only.
    """
    f, b, w = seconds
    p, g, o = (round(x) for x in parameters)
    return LayerProfile(
        name=name,
        parameter_bytes=p,
        buffer_bytes=0,
        gradient_bytes=g,
        optimizer_bytes=o,
        optimizer_peak_bytes=0,
        times=(
            LayerTimes(
                threads=1,
                forward=timing(f, samples),
                backward=timing(b + w, samples),
                backward_input=timing(b, samples),
                backward_weight=timing(w, samples),
                recompute=timing(f if recompute is None else recompute, samples),
                optimizer=Timing.of(samples, [optimizer_s]),
            ),
        ),
        sizes=(
            LayerSizes(
                samples=samples,
                saved_bytes=round(saved),
                output_bytes=round(output),
                output_saved=False,
                forward_peak_bytes=round(saved + output + transient),
                backward_first_peak_bytes=round(transient + g),
                backward_peak_bytes=round(transient),
                flop=0,
            ),
        ),
    )


def profile(
    layers: Sequence[LayerProfile],
    samples: int,
    machine: Cluster,
    *,
    tied: tuple[tuple[str, ...], ...] = (),
    loss: LayerProfile | None = None,
) -> Profile:
    """A chain of layers; each hands its output on."""
    return Profile(
        key=ProfileKey(
            model="published", source_sha256="0" * 64, device="published", dtype="", cores=1, torch="", python=""
        ),
        created="2026-11-21T00:00:00+00:00",
        model_path="published",
        layers=tuple(layers),
        loss=loss or layer("loss", samples, (0.0, 0.0, 0.0)),
        values=tuple(
            Value(
                name=f"v{i}",
                source=i,
                targets=(i + 1,),
                bytes_at=((samples, own.sizes[0].output_bytes),),
                gradient=True,
            )
            for i, own in enumerate(layers[:-1])
        ),
        tied=tied,
        whole=(),
        load=(Timing.of(samples, []),),
        batch_bytes=((samples, 0, 0),),
        batch=samples,
        action_s=0.0,
        noise=0.0,
        machine=machine,
    )


def plan(
    schedule: str,
    layers: Sequence[LayerProfile],
    balance: Sequence[int],
    cluster: Cluster,
    microbatches: int,
    samples: int,
    *,
    chunks: int = 1,
    tied: tuple[tuple[int, ...], ...] = (),
    stage_seconds: tuple[tuple[float, float, float], ...] = (),
    recompute: bool = False,
    recompute_layers: tuple[str, ...] = (),
) -> Plan:
    """Place stages of so many layers each as the schedule does, on the cluster's devices in order."""
    depth = len(balance) // chunks
    chosen = schedules.get(schedule)
    ends = np.cumsum(balance).tolist()
    names = [own.name for own in layers]
    return Plan(
        strategy=schedule,
        schedule=schedule,
        stages=tuple(
            Stage(
                layers=tuple(names[end - count : end]),
                devices=tuple(cluster.devices[home].name for home in chosen.homes(s, depth)),
            )
            for s, (end, count) in enumerate(zip(ends, balance, strict=True))
        ),
        microbatches=microbatches,
        batch=microbatches * samples,
        chunks=chunks,
        tied=tied,
        stage_seconds=stage_seconds,
        recompute=recompute,
        recompute_layers=recompute_layers,
    )


def priced(profile: Profile, plan: Plan, cluster: Cluster) -> Costs:
    """Return what every action of a plan's step costs."""
    return costs_of(Placed(profile, plan, cluster), Linked(lower(plan)))


def makespan(profile: Profile, plan: Plan, cluster: Cluster) -> float:
    """Seconds from a step's first action to its last."""
    return walk(priced(profile, plan, cluster)).step_s


def span(costs: Costs, ops: tuple[str, ...]) -> float:
    """Seconds from the first to the last action among `ops`, of the device that takes longest for them."""
    end, linked = walk(costs).end, costs.linked
    counted = codes.has(linked.flat, *ops)
    longest = 0.0
    for row in range(linked.devices):
        own = np.flatnonzero(counted & (linked.row == row))
        longest = max(longest, float(end[own[-1]] - end[own[0]] + costs.seconds[own[0]]))
    return longest


def disorder(published: Sequence[float], ours: Sequence[float], cells: Sequence[tuple[object, ...]]) -> int:
    """Count pairs of cells that share a row or a column of a table and that ours put in another order."""
    return sum(
        (published[i] - published[j]) * (ours[i] - ours[j]) <= 0 and published[i] != published[j]
        for i in range(len(cells))
        for j in range(i)
        if sum(a == b for a, b in zip(cells[i], cells[j], strict=True)) == len(cells[i]) - 1
    )
