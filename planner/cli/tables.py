"""The table of plans that several commands print: its columns, and what it is sorted and filtered by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from planner.basis.errors import PlanError, unknown
from planner.basis.units import percent, rate, seconds, size
from planner.search.choice import merit
from planner.values.outcome import Outcome
from planner.values.plan import asynchronous


class Column(NamedTuple):
    """A column: what `--sort` calls it, its heading, the cell of an outcome, and what it is sorted by, least first."""

    name: str
    heading: str
    cell: Callable[[Outcome], str]
    order: Callable[[Outcome], Any]


def _number(value: float) -> str:
    return rate(value).removesuffix(" samples/s")


def columns(unit: str = "sample") -> tuple[Column, ...]:
    """Return the columns of a table in which plans are compared by samples, or tokens, per second."""

    def per_s(outcome: Outcome, step_s: float) -> float:
        return (outcome.plan.units if unit == "token" else outcome.plan.batch) / step_s

    return (
        Column("plan", "plan", lambda o: str(o.plan), lambda o: str(o.plan)),
        Column("throughput", f"{unit}s/s", lambda o: _number(per_s(o, o.step_s)), lambda o: -per_s(o, o.step_s)),
        Column(
            "interval",
            "10 to 90 %",
            lambda o: "–".join(_number(per_s(o, step_s)) for step_s in reversed(o.interval_s)),
            lambda o: -per_s(o, o.interval_s[1]),
        ),
        *_ALWAYS,
    )


_ALWAYS = (
    Column("step", "step", lambda o: seconds(o.step_s), lambda o: o.step_s),
    Column("bubble", "bubble", lambda o: percent(o.bubble), lambda o: o.bubble),
    Column("sync", "sync", lambda o: percent(o.synchronising), lambda o: o.synchronising),
    Column("memory", "memory", lambda o: size(o.peak_bytes), lambda o: o.peak_bytes),
    Column("fits", "fits", lambda o: "yes" if o.fits else "no", lambda o: not o.fits),
)
NAMES = tuple(column.name for column in columns())


def check_column(sort: str | None) -> None:
    """Raise `PlanError` (exit 2) for an unknown column."""
    if sort is not None and sort not in NAMES:
        raise unknown("column", sort, NAMES, where="--sort", fix="choose one of the columns, for example --sort memory")


def arranged(outcomes: Sequence[Outcome], sort: str | None, words: Sequence[str]) -> list[Outcome]:
    """Return the outcomes whose plan's name has all the words, in the order of a column, or as they come.

    Raises `PlanError` (exit 2) for an unknown column, and where no name has all the words.
    """
    check_column(sort)
    found = [outcome for outcome in outcomes if all(word in str(outcome.plan) for word in words)]
    if words and not found:
        raise PlanError(
            what=f"no plan's name has {' and '.join(words)}",
            where="--filter",
            why=f"the {len(outcomes)} plans are called {', '.join(str(o.plan) for o in outcomes[:4])}, ...",
            fix="leave --filter out, or give a part of a name, for example --filter gpipe",
        )
    if sort is not None:
        found.sort(key=next(column.order for column in columns("token") if column.name == sort))
    return found


def show(
    outcomes: Sequence[Outcome],
    *,
    title: str,
    best: Outcome | None,
    unit: str = "sample",
    without: tuple[str, ...] = (),
    bounds: Collection[str] = (),
) -> None:
    """Print the table, the best plan's row in bold; of the plans in `bounds` the step is the least that it takes."""
    from rich.table import Table

    from planner.cli import output

    shown = [column for column in columns(unit) if column.name not in without]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(column.heading, justify="left" if column.name in ("plan", "fits") else "right", no_wrap=True)
    for outcome in outcomes:
        marks = {"step": "≥ ", "throughput": "≤ "} if str(outcome.plan) in bounds else {}
        bold = best is not None and outcome.plan == best.plan
        table.add_row(
            *(marks.get(column.name, "") + column.cell(outcome) for column in shown), style="bold" if bold else None
        )
    output.results.print(title, markup=False, soft_wrap=True)
    output.results.print(table)


def tied(best: Outcome, outcomes: Sequence[Outcome], stale: bool, able: Sequence[str] = ()) -> str:
    """Say which plan is quicker than the best, if any is, and why it is not the best."""
    rivals = [o for o in outcomes if o.fits and (stale or not asynchronous(o.plan))]
    quickest = max(rivals, key=lambda o: o.throughput, default=best)
    gain = quickest.throughput / best.throughput - 1
    if quickest.plan == best.plan or gain <= 0:
        return ""
    own, other = (merit(o, runnable=str(o.plan) in able) for o in (best, quickest))
    return f" ({quickest.plan} is {percent(gain)} faster: a tie, which {own.decider(other)} wins)"
