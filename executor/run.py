"""Run a plan for real: launch its ranks, gather what they measured into one outcome, save the trained weights."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from executor import saving
from executor.compiling import check_compiler
from executor.ending import ask
from executor.evaluations import evaluated
from executor.following import Watch, following
from executor.initial import FILE as INITIAL
from executor.launch import launch
from executor.model_file import load
from executor.recording import RankMemory, RankStep, recording_of
from executor.steps import announced, joined
from executor.worker import PATIENCE_S, Job, main
from planner.basis.errors import INTERRUPTED, PlanError
from planner.orders.action import parse
from planner.orders.operations import AGREEMENTS, REDUCE_TIED
from planner.values.evaluation import Evaluation
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.step import Step
from planner.values.trace import COMPUTE, Event, MemoryPoint, Trace


def run(
    model: str,
    plan: Plan,
    *,
    device: str,
    steps: int = 0,
    epochs: int = 0,
    seed: int,
    folder: Path,
    capacity_bytes: tuple[float, ...],
    expected_step_s: float = 0.0,
    watches: Sequence[Watch] = (),
    workers: int | None = None,
    evaluate_every: int | None = None,
) -> Outcome:
    """Train `plan` for so many steps, or epochs of the model file's data, and return what was measured.

    `folder` receives each rank's results and log, and the trained weights as `weights.pt`, a state dict of the
    unsplit model, and in the other forms of `executor.saving.gather`. `workers` processes make batches of `data()`
    ready for each rank that loads. `watches` are told the steps, about twice a second, as they are finished. The first
    Ctrl-C ends the run behind a step that all ranks agree on: the outcome then says that it was `stopped`.

    Raises `PlanError` for epochs without data (exit 2), without the compiler that compiled layers need (5),
    when a rank fails (6), or when the run ended before a step was
    recorded (130), and `KeyboardInterrupt` at the second Ctrl-C or before the first step.
    """
    if evaluate_every and load(model, plan.sequence).evaluate is None:
        raise PlanError(
            what="--evaluate-every needs evaluate()",
            where=model,
            why="the model file does not say with which data",
            fix="define evaluate() -> Dataset or DataLoader in it, or how many samples batch(n) is to draw",
        )
    if load(model, plan.sequence).compiled:
        check_compiler(model, device)
    if epochs and load(model, plan.sequence).data is None:
        raise PlanError(
            what="--epochs needs data()",
            where=model,
            why="the model file has batch(n) alone, which makes samples without end",
            fix="define data() -> Dataset or DataLoader in it, or say how many steps: plan run --steps 1000",
        )
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        model=model,
        plan=plan,
        device=device,
        steps=steps,
        epochs=epochs,
        seed=seed,
        evaluate_every=evaluate_every,
        folder=str(folder.resolve()),
        patience_s=max(PATIENCE_S, 10 * expected_step_s),
        workers=workers,
    )
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    ranks = len(plan.devices)
    try:
        with following(folder, ranks, watches):
            launch(main, str(path.resolve()), ranks, folder / "logs", stop=lambda: ask(folder))
    finally:
        (folder / INITIAL).unlink(missing_ok=True)
    holders = tuple(sorted({rows[0] for rows in plan.holders}))
    saving.gather(folder, ranks, holders, load(model, plan.sequence))
    return gathered(plan, folder, capacity_bytes)


def gathered(plan: Plan, folder: Path, capacity_bytes: tuple[float, ...]) -> Outcome:
    """Return what was measured, with the memory unless a person has ended the run.

    Raises `PlanError` (exit 130) when it ended before a step was recorded.
    """
    ranks = len(plan.devices)
    outcome = partial(plan, folder, capacity_bytes)
    if outcome is None:
        raise PlanError(
            what="interrupted during the warm-up",
            where=str(folder),
            why=f"{len(joined(folder, ranks))} steps were trained, and none was recorded",
            fix=f"run again; {folder / 'weights.pt'} has what was trained",
            code=INTERRUPTED,
        )
    if outcome.stopped:
        return outcome
    memory = [
        msgspec.json.decode((folder / f"rank{r}.memory.json").read_bytes(), type=RankMemory) for r in range(ranks)
    ]
    return msgspec.structs.replace(outcome, memory_step=_memory_trace(outcome.trace, memory))


def partial(plan: Plan, folder: Path, capacity_bytes: tuple[float, ...]) -> Outcome | None:
    """Return what was measured of the steps that every rank has finished and written, if any of them was recorded."""
    ranks = range(len(plan.devices))
    steps = joined(folder, len(ranks))
    recorded = [_recorded(recording_of(folder, rank), len(steps)) for rank in ranks]
    count = min(len(steps_of) for steps_of in recorded)
    if not count:
        return None
    extent = announced(folder)
    found = evaluated(folder)
    outcome = gather(plan, [steps_of[:count] for steps_of in recorded], steps, capacity_bytes, found)
    return msgspec.structs.replace(outcome, asked_steps=extent.steps if extent else len(steps))


def _recorded(file: Path, finished: int) -> list[RankStep]:
    """What a rank has recorded of steps that are finished, and has written to its end."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found = [msgspec.json.decode(line, type=RankStep) for line in lines if line.endswith(b"\n")]
    return [step for step in found if step.step < finished]


