"""Run a plan for real: launch its ranks, gather what they measured into one outcome, save the trained weights."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from executor import checkpointing, checkpoints, saving
from executor.compiling import check_compiler
from executor.ending import ask, asked
from executor.evaluations import begin_with as begin_with_evaluations
from executor.evaluations import evaluated
from executor.examining import examine
from executor.following import Watch, following
from executor.initial import FILE as INITIAL
from executor.launch import launch
from executor.model_file import load
from executor.recording import RankMemory, RankStep, recorded_by
from executor.steps import announced, begin_with, joined
from executor.training import DIVERGED
from executor.worker import PATIENCE_S, Job, main
from planner.basis.errors import INTERRUPTED, RUN_FAILED, PlanError
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
    checkpoint_every: int = 0,
    max_restarts: int = 0,
    resume: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
    patience_s: float = PATIENCE_S,
) -> Outcome:
    """Train `plan` for so many steps, or epochs of the model file's data, and return what was measured.

    `folder` receives each rank's results and log, and the trained weights as `weights.pt`, a state dict of the
    unsplit model, and in the other forms of `executor.saving.gather`. It receives a checkpoint behind every so many
    steps (`checkpoint_every`); where a rank fails, all begin again from the newest, as often as `max_restarts`. The run
    goes on from that of another run's folder (`resume`). `workers` processes make batches of `data()` ready for each
    rank that loads. `watches` are told the steps, about twice a second, as they are finished, and `say` what a person
    should know meanwhile. The first Ctrl-C ends the run behind a step that all ranks agree on: the outcome then says
    that it was `stopped`.

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
        patience_s=max(patience_s, 10 * expected_step_s),
        workers=workers,
        checkpoint_every=checkpoint_every,
        resume=str(resume.resolve()) if resume is not None else "",
    )
    path = folder / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    ranks = len(plan.devices)
    if resume is not None:
        _continued(folder, ranks, resume)
    try:
        with following(folder, ranks, watches, say):
            _launched(str(path.resolve()), ranks, folder, max_restarts, say)
    except PlanError as error:
        if error.what == DIVERGED:
            examine(error, job, folder)
        raise
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


def _launched(job: str, ranks: int, folder: Path, restarts: int, say: Callable[[str], object]) -> None:
    """Run the ranks of a job; where one fails, begin again from the newest checkpoint, so many times at most."""
    for attempt in itertools.count():
        logs = folder / ("logs" if not attempt else f"logs.{attempt}")
        try:
            launch(main, job, ranks, logs, stop=lambda: ask(folder))
        except PlanError as error:
            if attempt == restarts or error.code != RUN_FAILED or asked(folder) or not again(error):
                raise
            say(f"{error.what}, {error.where.splitlines()[0]} ({error.why}): restart {attempt + 1} of {restarts}")
        else:
            return


def again(error: PlanError) -> bool:
    """Whether a run that has failed may fare better in another attempt: what is computed again is the same again."""
    return error.what != DIVERGED


def checkpoint_of(folder: Path) -> tuple[Job, int]:
    """Return the job of a run, and the step of its newest checkpoint. Raises `PlanError` (exit 4) where it has none."""
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    steps = checkpoints.steps(folder / checkpoints.FOLDER)
    if not steps:
        raise checkpointing.none(folder / checkpoints.FOLDER)
    return job, steps[0]


def _continued(folder: Path, ranks: int, earlier: Path) -> None:
    """Let a new run's folder begin with the steps of an earlier one; its ranks keep those that a checkpoint has."""
    job, _ = checkpoint_of(earlier)
    begin_with(folder, ranks, joined(earlier, len(job.plan.devices)))
    begin_with_evaluations(folder, evaluated(earlier))


def partial(plan: Plan, folder: Path, capacity_bytes: tuple[float, ...]) -> Outcome | None:
    """Return what was measured of the steps that every rank has finished and written, if any of them was recorded."""
    ranks = range(len(plan.devices))
    steps = joined(folder, len(ranks))
    recorded = [[one for one in recorded_by(folder, rank) if one.step < len(steps)] for rank in ranks]
    count = min(len(steps_of) for steps_of in recorded)
    if not count:
        return None
    extent = announced(folder)
    found = evaluated(folder)
    outcome = gather(plan, [steps_of[:count] for steps_of in recorded], steps, capacity_bytes, found)
    return msgspec.structs.replace(outcome, asked_steps=extent.steps if extent else len(steps))


def gather(
    plan: Plan,
    recorded: list[list[RankStep]],
    steps: list[Step],
    capacity_bytes: tuple[float, ...],
    evaluations: Sequence[Evaluation] = (),
) -> Outcome:
    """Join what the ranks recorded into one trace per step, and add the times of all steps behind these.

    A step begins when the step before it ended, so the times of the steps add up to the time of the run. A device
    that is done early may load its next batch before that: at a negative time. Behind a pause (an evaluation, a
    checkpoint, a run that was taken up again) it begins when the last device goes on; no step's time has that in it.
    """
    pauses = [b.begin - a.end for a, b in itertools.pairwise(steps)]
    rows = list(zip(*recorded, strict=True))
    ends = [max(e.end for of_rank in row for e in of_rank.events) for row in rows]
    begins = [min(e.start for of_rank in rows[0] for e in of_rank.events)]
    for before, row, end in zip(rows, rows[1:], ends, strict=False):
        step = row[0].step
        begins.append(end if step == before[0].step + 1 and not pauses[step - 1] else steps[step].begin)
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
        training_s=steps[-1].end - steps[0].begin - sum(pauses),
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
