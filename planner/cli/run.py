"""`plan run`: execute a plan for real, and hold the prediction against it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from planner.basis.errors import ARTEFACT, TOLERANCE, PlanError
from planner.basis.units import percent
from planner.cli import output
from planner.cli.comparison import as_data, compared, show
from planner.cli.line import LINE, again
from planner.cli.opened import is_file, of_plan, on_devices_of, require_same
from planner.cli.options import JsonOption
from planner.cli.report import write_page
from planner.simulate.predict import simulate as predict
from planner.store import Run, Store, is_table
from planner.values.outcome import Comparison
from planner.values.plan import Plan

SEEDS = 2**31
"""Seeds below this one can be counted up for every step and given to torch, numpy and random."""


def run(
    plan: Annotated[
        str, typer.Argument(help="best, a plan of the last simulation, or the path of a plan file.")
    ] = "best",
    steps: Annotated[int, typer.Option(help="Training steps to measure.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    profile: Annotated[
        str | None, typer.Option(help="A profile's path or name. Default: the one that was simulated.")
    ] = None,
    check: Annotated[
        float | None, typer.Option(help="Fail (exit 7) when the step time is off by more than so many per cent.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run a plan with real processes, record every action, and compare it with the prediction."""
    if steps < 1:
        raise PlanError(what="--steps must be positive", where="--steps", why=f"it is {steps}", fix="--steps 20")
    if not 0 <= seed < SEEDS:
        raise PlanError(what="--seed must be a number from 0 on", where="--seed", why=f"it is {seed}", fix="--seed 0")
    from executor.abilities import able
    from profiles import shipped

    store = Store(catalogue=shipped)
    store.check_writable()
    if plan == "best":
        _check_meant_for_this_machine(store)
    wanted = store.plan(plan, able)
    _check_runnable(wanted)
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
    from executor.run import partial
    from executor.run import run as execute
    from profiles.measure import key_of

    kind = "cuda" if not measured_profile.machine.elastic else "cpu"
    of = measured_profile
    now = key_of(of.model_path, kind, of.sequence, of.sources, of.key.dtype)
    require_same(measured_profile, now, path)
    chosen = on_devices_of(wanted, measured_profile.machine)
    predicted = predict(measured_profile, chosen, measured_profile.machine)
    asked = _asked(store, plan, wanted, path)
    folder = store.new_run(chosen)
    output.progress.print(f"running {chosen}: {len(chosen.devices)} processes, {steps} steps …")
    try:
        measured = execute(
            measured_profile.model_path,
            chosen,
            device=kind,
            steps=steps,
            seed=seed,
            folder=folder,
            capacity_bytes=predicted.capacity_bytes,
            expected_step_s=predicted.step_s,
        )
    except (PlanError, KeyboardInterrupt):
        kept = partial(chosen, folder, predicted.capacity_bytes)
        if kept is not None:
            store.save_run(
                folder, Run(profile=str(path), predicted=predicted, measured=kept, partial=True, asked=asked)
            )
            output.progress.print(f"kept {len(kept.steps)} finished steps in {folder}")
        raise
    result = Run(profile=str(path), predicted=predicted, measured=measured, asked=asked)
    store.save_run(folder, result)
    comparison = compared(result, measured_profile)
    page = write_page(store, folder, result, measured_profile, folder / "report.html")
    data = {**as_data(result, comparison), "report": str(page), "weights": str(folder / "weights.pt")}
    failed = _beyond(comparison, check, data) if check is not None else None
    if json and failed is None:
        output.document("run", data)
    elif not json:
        show(result, comparison)
        output.results.print(f"weights {folder / 'weights.pt'} (a state dict of the unsplit model)")
        output.results.print(f"report {page}: open it in a browser")
    if failed is not None:
        raise failed


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


def _check_runnable(plan: Plan) -> None:
    """Raise `PlanError` (exit 2) for a plan that can only be simulated so far."""
    from executor.abilities import missing

    reasons = missing(plan)
    if reasons:
        k = len(plan.device_names)
        raise PlanError(
            what=f"{plan} cannot be run yet, only simulated",
            where=f"plan {plan}",
            why=f"the executor does not know: {', '.join(reasons)}",
            fix=f"plan simulate --k {k} --m {plan.microbatches} --strategy 1f1b, then plan run best; or plan report "
            "--simulated",
        )


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
            fix="plan profile model.py   (profiles a model of your own; then plan simulate and plan run)",
            code=ARTEFACT,
        )
