"""`plan run`: execute a plan for real, and hold the prediction against it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from planner.basis.errors import ARTEFACT, INTERRUPTED, TOLERANCE, PlanError
from planner.basis.units import percent
from planner.cli import output
from planner.cli.comparison import as_data, compared, show
from planner.cli.line import LINE, again
from planner.cli.measured import warn_beyond
from planner.cli.opened import is_file, of_plan, on_devices_of, require_same
from planner.cli.options import JsonOption
from planner.cli.rehearse import STEPS as REHEARSED_STEPS
from planner.cli.rehearse import Asked, data_of, rehearse, show_rehearsed
from planner.cli.report import write_page
from planner.cli.resuming import resumed
from planner.cli.runnable import check_runnable
from planner.cli.training import Progress
from planner.orders import schedules
from planner.simulate.predict import simulate as predict
from planner.store import Run, Store, is_table
from planner.values.evaluation import forward_only
from planner.values.outcome import Comparison, Outcome
from planner.values.plan import Plan

STEPS = 20
"""Without `--steps`: enough to compare."""

SEEDS = 2**31
"""Seeds below this one can be counted up for every step and given to torch, numpy and random."""


def run(
    plan: Annotated[
        str | None,
        typer.Argument(
            help="best, a plan of the last simulation, or the path of a plan file. Default: best; with --resume, that "
            "run's own."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: 20.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of the model file's data(), instead of steps.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the weights and the batches. Default: 0.", show_default=False)
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="A profile's path or name. Default: the one that was simulated.")
    ] = None,
    check: Annotated[
        float | None, typer.Option(help="Fail (exit 7) when the step time is off by more than so many per cent.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="A folder for loss, learning rate and speed, as TensorBoard reads them.")
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            help="Evaluate with the model file's evaluate() every so many steps; 0 is never. Default: at the end of "
            "each epoch and of the run."
        ),
    ] = None,
    rehearsal: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Real processes and messages on this machine, with waits instead of computing: from any profile, for "
            "any number of devices.",
        ),
    ] = False,
    message_scale: Annotated[
        float | None,
        typer.Option(help="With --rehearse: messages and collectives of so many times their bytes, 0.01 say."),
    ] = None,
    jitter: Annotated[
        bool, typer.Option("--jitter", help="With --rehearse: draw waits from the profile's spread, from the seed.")
    ] = False,
    checkpoint_every: Annotated[
        int, typer.Option(help="Remember the run behind every so many steps and at its end; 0 is never.")
    ] = 0,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on from the last checkpoint of a run, by the name or path of its folder, or 'last'."),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Where a process fails, go on from the last checkpoint by itself, so many times.")
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Train with a plan, by real processes, and compare with the prediction.

    Behind a warm-up of three steps up to 30 steps are recorded action by action, then the training goes on without.
    The first Ctrl-C ends the training behind a step and saves the weights, the second one ends at once.
    """
    for name, count in (("--checkpoint-every", checkpoint_every), ("--max-restarts", max_restarts)):
        if count < 0:
            raise PlanError(what=f"{name} cannot be negative", where=name, why=f"it is {count}", fix=f"{name} 10")
    for name, given in (("--steps", steps), ("--epochs", epochs)):
        if given is not None and given < 1:
            raise PlanError(what=f"{name} must be positive", where=name, why=f"it is {given}", fix="--steps 20")
    if evaluate_every is not None and evaluate_every < 0:
        why, fix = f"it is {evaluate_every}", "--evaluate-every 100, or 0 for never"
        raise PlanError(what="--evaluate-every is a number of steps", where="--evaluate-every", why=why, fix=fix)
    if steps is not None and epochs is not None:
        raise PlanError(
            what="a run has steps or epochs",
            where="--steps, --epochs",
            why="both are given, and one of them follows from the other",
            fix=f"--epochs {epochs}",
        )
    if seed is not None and not 0 <= seed < SEEDS:
        raise PlanError(what="--seed must be a number from 0 on", where="--seed", why=f"it is {seed}", fix="--seed 0")
    _check_goes_together(
        rehearsal,
        {"--message-scale": message_scale is not None, "--jitter": jitter},
        {
            "--epochs": epochs,
            "--tensorboard": tensorboard,
            "--evaluate-every": evaluate_every,
            "--checkpoint-every": checkpoint_every or None,
            "--resume": resume,
            "--max-restarts": max_restarts or None,
        },
    )
    if rehearsal:
        scale = 1.0 if message_scale is None else message_scale
        found = rehearse(Asked(plan or "best", profile, steps or REHEARSED_STEPS, seed or 0, jitter, scale))
        beyond = _beyond(found.comparison, check, data_of(found)) if check is not None else None
        if json and beyond is None:
            output.document("run", data_of(found))
        elif not json:
            show_rehearsed(found)
        if beyond is not None:
            raise beyond
        return
    from executor.abilities import able
    from profiles import shipped

    store = Store(catalogue=shipped)
    store.check_writable()
    earlier = resumed(store, resume) if resume is not None else None
    if earlier is not None:
        steps, epochs, seed = earlier.extent(steps, epochs, seed)
        plan = plan or earlier.plan_file(store)
    plan = plan or "best"
    if plan == "best":
        _check_meant_for_this_machine(store)
    wanted = store.plan(plan, able)
    if earlier is not None:
        earlier.check(wanted)
    check_runnable(wanted)
    path = store.profile_path(profile or _simulated_with(store, plan))
    _check_has_model(path)
    path, measured_profile = of_plan(store, path, store.load_profile(path), wanted, profile)
    if measured_profile.estimated:
        raise PlanError(
            what="an estimated profile cannot be run",
            where=str(path),
            why=f"it is for {measured_profile.key.device}, and a run is compared with what was measured where it runs",
            fix=f"plan profile {measured_profile.model_path}   (measures this machine), then simulate and run again",
            code=ARTEFACT,
        )
    warn_beyond(measured_profile, [wanted.samples])
    _check_whole_steps(wanted, checkpoint_every)
    from executor.initial import check_room
    from executor.run import partial
    from executor.run import run as execute
    from executor.tensorboard import Curves
    from profiles.measure import key_of

    kind = "cuda" if not measured_profile.machine.elastic else "cpu"
    of = measured_profile
    now = key_of(of.model_path, kind, of.sequence, of.sources, of.key.dtype, of.key.precision, compiled=of.key.compiled)
    require_same(measured_profile, now, path)
    layers = measured_profile.counted_once().layers
    check_room(sum(layer.parameter_bytes + layer.buffer_bytes for layer in layers), measured_profile.model_path)
    chosen = on_devices_of(wanted, measured_profile.machine, mapped=False)
    predicted = predict(measured_profile, chosen, measured_profile.machine)
    asked = _asked(store, plan, wanted, path)
    curves = Curves(tensorboard, chosen.batch) if tensorboard is not None else None
    folder = store.new_run(chosen)
    extent = f"{epochs} epochs" if epochs else f"{steps or STEPS} steps"
    output.progress.print(f"running {chosen}: {len(chosen.devices)} processes, {extent} …")
    try:
        measured = execute(
            measured_profile.model_path,
            chosen,
            device=kind,
            steps=0 if epochs else steps or STEPS,
            epochs=epochs or 0,
            seed=seed or 0,
            folder=folder,
            capacity_bytes=predicted.capacity_bytes,
            expected_step_s=predicted.step_s,
            evaluate_every=evaluate_every,
            watches=(Progress(predicted),) if curves is None else (Progress(predicted), curves),
            workers=measured_profile.loading.workers if measured_profile.loading else 0,
            checkpoint_every=checkpoint_every,
            max_restarts=max_restarts,
            resume=earlier.folder if earlier is not None else None,
            say=lambda text: output.progress.print(f"note: {text}", markup=False, soft_wrap=True),
        )
    except (PlanError, KeyboardInterrupt):
        kept = partial(chosen, folder, predicted.capacity_bytes)
        if kept is not None:
            store.save_run(
                folder, Run(profile=str(path), predicted=predicted, measured=kept, partial=True, asked=asked)
            )
            output.progress.print(f"kept {len(kept.losses)} finished steps in {folder}")
        raise
    finally:
        if curves is not None:
            curves.close()
            if curves.lost:
                output.progress.print(f"the curves in {tensorboard} are not whole: {curves.lost}")
    evaluates = forward_only(chosen)
    if measured.evaluations and evaluates is not None:
        evaluating = predict(measured_profile, evaluates, measured_profile.machine)
        predicted = msgspec.structs.replace(predicted, evaluation_rate=evaluating.throughput)
    result = Run(profile=str(path), predicted=predicted, measured=measured, partial=measured.stopped, asked=asked)
    store.save_run(folder, result)
    comparison = compared(result, measured_profile)
    page = write_page(store, folder, result, measured_profile, folder / "report.html")
    data = {**as_data(result, comparison), "report": str(page), "weights": str(folder / "weights.pt")}
    if measured.stopped:
        output.progress.print(f"kept {len(measured.losses)} finished steps in {folder}")
        failed: PlanError | None = _stopped(measured, data)
    else:
        failed = _beyond(comparison, check, data) if check is not None else None
    if json and failed is None:
        output.document("run", data)
    elif not json:
        show(result, comparison)
        output.results.print(f"weights {folder / 'weights.pt'} (a state dict of the unsplit model){_also(folder)}")
        output.results.print(f"report {page}: open it in a browser")
    if failed is not None:
        raise failed


