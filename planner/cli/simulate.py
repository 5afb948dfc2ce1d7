"""`plan simulate`: all strategies for K devices and M micro-batches, ranked."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from planner import cluster as clusters
from planner import strategies
from planner.cli import output
from planner.cli.draw import ascii_timeline
from planner.cli.search import run
from planner.errors import ARTEFACT, PlanError
from planner.injection import inject
from planner.limits import limits
from planner.lowering import asynchronous
from planner.outcome import Outcome
from planner.plan import unrunnable
from planner.profile import Profile, ProfileKey
from planner.ranking import Ranking, check, rank
from planner.simulate import SAMPLES, SEED, Failure
from planner.staleness import staleness
from planner.store import Store
from planner.units import percent, rate, seconds, size

SHOWN = 15
"""Plans in the table."""
QUANTILES = (5, 25, 50, 75, 95)


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
            json=json,
        )
        return
    m = 8 if m is None else m
    from profiles import shipped

    store = Store(catalogue=shipped)
    path = store.profile_path(profile)
    measured = store.load_profile(path)
    if profile is None:
        check_fresh(measured, path)
    hardware = clusters.find(cluster, shipped.clusters()) if cluster else measured.machine
    faulty = hardware
    failures: tuple[Failure, ...] = ()
    if slow_device or slow_link or fail:
        check(measured, k=k, m=m, batch=measured.batch if batch is None else batch)
        whole = hardware.take(k) if hardware.elastic else hardware
        faulty, failures = inject(whole, slow_devices=slow_device or (), slow_links=slow_link or (), failing=fail or ())
    chosen = [strategies.get(name) for name in strategy] if strategy else None
    ranking = rank(
        measured,
        faulty,
        k=k,
        m=m,
        batch=measured.batch if batch is None else batch,
        name=path.stem,
        strategies=chosen,
        samples=samples,
        seed=seed,
        stale=stale,
        failures=failures,
    )
    store.save_ranking(ranking)
    best = ranking.best
    if json:
        output.document("simulate", {**as_data(ranking), "estimated": measured.estimated})
    else:
        _print(ranking, best, measured, shown=len(ranking.outcomes) if every else SHOWN)


def check_fresh(measured: Profile, path: Path) -> None:
    """Raise `PlanError` (exit 4) when the model file or torch have changed since the profile, saying what."""
    source = Path(measured.model_path.partition(":")[0])
    current: dict[str, Any] = {"torch": importlib.metadata.version("torch")}
    if source.is_file():
        import hashlib

        current["source_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    key = measured.key
    fields = {f: current.get(f, getattr(key, f)) for f in key.__struct_fields__}
    require_same(measured, ProfileKey(**fields), path)


def require_same(measured: Profile, now: ProfileKey, path: Path) -> None:
    """Raise `PlanError` (exit 4) with every field in which a profile's key differs from what it would be now."""
    changed = measured.key.differences(now)
    if changed:
        again = f" --estimate {measured.key.device.partition(' ')[0]}" if measured.estimated else ""
        raise PlanError(
            what="the profile is stale",
            where=str(path),
            why="changed since it was measured: " + "; ".join(changed),
            fix=f"plan profile {measured.model_path}" + again,
            code=ARTEFACT,
        )


def as_data(ranking: Ranking) -> dict[str, Any]:
    """The ranking as JSON data, with units in the names."""
    return {
        "k": ranking.k,
        "m": ranking.m,
        "batch_samples": ranking.batch,
        "cluster": ranking.cluster.name,
        "profile": ranking.profile,
        "best": str(ranking.best.plan),
        "limits": [limit.text for limit in limits(ranking.best, ranking.cluster)],
        "plans": [figures(outcome) for outcome in ranking.outcomes],
        "rejected": [{"strategy": r.strategy, "why": r.why} for r in ranking.rejected],
    }


def figures(outcome: Outcome) -> dict[str, Any]:
    """An outcome's figures, with units in the names."""
    low, high = outcome.throughput_interval
    return {
        "plan": str(outcome.plan),
        "source": outcome.source,
        "throughput_samples_per_s": outcome.throughput,
        "throughput_low_samples_per_s": low,
        "throughput_high_samples_per_s": high,
        "step_s": outcome.step_s,
        "step_low_s": outcome.interval_s[0],
        "step_high_s": outcome.interval_s[1],
        "step_samples_s": {f"p{q}": step for q, step in percentiles(outcome).items()},
        "runnable": unrunnable(outcome.plan) is None,
        "stale_gradients": asynchronous(outcome.plan),
        "staleness_updates": staleness(outcome) if asynchronous(outcome.plan) else 0.0,
        "bubble_fraction": outcome.bubble,
        "span_bubble_s": outcome.trace.span_bubble_s,
        "peak_bytes": outcome.peak_bytes,
        "peak_bytes_per_device": [point.total for point in outcome.peak],
        "peak_action_per_device": list(outcome.peak_actions),
        "capacity_bytes_per_device": list(outcome.capacity_bytes),
        "fits": outcome.fits,
    }


def percentiles(outcome: Outcome) -> dict[int, float]:
    """Percentiles of the steps that were drawn, in seconds."""
    drawn = outcome.samples_s
    return {q: drawn[len(drawn) * q // 100] for q in QUANTILES} if drawn else {}


def _print(ranking: Ranking, best: Outcome, measured: Profile, *, shown: int) -> None:
    from rich.table import Table

    where = ranking.cluster
    cores = where.hosts[0].cores
    title = (
        f"{measured.key.model}, K={ranking.k} devices, M={ranking.m} micro-batches, {ranking.batch} samples per step, "
    )
    title += f"on {where.name}" + (f" ({ranking.k} processes share {cores} cores)" if where.elastic else "")
    title = f"estimated: {title}" if measured.estimated else title
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name, justify in (
        ("plan", "left"),
        ("samples/s", "right"),
        ("10 to 90 %", "right"),
        ("step", "right"),
        ("bubble", "right"),
        ("memory", "right"),
        ("fits", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for outcome in ranking.outcomes[:shown]:
        low, high = outcome.throughput_interval
        table.add_row(
            str(outcome.plan),
            rate(outcome.throughput).removesuffix(" samples/s"),
            f"{rate(low).removesuffix(' samples/s')}–{rate(high).removesuffix(' samples/s')}",
            seconds(outcome.step_s),
            percent(outcome.bubble),
            size(outcome.peak_bytes),
            "yes" if outcome.fits else "no",
            style="bold" if outcome is best else None,
        )
    output.results.print(table)
    if len(ranking.outcomes) > shown:
        output.results.print(f"and {len(ranking.outcomes) - shown} more plans (--all shows them)")
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
    output.results.print(f"next: {_next(ranking, best)}")


def _next(ranking: Ranking, best: Outcome) -> str:
    """The one next command, and what it will do where the best plan cannot be run yet."""
    missing = unrunnable(best.plan)
    if missing is None:
        return "plan run best"
    runnable = ranking.runnable
    if runnable is best:
        return f"plan report --simulated   ({missing}: simulated only, so far)"
    return f"plan run best   (runs {runnable.plan}; {missing}: simulated only, so far)"
