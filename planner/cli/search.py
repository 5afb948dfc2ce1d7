"""`plan search`: the best plan of the whole space, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from planner import __version__
from planner.basis.errors import NOTHING_FITS, USAGE, PlanError
from planner.basis.units import percent, seconds, size
from planner.cli import output, runnable, tables
from planner.cli.draw import ascii_timeline
from planner.cli.figures import figures
from planner.cli.opened import opened
from planner.cli.tables import FILTER_HELP, SORT_HELP
from planner.orders import synchronisation as synchronisations
from planner.placement import savings, strategies
from planner.search.cost import Terms
from planner.search.explain import cheapest_change, explain
from planner.search.ranking import Ranking, check
from planner.search.search import Answer, Found, Progress, Search, State
from planner.search.space import Space, space
from planner.simulate.predict import SAMPLES, SEED, simulate
from planner.store import Searched, Store
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.profile import Profile

SHOWN = 8
"""Leaders that are simulated in full and shown."""


def search(
    k: Annotated[list[int] | None, typer.Option("--k", help="Only this number of devices; may be repeated.")] = None,
    m: Annotated[list[int] | None, typer.Option("--m", help="Only this number of micro-batches.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step. Default: the profile's.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Only this strategy; may be repeated.")] = None,
    saving: Annotated[
        list[str] | None, typer.Option(help="Only with these memory savings: none, or names joined by +.")
    ] = None,
    synchronisation: Annotated[
        list[str] | None, typer.Option(help="How replicas of pipelines agree. Default: all-reduce and zero-1.")
    ] = None,
    objective: Annotated[str, typer.Option(help="throughput, epoch, memory or cost.")] = "throughput",
    epoch: Annotated[int, typer.Option(help="Samples per epoch, for the objective epoch.", min=0)] = 0,
    stale: Annotated[bool, typer.Option(help="Let plans with stale gradients compete.")] = False,
    profile: Annotated[str | None, typer.Option(help="A profile's path or name. Default: the last one.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Other hardware: a TOML file, or a shipped name.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds to search at most.", min=0.1)] = float("inf"),
    sort: Annotated[str | None, typer.Option(help=SORT_HELP, metavar="COLUMN")] = None,
    words: Annotated[list[str] | None, typer.Option("--filter", help=FILTER_HELP, metavar="TEXT")] = None,
    restart: Annotated[bool, typer.Option(help="Forget what an earlier, interrupted search has evaluated.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Rank every strategy, K, M, replicas and saving for a profile and a cluster, and explain the best plan.

    Ctrl-C keeps what was found; the same command goes on where it was.
    """
    run(
        profile=profile,
        cluster=cluster,
        batch=batch,
        axes={
            "ks": tuple(k or ()),
            "ms": tuple(m or ()),
            "strategies": tuple(strategies.get(name).name for name in strategy or ()),
            "savings": tuple(_savings(text) for text in saving or ()),
            "synchronisations": tuple(synchronisations.get(name).name for name in synchronisation or ()),
        },
        objective=objective,
        epoch=epoch,
        stale=stale,
        budget=budget,
        restart=restart,
        sort=sort,
        words=words or (),
        json=json,
    )


def run(
    *,
    profile: str | None,
    cluster: str | None,
    batch: int | None,
    axes: dict[str, tuple[Any, ...]],
    objective: str = "throughput",
    epoch: int = 0,
    stale: bool = False,
    budget: float = float("inf"),
    restart: bool = False,
    samples: int = SAMPLES,
    seed: int = SEED,
    sort: str | None = None,
    words: Sequence[str] = (),
    json: bool = False,
) -> None:
    """Search, save, and print; what `plan search` and `plan simulate` without K do."""
    store, path, measured, hardware = opened(profile, cluster)
    store.check_writable()
    batch = measured.batch if batch is None else batch
    for number in axes.get("ks") or (1,):
        check(measured, k=min(number, len(measured.layers)) if number > 0 else number, m=1, batch=batch)
        hardware.take(number)
    for number in axes.get("ms") or ():
        check(measured, k=1, m=number, batch=batch)
    of = space(measured, hardware, batch, **axes)
    from executor.abilities import able

    searching = _begin(store, measured, hardware, batch, of, objective, epoch, stale, restart)
    answer = _searched(store, searching, str(path), budget)
    if not answer.leaders:
        raise nothing_fits(searching, answer)
    outcomes = outlined(searching, answer, samples=samples, seed=seed)
    if cluster is None and not measured.estimated:
        outcomes += _runnable(searching, outcomes, budget, samples, seed)
    best = outcomes[0]
    ranking = Ranking(
        k=len(best.plan.device_names),
        m=best.plan.microbatches,
        batch=batch,
        profile=store.name_of(path),
        cluster=hardware,
        outcomes=tuple(outcomes),
        stale=stale,
        able=tuple(str(outcome.plan) for outcome in outcomes if able(outcome.plan)),
        chosen=str(best.plan),
    )
    store.save_ranking(ranking)
    shown = sorted(outcomes, key=lambda o: searching.score(o.plan, o.step_s, o.peak_bytes))
    rows = tables.arranged(shown, sort, words)
    if json:
        data = as_data(searching, answer, outcomes, rows)
        output.document("search", {**data, **runnable.as_data(ranking, measured, path)})
    else:
        _print(searching, answer, outcomes, rows, ranking, path)


