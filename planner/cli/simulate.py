"""`plan simulate`: all strategies for K devices and M micro-batches, ranked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.basis.errors import PlanError
from planner.basis.units import percent, rate, seconds
from planner.cli import output, runnable, tables
from planner.cli.draw import ascii_timeline
from planner.cli.figures import figures, percentiles
from planner.cli.opened import opened
from planner.cli.search import run
from planner.cli.tables import FILTER_HELP, SORT_HELP
from planner.placement import strategies
from planner.placement.devices import choose
from planner.search.ranking import Ranking, check, rank
from planner.simulate.contention import Failure
from planner.simulate.injection import inject
from planner.simulate.limits import limits
from planner.simulate.predict import SAMPLES, SEED
from planner.simulate.staleness import staleness
from planner.values.outcome import Outcome
from planner.values.profile import Profile

SHOWN = 15
"""Plans in the table."""


def simulate(
    k: Annotated[int | None, typer.Option("--k", help="Number of devices (partitions). Default: search all.")] = None,
    m: Annotated[int | None, typer.Option("--m", help="Number of micro-batches per step. Default: 8.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step. Default: the model file's batch_size.")] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Only this strategy; may be repeated. Default: all of them.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="A profile's path or name, or a shipped one, as resnet50. Default: the last one.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Other hardware than the profiled: a TOML file, or a shipped name, as dgx-a100.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Steps drawn from the measured spread, per plan.", min=1)] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Seed of these draws.")] = SEED,
    stale: Annotated[bool, typer.Option(help="Let plans with stale gradients be the best.")] = False,
    slow_device: Annotated[list[str] | None, typer.Option(help="A device that is slower: d3=2 is twice.")] = None,
    slow_link: Annotated[list[str] | None, typer.Option(help="A link that is slower: d0:d1=4.")] = None,
    fail: Annotated[list[str] | None, typer.Option(help="A device that stops: d2@1.5+3 is at 1.5 s, for 3 s.")] = None,
    sort: Annotated[str | None, typer.Option(help=SORT_HELP, metavar="COLUMN")] = None,
    words: Annotated[list[str] | None, typer.Option("--filter", help=FILTER_HELP, metavar="TEXT")] = None,
    every: Annotated[bool, typer.Option("--all", help="Show all plans, not only the best.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict throughput and memory of every strategy at K devices and M micro-batches, and rank them.

    Without --k the whole space is searched, as by plan search.
    """
    if k is None:
        axes = {"ms": (m,) if m is not None else (), "strategies": tuple(strategy or ())}
        for name in strategy or ():
            strategies.get(name)
        if slow_device or slow_link or fail:
            raise PlanError(
                what="faults are simulated for one K, not searched with",
                where="--slow-device, --slow-link and --fail",
                why="which device or link is meant depends on how many there are",
                fix="give the number of devices, for example --k 4",
            )
        run(
            profile=profile,
            cluster=cluster,
            batch=batch,
            axes=axes,
            stale=stale,
            samples=samples,
            seed=seed,
            sort=sort,
            words=words or (),
            json=json,
        )
        return
    from executor.abilities import able

    m = 8 if m is None else m
    store, path, measured, hardware = opened(profile, cluster)
    batch = measured.batch if batch is None else batch
    faulty = hardware
    failures: tuple[Failure, ...] = ()
    if slow_device or slow_link or fail:
        check(measured, k=k, m=m, batch=batch)
        whole = hardware.only([device.name for device in choose(hardware, k)])  # the plan does not know of them
        faulty, failures = inject(whole, slow_devices=slow_device or (), slow_links=slow_link or (), failing=fail or ())
    chosen = [strategies.get(name) for name in strategy] if strategy else None
    ranking = rank(
        measured,
        faulty,
        k=k,
        m=m,
        batch=batch,
        name=store.name_of(path),
        strategies=chosen,
        samples=samples,
        seed=seed,
        stale=stale,
        failures=failures,
        able=able,
    )
    store.save_ranking(ranking)
    rows = tables.arranged(ranking.outcomes, sort, words or ())
    if json:
        output.document("simulate", as_data(ranking, rows, measured, path))
    else:
        _print(ranking, rows, measured, path, shown=len(rows) if every else SHOWN)


def as_data(ranking: Ranking, rows: Sequence[Outcome], measured: Profile, path: Path) -> dict[str, Any]:
    """The ranking as JSON data, with units in the names."""
    return {
        "k": ranking.k,
        "m": ranking.m,
        "batch_samples": ranking.batch,
        "cluster": ranking.cluster.name,
        "profile": ranking.profile,
        "estimated": measured.estimated,
        **runnable.as_data(ranking, measured, path),
        "limits": [limit.text for limit in limits(ranking.best, ranking.cluster)],
        "plans": [figures(outcome) for outcome in rows],
        "rejected": [{"strategy": r.strategy, "why": r.why} for r in ranking.rejected],
    }


def _print(ranking: Ranking, rows: Sequence[Outcome], measured: Profile, path: Path, *, shown: int) -> None:
    best = ranking.best
    where = ranking.cluster
    cores = where.hosts[0].cores
    title = (
        f"{measured.key.model}, K={ranking.k} devices, M={ranking.m} micro-batches, {ranking.batch} samples per step, "
    )
    title += f"on {where.name}" + (f" ({ranking.k} processes share {cores} cores)" if where.elastic else "")
    title = f"estimated: {title}" if measured.estimated else title
    tables.show(rows[:shown], title=title, best=best)
    if len(rows) > shown:
        output.results.print(f"and {len(rows) - shown} more plans (--all shows them)")
    for rejected in ranking.rejected:
        output.results.print(f"not possible: {rejected.strategy}: {rejected.why}", markup=False)
    stale = next((o for o in ranking.outcomes if o.fits), best)
    if stale is not best:
        gain = percent(stale.throughput / best.throughput - 1)
        old = f"gradients {staleness(stale):.1f} updates old on average"
        output.results.print(f"{stale.plan} would be {gain} faster with {old} (--stale lets it be the best)")
    output.results.print(f"\nbest: {best.plan}, {rate(best.throughput)}")
    if len(best.samples_s) > SAMPLES:
        shares = "  ".join(f"{q} % {seconds(step)}" for q, step in percentiles(best).items())
        output.results.print(f"step over {len(best.samples_s)} draws: {shares}")
    print(ascii_timeline(best.trace, width=min(90, output.results.width)))
    for limit in limits(best, where):
        output.results.print(f"limited by {limit.text}", markup=False)
    note, command = runnable.words(ranking, measured, path)
    if note:
        output.results.print(note, markup=False)
    output.results.print(f"next: {command}", markup=False)
