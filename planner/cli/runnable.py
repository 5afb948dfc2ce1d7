"""What `plan run best` runs after a simulation, or why it runs nothing: said by all commands in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from planner.basis.errors import PlanError
from planner.search.ranking import Ranking
from planner.store import is_table
from planner.values.plan import Plan
from planner.values.profile import Profile


class RunBest(NamedTuple):
    """The plan that `plan run best` runs, None where it runs none; and why that is not the best plan."""

    plan: Plan | None
    why: str


def run_best(ranking: Ranking, profile: Profile, path: Path) -> RunBest:
    """Return what `plan run best` runs. Raises `PlanError` (exit 3) when no plan fits."""
    from executor.abilities import able, missing

    if is_table(path):
        return RunBest(None, "a shipped profile has no model file")
    if profile.estimated:
        return RunBest(None, "the profile is estimated, nothing was measured here")
    if ranking.cluster != profile.machine:
        return RunBest(None, f"it was simulated for {ranking.cluster.name}, not for the profiled machine")
    reasons = ", ".join(missing(ranking.best.plan))
    found = ranking.runnable(able).plan
    return RunBest(found if able(found) else None, f"the executor does not know: {reasons}" if reasons else "")


def as_data(ranking: Ranking, profile: Profile, path: Path) -> dict[str, Any]:
    """The same as JSON data, beside the best plan."""
    found = run_best(ranking, profile, path)
    return {
        "best": str(ranking.best.plan),
        "run_best": str(found.plan) if found.plan else None,
        "run_best_why_not_best": found.why or None,
    }


def words(ranking: Ranking, profile: Profile, path: Path) -> tuple[str, str]:
    """Return what is said about running the best plan, if anything, and the next command."""
    found = run_best(ranking, profile, path)
    if found.plan is None:
        return f"plan run best runs nothing: {found.why}", "plan show best   (its stages and its schedule)"
    if found.why:
        return f"plan run best runs {found.plan} instead: for {ranking.best.plan}, {found.why}", "plan run best"
    return "", "plan run best"


def check_runnable(plan: Plan) -> None:
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
