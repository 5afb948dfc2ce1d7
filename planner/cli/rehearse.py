"""`plan run --rehearse`: a plan's own processes and messages on this machine, with waits instead of computing."""

from __future__ import annotations

from typing import NamedTuple

from planner.basis.errors import DEVICE, PlanError
from planner.basis.units import percent, size
from planner.cli import output
from planner.cli.comparison import as_data, compared, show
from planner.cli.line import LINE, again
from planner.cli.opened import is_file, meant
from planner.cli.report import write_page
from planner.cli.runnable import check_runnable
from planner.cli.training import Progress
from planner.costs.placed import Placed
from planner.costs.rehearsed import rehearsal_of, rehearsed_profile, stage_hardware
from planner.simulate.predict import simulate as predict
from planner.store import Run, Store
from planner.values.outcome import Comparison, Outcome
from planner.values.rehearsal import Rehearsal
from planner.values.trace import KINDS

STEPS = 8
"""Without `--steps`: three of them are a warm-up, and a step that waits is much like the next."""

ROOM = 0.8
"""Share of the free memory that messages may take."""


class Asked(NamedTuple):
    """What a person asks of a rehearsal."""

    plan: str
    profile: str | None
    steps: int
    seed: int
    jitter: bool
    message_scale: float


class Rehearsed(NamedTuple):
    """What came of it, with the page that shows it."""

    result: Run
    comparison: Comparison
    page: str


def rehearse(asked: Asked) -> Rehearsed:
    """Rehearse a plan on this machine, save what came of it and write its page.

    Raises `PlanError` for a plan whose operations no rank performs (exit 2), and where its messages are too large for
    this machine (5).
    """
    if not 0 < asked.message_scale <= 1:
        raise PlanError(
            what="--message-scale is a part of the bytes",
            where="--message-scale",
            why=f"it is {asked.message_scale:g}",
            fix="--message-scale 0.01",
        )
    from executor.abilities import able
    from executor.devices import free_bytes
    from executor.rehearse import rehearse as execute
    from executor.waiting import lateness
    from profiles import shipped
    from profiles.machine import machine

    store = Store(catalogue=shipped)
    store.check_writable()
    question = meant(asked.plan, asked.profile, None, able)
    check_runnable(question.plan)
    plan = question.plan
    here = machine("cpu")
    cluster = stage_hardware(question.cluster, here.cluster, plan, message_scale=asked.message_scale, wake_s=lateness())
    profile = rehearsed_profile(question.profile, jitter=asked.jitter)
    predicted = predict(profile, plan, cluster)
    rehearsal = rehearsal_of(Placed(profile, plan, cluster), jitter=asked.jitter)
    _check_room(predicted, rehearsal, free_bytes("cpu"))
    folder = store.new_run(plan)
    output.progress.print(f"rehearsing {plan}: {len(plan.devices)} processes that wait, {asked.steps} steps …")
    measured = execute(
        rehearsal,
        plan,
        steps=asked.steps,
        seed=asked.seed,
        folder=folder,
        capacity_bytes=predicted.capacity_bytes,
        expected_step_s=predicted.step_s,
        watches=(Progress(predicted, trains=False),),
    )
    command = again(LINE.get(), store.name_of(question.path), plan=str(plan) if asked.plan == "best" else "")
    simulated = "" if is_file(asked.plan) else store.load_ranking().asked
    result = Run(
        profile=str(question.path),
        predicted=predicted,
        measured=measured,
        asked=f"{simulated} && {command}" if simulated else command,
        cluster=cluster,
    )
    store.save_run(folder, result)
    page = write_page(store, folder, result, question.profile, folder / "report.html")
    return Rehearsed(result, compared(result, question.profile), str(page))


def data_of(found: Rehearsed) -> dict[str, object]:
    """The same as JSON data."""
    cluster = found.result.cluster
    assert cluster is not None
    scale = {"rehearsed": True, "message_scale": cluster.message_scale}
    return {**as_data(found.result, found.comparison), **scale, "report": found.page}


def show_rehearsed(found: Rehearsed) -> None:
    """Print it."""
    show(found.result, found.comparison)
    cluster = found.result.cluster
    assert cluster is not None
    words = "compute is waits, messages are real"
    if cluster.message_scale != 1:
        words += f" but have {percent(cluster.message_scale)} of their bytes, in the prediction, too"
    output.results.print(f"a rehearsal on this machine: {words}")
    output.results.print(f"report {found.page}: open it in a browser")


def _check_room(predicted: Outcome, rehearsal: Rehearsal, free: int) -> None:
    """Raise `PlanError` (exit 5) where what is really sent, which alone is in memory, is more than there is."""
    held = [rehearsal.stages[stage] for own in predicted.plan.stages_of for stage in own]
    collected = sum(sum(stage.reduced) + sum(stage.gathered) for stage in held) if predicted.plan.replicas > 1 else 0
    most = dict.fromkeys(range(len(predicted.trace.devices)), 0.0)
    for point in predicted.trace.memory:
        most[point.device] = max(most[point.device], point.bytes[KINDS.index("communication")])
    need = sum(most.values()) + collected
    if need > ROOM * free:
        raise PlanError(
            what="the messages do not fit into this machine's memory",
            where=f"rehearsal of {predicted.plan}",
            why=f"{size(need)} of messages and collectives are there at once, and {size(free)} are free",
            fix=f"--message-scale {0.1 * rehearsal.message_scale * free / need:.1g}",
            code=DEVICE,
        )
