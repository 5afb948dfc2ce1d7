"""Run a plan for real: launch its ranks, gather what they measured into one outcome, save the trained weights."""

from __future__ import annotations

import bisect
import statistics
from pathlib import Path

import msgspec
import torch

from executor.launch import launch
from executor.recording import RankMemory, RankStep
from executor.worker import PATIENCE_S, Job, main
from planner.orders.action import parse
from planner.orders.operations import REDUCE_GRAD, REDUCE_NORM
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.trace import COMPUTE, Event, MemoryPoint, Trace

WARM_UP_STEPS = 3

TOGETHER = (REDUCE_GRAD, REDUCE_NORM)
"""What all ranks that have an action of this name begin when the last one has come to it."""


def run(
    model: str,
    plan: Plan,
    *,
    device: str,
    steps: int,
    seed: int,
    folder: Path,
    capacity_bytes: tuple[float, ...],
    expected_step_s: float = 0.0,
) -> Outcome:
    """Train `steps` steps of `plan` (after a few warm-up steps) and return what was measured.

    `folder` receives each rank's results and log, and the trained weights as `weights.pt`, a state dict of the
    unsplit model. Raises `PlanError` (exit 6) when a rank fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        model=model,
        plan=plan,
        device=device,
        steps=steps,
        warm_up=WARM_UP_STEPS,
        seed=seed,
        folder=str(folder.resolve()),
        patience_s=max(PATIENCE_S, 10 * expected_step_s),
    )
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    launch(main, str(path.resolve()), len(plan.devices), folder / "logs")
    weights: dict[str, torch.Tensor] = {}
    for rank in sorted({holders[0] for holders in plan.holders}):
        weights |= torch.load(folder / f"rank{rank}.pt", weights_only=True)
    for rank in range(len(plan.devices)):
        (folder / f"rank{rank}.pt").unlink()
    torch.save(weights, folder / "weights.pt")
    outcome = partial(plan, folder, capacity_bytes)
    assert outcome is not None, "every rank has written its steps"
    memory = [
        msgspec.json.decode((folder / f"rank{r}.memory.json").read_bytes(), type=RankMemory)
        for r in range(len(plan.devices))
    ]
    return msgspec.structs.replace(outcome, memory_step=_memory_trace(outcome.trace, memory))


def partial(plan: Plan, folder: Path, capacity_bytes: tuple[float, ...]) -> Outcome | None:
    """Return what was measured of the steps that every rank has finished and written, if there is one."""
    files = [folder / f"rank{r}.steps.jsonl" for r in range(len(plan.devices))]
    if not all(file.exists() for file in files):
        return None
    ranks = [[msgspec.json.decode(line, type=RankStep) for line in _whole_lines(file)] for file in files]
    count = min(len(steps) for steps in ranks)
    return gather(plan, [steps[:count] for steps in ranks], capacity_bytes) if count else None


def _whole_lines(file: Path) -> list[bytes]:
    """The lines that were written to their end before the rank was."""
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def gather(plan: Plan, ranks: list[list[RankStep]], capacity_bytes: tuple[float, ...]) -> Outcome:
    """Join the ranks' steps into one trace per step.

    A step begins when the step before it ended, so the times of the steps add up to the time of the run. A device
    that is done early may load its next batch before that: at a negative time.
    """
    steps = list(zip(*ranks, strict=True))
    ends = [max(e.end for of_rank in step for e in of_rank.events) for step in steps]
    begins = [min(e.start for of_rank in steps[0] for e in of_rank.events), *ends[:-1]]
    traces = tuple(
        _trace(plan, [of_rank.events for of_rank in step], begin) for step, begin in zip(steps, begins, strict=True)
    )
    times = tuple(trace.end for trace in traces)
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    return Outcome(
        plan=plan,
        source="measured",
        steps=traces,
        interval_s=(tenths[0], tenths[-1]),
        capacity_bytes=capacity_bytes,
        step_times_s=times,
        losses=tuple(sum(of_rank.loss for of_rank in step) for step in steps),
    )


def _memory_trace(drawn: Trace, ranks: list[RankMemory]) -> Trace:
    """Put the memory curves on the time axis of the step that is drawn.

    The step in which memory was recorded is slower than others, because recording is; its actions are the same.
    """
    points: list[MemoryPoint] = []
    for device, rank in enumerate(ranks):
        theirs = {e.action: e for e in rank.events if e.lane == COMPUTE}
        mine = {e.action: e for e in drawn.events if e.lane == COMPUTE and e.device == device}
        anchors = sorted((a, b) for name in theirs for a, b in zip(_ends(theirs[name]), _ends(mine[name]), strict=True))
        points += [MemoryPoint(device, _mapped(point.time, anchors), point.bytes) for point in rank.memory]
    return msgspec.structs.replace(drawn, memory=tuple(points))


def _ends(event: Event) -> tuple[float, float]:
    return event.ready, event.end


def _mapped(time: float, anchors: list[tuple[float, float]]) -> float:
    """Interpolate between pairs of (time there, time here)."""
    right = min(max(1, bisect.bisect_left(anchors, (time, 0.0))), len(anchors) - 1)
    (a, x), (b, y) = anchors[right - 1], anchors[right]
    return x + (y - x) * (time - a) / (b - a) if b > a else x


def _trace(plan: Plan, rows: list[tuple[Event, ...]], begin: float) -> Trace:
    arrivals: dict[str, float] = {}
    for event in (e for row in rows for e in row if e.lane == COMPUTE and parse(e.action).op in TOGETHER):
        arrivals[event.action] = max(arrivals.get(event.action, 0.0), event.start)
    events = []
    for event in (e for row in rows for e in row):
        ready = min(event.end, max(event.ready, arrivals.get(event.action, event.ready)))
        events.append(
            Event(
                event.device,
                event.lane,
                event.action,
                event.start - begin,
                ready - begin,
                event.end - begin,
                event.bytes,
            )
        )
    events.sort(key=lambda e: (e.device, e.start, e.end))
    return Trace(devices=plan.devices, events=tuple(events))