def _begin(
    store: Store,
    profile: Profile,
    cluster: Cluster,
    batch: int,
    of: Space,
    objective: str,
    epoch: int,
    stale: bool,
    restart: bool,
) -> Search:
    """Make a search, with what the same one has evaluated before."""
    from executor.abilities import able

    terms = Terms(epoch or batch)
    question = asked(profile, cluster, batch, of, objective, terms, stale)
    state = State(question=question)
    if not restart and (store.root / "search.json").exists():
        try:
            before = store.load_search()
            if before.question == question:
                state.done = before.done
        except PlanError:
            pass  # a damaged file is searched again, and replaced
    return Search(
        profile,
        cluster,
        batch,
        of,
        objective=objective,
        terms=terms,
        stale=stale,
        state=state,
        able=able,
    )


def asked(profile: Profile, cluster: Cluster, batch: int, of: Space, objective: str, terms: Terms, stale: bool) -> str:
    """Return a digest of all that a search's answer depends on."""
    question = [__version__, profile.key, profile.created, cluster, batch, of, objective, terms, stale]
    return hashlib.sha256(msgspec.json.encode(question)).hexdigest()


def _searched(store: Store, searching: Search, profile: str, budget: float) -> Answer:
    """Run a search with its progress shown; save it however it ends."""
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeRemainingColumn  # isort: skip

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    words = searching.objective.words
    with Bar(*columns, console=output.progress, transient=True) as bar:
        task = bar.add_task("searching", total=None)

        def told(progress: Progress) -> None:
            left = progress.remaining_s * progress.per_second
            best = f"best {progress.best}, {words(progress.score)}" if progress.best else "nothing fits yet"
            bar.update(
                task,
                description=f"{progress.per_second:.0f} plans/s, {best}",
                completed=progress.seen,
                total=progress.seen + left,
            )

        try:
            return searching.run(told, seconds=budget)
        finally:
            store.save_search(
                Searched(
                    question=searching.state.question,
                    profile=profile,
                    cluster=searching.cluster,
                    batch=searching.batch,
                    space=searching.space,
                    objective=searching.objective.name,
                    terms=searching.terms,
                    stale=searching.stale,
                    answer=searching.answer(),
                    done=searching.state.done,
                )
            )


def outlined(searching: Search, answer: Answer, *, samples: int = SAMPLES, seed: int = SEED) -> list[Outcome]:
    """Simulate the leaders in full, best first: contention, spread, memory over time."""
    outcomes = []
    for found in answer.leaders[:SHOWN]:
        plan = searching.plan(found)
        outcomes.append(simulate(searching.profile, plan, searching.cluster, samples=samples, seed=seed))
    return outcomes


def _runnable(searching: Search, outcomes: Sequence[Outcome], budget: float, samples: int, seed: int) -> list[Outcome]:
    """Return the best plan that the executor can run, where the leaders have none: `plan run best` takes it."""
    from executor.abilities import able

    if any(able(outcome.plan) for outcome in outcomes):
        return []
    again = Search(searching.profile, searching.cluster, searching.batch, searching.space, allowed=able)
    found = again.run(seconds=budget).leaders
    plans = map(again.plan, found[:1])
    return [simulate(searching.profile, plan, searching.cluster, samples=samples, seed=seed) for plan in plans]