def _check_goes_together(rehearsal: bool, rehearsing: dict[str, bool], training: dict[str, object]) -> None:
    """Raise `PlanError` (exit 2) for an option of a rehearsal without one, or of a training in one."""
    if rehearsal:
        wrong = next((name for name, given in training.items() if given is not None), None)
        why, fix = "a rehearsal waits instead of computing: nothing is trained", f"leave out {wrong}"
    else:
        wrong = next((name for name, given in rehearsing.items() if given), None)
        why, fix = "it says how a rehearsal waits and sends", "plan run best --rehearse"
    if wrong is not None:
        raise PlanError(what=f"{wrong} has no meaning here", where=wrong, why=why, fix=fix)


def _also(folder: Path) -> str:
    """The other forms in which the weights were written."""
    found = [name for name in ("weights.safetensors", "pretrained") if (folder / name).exists()]
    return f", also {' and '.join(found)}" if found else ""


def _stopped(measured: Outcome, data: dict[str, Any]) -> PlanError:
    """The end of a run that a person has asked to end; it carries the run's figures."""
    return PlanError(
        what=f"interrupted after {len(measured.losses)} of {measured.asked_steps} steps",
        where="plan run",
        why="Ctrl-C, or a signal that asks for the end",
        fix=f"start the command again, with --resume last where it has checkpoints; {data['weights']} has what was "
        "trained",
        code=INTERRUPTED,
        details=data,
    )