def gather(
    plan: Plan,
    recorded: list[list[RankStep]],
    steps: list[Step],
    capacity_bytes: tuple[float, ...],
    evaluations: Sequence[Evaluation] = (),
) -> Outcome:
    """Join what the ranks recorded into one trace per step, and add the times of all steps behind these.

    A step begins when the step before it ended, so the times of the steps add up to the time of the run. A device
    that is done early may load its next batch before that: at a negative time. Behind an evaluation it begins when the
    last device goes on with it, and no step's time has the evaluation in it.
    """
    paused = [e.step for e in evaluations if e.step < len(steps)]
    rows = list(zip(*recorded, strict=True))
    ends = [max(e.end for of_rank in row for e in of_rank.events) for row in rows]
    begins = [min(e.start for of_rank in rows[0] for e in of_rank.events), *ends[:-1]]
    begins = [steps[row[0].step].begin if row[0].step in paused else b for row, b in zip(rows, begins, strict=True)]
    traces = tuple(
        _trace(plan, [of_rank.events for of_rank in row], begin) for row, begin in zip(rows, begins, strict=True)
    )
    behind = steps[rows[-1][0].step + 1 :]
    times = (*(trace.end for trace in traces), *(step.end - step.begin for step in behind))
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [times[0]] * 9
    rates = tuple(step.rate for step in steps)
    return Outcome(
        plan=plan,
        source="measured",
        steps=traces,
        interval_s=(tenths[0], tenths[-1]),
        capacity_bytes=capacity_bytes,
        step_times_s=times,
        losses=tuple(step.loss for step in steps),
        rates=() if any(map(math.isnan, rates)) else rates,
        norms=() if all(math.isnan(s.norm) for s in steps) else tuple(_finite(s.norm) for s in steps),
        training_s=steps[-1].end - steps[0].begin - sum(steps[i].begin - steps[i - 1].end for i in paused),
        evaluations=tuple(evaluations),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
    arrivals: dict[tuple[str, int], float] = {}
    for event in (e for row in rows for e in row if e.lane == COMPUTE and parse(e.action).op in AGREEMENTS):
        parties = _parties(plan, event)
        arrivals[parties] = max(arrivals.get(parties, 0.0), event.start)
    events = []
    for event in (e for row in rows for e in row):
        ready = min(event.end, max(event.ready, arrivals.get(_parties(plan, event), event.ready)))
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


def _parties(plan: Plan, event: Event) -> tuple[str, int]:
    """Who joins an action that nobody does alone: stages of one replica share parameters, all others are one party."""
    action = parse(event.action)
    if action.op != REDUCE_TIED:
        return event.action, 0
    return event.action, event.device * plan.pipelines // len(plan.groups)
