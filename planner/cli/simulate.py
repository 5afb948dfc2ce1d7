"""`plan simulate`: all strategies for K devices and M micro-batches, ranked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer

from planner.basis.errors import PlanError
from planner.basis.units import percent, rate, samples_words, seconds
from planner.cli import output, runnable, tables
from planner.cli.complete import plans
from planner.cli.draw import ascii_timeline
from planner.cli.figures import figures, percentiles
from planner.cli.line import LINE, again
from planner.cli.measured import warn_beyond
from planner.cli.opened import Opened, meant, opened
from planner.cli.options import (
    AllOption,
    ChunksOption,
    ClusterOption,
    FilterOption,
    JsonOption,
    MappingOption,
    ProfileOption,
    RecomputeOption,
    ReplicasOption,
    SavingOption,
    SortOption,
    StrategyOption,
    SynchronisationOption,
    TensorOption,
    axes,
)
from planner.cli.progress import shown
from planner.cli.searching import Question, run
from planner.costs.host_room import check_hosts
from planner.placement import strategies
from planner.placement.devices import choose
from planner.placement.mapping import MAPPINGS
from planner.search.choice import TIE
from planner.search.ranking import DEFAULT_SAVINGS, ENOUGH_S, Ranking, Shape, check, rank
from planner.simulate.contention import Failure
from planner.simulate.injection import inject
from planner.simulate.limits import limits
from planner.simulate.predict import SAMPLES, SEED
from planner.simulate.predict import simulate as predict
from planner.simulate.staleness import staleness
from planner.store import Store
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import asynchronous
from planner.values.profile import Profile

SHOWN = 15
"""Plans in the table."""


def simulate(
    plan: Annotated[
        str | None,
        typer.Argument(help="A plan file, or a plan of the last simulation: only its figures.", autocompletion=plans),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Number of devices (partitions). Default: search all.")] = None,
    m: Annotated[int | None, typer.Option("--m", help="Number of micro-batches per step. Default: 8.")] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step. Default: the model file's batch_size.")] = None,
    sequence: Annotated[
        int | None, typer.Option(help="Tokens per sample, of which there is a profile. Default: the profile's.", min=1)
    ] = None,
    strategy: StrategyOption = None,
    replicas: ReplicasOption = None,
    tensor: TensorOption = None,
    chunks: ChunksOption = None,
    synchronisation: SynchronisationOption = None,
    mapping: MappingOption = None,
    recompute: RecomputeOption = None,
    saving: SavingOption = None,
    profile: ProfileOption = None,
    cluster: ClusterOption = None,
    samples: Annotated[int, typer.Option(help="Steps drawn from the measured spread, per plan.", min=1)] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Seed of these draws.", min=0)] = SEED,
    stale: Annotated[bool, typer.Option(help="Let plans with stale gradients be the best.")] = False,
    slow_device: Annotated[list[str] | None, typer.Option(help="A device that is slower: d3=2 is twice.")] = None,
    slow_link: Annotated[list[str] | None, typer.Option(help="A link that is slower: d0:d1=4.")] = None,
    fail: Annotated[list[str] | None, typer.Option(help="A device that stops: d2@1.5+3 is at 1.5 s, for 3 s.")] = None,
    sort: SortOption = None,
    words: FilterOption = None,
    every: AllOption = False,
    json: JsonOption = False,
) -> None:
    """Predict throughput and memory of every strategy at K devices and M micro-batches, and rank them.

    Without --k the whole space is searched, as by plan search. A plan file is simulated as it is.
    """
    asked = axes(
        m=None if m is None else [m],
        strategy=strategy,
        replicas=replicas,
        tensor=tensor,
        chunks=chunks,
        synchronisation=synchronisation,
        mapping=mapping,
        saving=saving,
        recompute=recompute,
    )
    tables.check_column(sort)
    faults = Faults(tuple(slow_device or ()), tuple(slow_link or ()), tuple(fail or ()))
    draws = Draws(samples, seed)
    if plan is not None:
        if k is not None or batch is not None or sequence is not None or any(asked.values()):
            raise PlanError(
                what="a plan says everything itself",
                where=f"plan {plan}",
                why="K, M, batch, sequence, strategies and savings are its own",
                fix=f"plan simulate {plan}",
            )
        simulated = _one(plan, profile, cluster, faults, draws)
    elif k is None:
        if any(faults):
            raise PlanError(
                what="faults are simulated for one K, not searched with",
                where="--slow-device, --slow-link and --fail",
                why="which device or link is meant depends on how many there are",
                fix="give the number of devices, for example --k 4",
            )
        of = Question(
            profile=profile,
            cluster=cluster,
            batches=() if batch is None else (batch,),
            sequences=() if sequence is None else (sequence,),
            axes=asked,
            stale=stale,
            samples=samples,
            seed=seed,
        )
        run(of, sort=sort, words=words or (), every=every, json=json)
        return
    else:
        simulated = _ranked(
            opened(profile, cluster, () if sequence is None else (sequence,)),
            faults,
            draws,
            asked,
            k,
            8 if m is None else m,
            batch,
            stale,
        )
    store, path, measured, ranking = simulated
    store.save_ranking(msgspec.structs.replace(ranking, asked=again(LINE.get(), ranking.profile)))
    rows = tables.arranged(ranking.outcomes, sort, words or ())
    warn_beyond(measured, [outcome.plan.samples for outcome in ranking.outcomes])
    if json:
        output.document("simulate", as_data(ranking, rows, measured, path))
    else:
        _print(ranking, rows, measured, path, shown=len(rows) if every else SHOWN)


class Draws(NamedTuple):
    """How many steps are drawn per plan, and from which seed."""

    samples: int
    seed: int


class Faults(NamedTuple):
    """What is said to go wrong: slower devices, slower links, devices that stop."""

    slow_devices: tuple[str, ...]
    slow_links: tuple[str, ...]
    failing: tuple[str, ...]

    def on(self, cluster: Cluster, names: Sequence[str]) -> tuple[Cluster, tuple[Failure, ...]]:
        """Return the cluster of those devices with its slower parts, and the failures; plans do not know of them."""
        if not any(self):
            return cluster, ()
        return inject(
            cluster.only(names), slow_devices=self.slow_devices, slow_links=self.slow_links, failing=self.failing
        )


Simulated = tuple[Store, Path, Profile, Ranking]


def _one(reference: str, profile: str | None, cluster: str | None, faults: Faults, draws: Draws) -> Simulated:
    """Simulate one plan: a ranking with nothing else in it."""
    from profiles import shipped

    store = Store(catalogue=shipped)
    question = meant(reference, profile, cluster)
    plan, measured = question.plan, question.profile
    check_hosts(measured, question.cluster, [plan.batch])
    faulty, failures = faults.on(question.cluster, plan.device_names)
    outcome = predict(measured, plan, faulty, samples=draws.samples, seed=draws.seed, failures=failures)
    ranking = Ranking(
        k=len(plan.device_names),
        m=plan.microbatches,
        batch=plan.batch,
        profile=store.name_of(question.path),
        cluster=faulty,
        outcomes=(outcome,),
        chosen=str(plan),
    )
    return store, question.path, measured, ranking


def _ranked(
    where: Opened,
    faults: Faults,
    draws: Draws,
    asked: dict[str, tuple[Any, ...]],
    k: int,
    m: int,
    batch: int | None,
    stale: bool,
) -> Simulated:
    """Simulate all strategies that are asked for, in all shapes that are asked for."""
    from executor.abilities import able

    store, path, measured, hardware, _ = where
    batch = measured.batch if batch is None else batch
    check(measured, k=k, m=m, batch=batch)
    hardware.take(k)
    check_hosts(measured, hardware, [batch])
    faulty, failures = faults.on(hardware, [device.name for device in choose(hardware, k)] if any(faults) else ())
    shapes = itertools.product(
        asked["replicas"] or (1,),
        asked["tensors"] or (1,),
        asked["chunks"] or (0,),
        asked["synchronisations"] or ("",),
        asked["mappings"] or ("",),
    )
    with _progress() as told:
        ranking = rank(
            measured,
            faulty,
            k=k,
            m=m,
            batch=batch,
            name=store.name_of(path),
            strategies=[strategies.get(name) for name in asked["strategies"]],
            shapes=[Shape(*shape) for shape in shapes],
            savings=asked["savings"] or DEFAULT_SAVINGS,
            samples=draws.samples,
            seed=draws.seed,
            stale=stale,
            failures=failures,
            able=able,
            progress=told,
        )
    return store, path, measured, ranking


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show on stderr which of how many strategies is simulated."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    with shown(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task("simulating", total=None)

        def told(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        yield told


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
        "rejected": [msgspec.to_builtins(rejected) for rejected in ranking.rejected],
        "left_out": list(ranking.left_out),
    }


def _print(ranking: Ranking, rows: Sequence[Outcome], measured: Profile, path: Path, *, shown: int) -> None:
    best = ranking.best
    where = ranking.cluster
    cores = where.hosts[0].cores
    title = f"{measured.key.model}, K={ranking.k} devices, M={ranking.m} micro-batches, "
    title += f"{samples_words([ranking.batch], [ranking.best.plan.sequence])} per step, on {where.name}" + (
        f" ({ranking.k} processes share {cores} cores)" if where.elastic else ""
    )
    title = f"estimated: {title}" if measured.estimated else title
    tables.show(rows[:shown], title=title, best=best)
    if len(rows) > shown:
        output.results.print(f"and {len(rows) - shown} more plans (--all shows them)")
    if any(o.plan.mark in MAPPINGS for o in rows):
        output.results.print("-stages: the replicas of a stage stand side by side (--mapping pipelines: its stages do)")
    if ranking.left_out:
        some, count = ", ".join(ranking.left_out[:3]), len(ranking.left_out)
        more = f" and {count - 3} more" if count > 3 else ""
        output.results.print(
            f"left out, as {seconds(ENOUGH_S)} were over: {some}{more}; with --strategy they are simulated alone",
            markup=False,
        )
    for rejected in ranking.rejected:
        output.results.print(f"not possible: {rejected}", markup=False)
    stale = next((o for o in ranking.outcomes if o.fits and asynchronous(o.plan)), best)
    if stale.throughput > best.throughput * (1 + TIE):
        gain = percent(stale.throughput / best.throughput - 1)
        old = f"gradients {staleness(stale):.1f} updates old on average"
        output.results.print(f"{stale.plan} would be {gain} faster with {old} (--stale lets it be the best)")
    tie = tables.tied(best, ranking.outcomes, ranking.stale, ranking.able)
    output.results.print(f"\nbest: {best.plan}, {rate(best.throughput)}{tie}")
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