def nothing_fits(searching: Search, answer: Answer) -> PlanError:
    """The error of a search without an answer: the nearest plans, and the cheapest change that would do."""
    if answer.complete and not answer.nearest:
        why = "; ".join(f"{f.name}: {f.why}" for f in answer.families if f.why) or "there is no candidate"
        return PlanError(
            what="no plan is possible",
            where=f"cluster '{searching.cluster.name}'",
            why=why,
            fix="allow other K, M or strategies",
            code=USAGE,
        )
    change = cheapest_change(searching, answer)
    nearest = "; ".join(f"{f.label} needs {_too_much(f)}" for f in answer.nearest)
    return PlanError(
        what="no plan fits into memory" if answer.complete else "no plan that fits has been found in that time",
        where=f"cluster '{searching.cluster.name}', {answer.evaluated} candidates evaluated of {answer.points}",
        why=nearest or "nothing was evaluated",
        fix=change if answer.complete else "search longer: the same command goes on where it was",
        code=NOTHING_FITS,
        details=[{"plan": f.label, "peak_bytes": f.peak_bytes, "lack_fraction": f.lack - 1} for f in answer.nearest],
    )


def _too_much(found: Found) -> str:
    more = percent(found.lack - 1)
    return (
        f"{more} more memory of the host {found.full}" if found.full else f"{size(found.peak_bytes)}, {more} too much"
    )


def as_data(searching: Search, answer: Answer, outcomes: Sequence[Outcome], rows: Sequence[Outcome]) -> dict[str, Any]:
    """A search as JSON data, with units in the names."""
    return {
        "objective": answer.objective,
        "cluster": searching.cluster.name,
        "batch_samples": answer.batch,
        "complete": answer.complete,
        "candidates": answer.points,
        "evaluated": answer.evaluated,
        "simulated_with_contention": answer.simulated,
        "search_s": answer.seconds,
        "plans_per_s": answer.evaluated / max(1e-9, answer.seconds),
        "best": str(outcomes[0].plan),
        "explanation": explain(searching, answer, outcomes[0], changes=False),
        "plans": [figures(outcome) for outcome in rows],
        "pareto": [
            {"plan": f.label, "step_s": f.step_s, "peak_bytes": f.peak_bytes, "contention_simulated": f.exact}
            for f in answer.front
        ],
        "families": [msgspec.to_builtins(family) for family in answer.families],
        "estimated": searching.profile.estimated,
    }


def _print(
    searching: Search,
    answer: Answer,
    outcomes: Sequence[Outcome],
    rows: Sequence[Outcome],
    ranking: Ranking,
    path: Path,
) -> None:
    title = f"{searching.profile.key.model} on {searching.cluster.name}, {answer.batch} samples per step"
    title = f"estimated: {title}" if searching.profile.estimated else title
    tables.show(rows, title=title, best=outcomes[0], without=("interval", "fits"))
    speed = answer.evaluated / max(1e-9, answer.seconds)
    state = "nothing that was left out can be better" if answer.complete else "stopped; the same command goes on"
    output.results.print(
        f"{answer.evaluated:,} of {answer.points:,} candidates evaluated in {seconds(answer.seconds)} ({speed:.0f} "
        f"plans/s), {answer.simulated} with contention: {state}"
    )
    front = [f"{f.label} ({seconds(f.step_s)}, {size(f.peak_bytes)})" for f in answer.front]
    if len(front) > 1:
        shown = front if len(front) <= 5 else [*front[:2], f"{len(front) - 4} more", *front[-2:]]
        output.results.print(f"time against memory: {'; '.join(shown)}", markup=False)
    for line in _families(answer):
        output.results.print(line, markup=False)
    print(ascii_timeline(outcomes[0].trace, width=min(90, output.results.width)))
    for sentence in explain(searching, answer, outcomes[0], changes=False):
        output.results.print(sentence, markup=False)
    note, _ = runnable.words(ranking, searching.profile, path)
    if note:
        output.results.print(note, markup=False)
    output.results.print("next: plan explain best   (what would change the answer)")


def _families(answer: Answer) -> list[str]:
    """Why strategies are not the answer: those that cannot be, do not fit, or may not compete."""
    lines = []
    for family in answer.families:
        if "+" in family.name or (family.evaluated > family.too_large and not family.why):
            continue
        if family.impossible and not family.evaluated:
            lines.append(f"not possible where it might be better: {family.name}: {family.why}")
        elif family.evaluated and family.evaluated == family.too_large:
            lines.append(f"does not fit: {family.name} ({family.too_large} candidates)")
        elif family.why and not family.impossible:
            lines.append(f"not competing: {family.name}: {family.why}")
    return lines


def _savings(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    names = tuple(text.split("+"))
    for name in names:
        if name not in savings.names():
            from planner.basis.errors import unknown

            raise unknown("saving", name, ("none", *savings.names()), where="--saving", fix="join names by +")
    return names