def _check_whole_steps(plan: Plan, checkpoint_every: int) -> None:
    """Raise `PlanError` (exit 2) where checkpoints are asked for between steps that overlap."""
    if checkpoint_every and schedules.get(plan.schedule).asynchronous:
        raise PlanError(
            what="a run without flush has no checkpoints",
            where=f"--checkpoint-every {checkpoint_every}, plan {plan}",
            why="behind each of its steps micro-batches of the next are under way, with older weights",
            fix="--checkpoint-every 0; the weights behind the last step are saved, also after Ctrl-C",
        )


def _beyond(comparison: Comparison, check: float, data: dict[str, Any]) -> PlanError | None:
    """The error of a step time that is off by more than `check` per cent; it carries the run's figures."""
    off = abs(comparison.total.relative)
    if off <= check / 100:
        return None
    return PlanError(
        what=f"the step time is predicted {percent(off)} off",
        where=str(data["plan"]),
        why=f"--check allows {check:g} %",
        fix="look at the replay and cost errors for the cause, or profile again",
        code=TOLERANCE,
        details=data,
    )


def _asked(store: Store, reference: str, plan: Plan, path: Path) -> str:
    """The commands that run the same again: best by its name, behind the simulation that it comes from.

    A file is run as it is: the page says its name, and what is in it.
    """
    command = again(LINE.get(), store.name_of(path), plan=str(plan) if reference == "best" else "")
    simulated = "" if is_file(reference) else store.load_ranking().asked
    return f"{simulated} && {command}" if simulated else command


def _simulated_with(store: Store, reference: str) -> str | None:
    """The profile that the last simulation used, for the plans that come from it."""
    return None if is_file(reference) else store.load_ranking().profile


def _check_meant_for_this_machine(store: Store) -> None:
    """Raise `PlanError` (exit 4) where the last simulation was for other hardware than its profile's."""
    ranking = store.load_ranking()
    path = store.profile_path(ranking.profile)
    profile = store.load_profile(path)
    if is_table(path) or profile.estimated or ranking.cluster == profile.machine:
        return  # the first two are refused with more to say
    raise PlanError(
        what="the last simulation was for other hardware",
        where=f"cluster '{ranking.cluster.name}'",
        why="its best plan says nothing about this machine",
        fix=f"plan simulate --k {ranking.k} --m {ranking.m}, then plan run best; or plan run {ranking.best.plan}",
        code=ARTEFACT,
    )


def _check_has_model(path: Path) -> None:
    """Raise `PlanError` (exit 4) for a shipped profile: there is nothing to run."""
    if is_table(path):
        raise PlanError(
            what="a plan of a shipped profile cannot be run",
            where=f"profile '{path.stem}'",
            why="a shipped profile has no model file: it was transcribed from somebody else's measurements",
            fix="plan run best --rehearse   (waits instead of computing), or plan profile model.py   (profiles a model "
            "of your own; then plan simulate and plan run)",
            code=ARTEFACT,
        )
