"""The ranked plans: what else could be done with the same devices, and what could not."""

from __future__ import annotations

from planner.basis.units import either, percent, rate, seconds
from planner.values.outcome import Outcome
from reports.figures import figures, interval_text, known, of_capacity, throughput_interval, worst
from reports.markup import Cell, Number, join, table, tag
from reports.registry import section
from reports.report import Report

_ROWS = 500
_HEAD = ("Plan", "Throughput", "Interval", "Step time", "Bubble", "Sync", "Peak memory, worst device", "Fits")


@section("plans", "The ranked plans")
def plans(report: Report) -> str:
    """All plans of the simulation this one comes from, best first."""
    ranking = report.ranking
    if ranking is None or not (ranking.outcomes or ranking.rejected):
        return ""
    shown = str(report.predicted.plan)
    rows = [_row(outcome, shown=str(outcome.plan) == shown) for outcome in ranking.outcomes]
    asked = f"K = {ranking.k} devices, M = {ranking.m} micro-batches and "
    if len({(len(o.plan.device_names), o.plan.microbatches) for o in ranking.outcomes}) > 1:
        asked = ""
    batches = sorted({o.plan.batch for o in ranking.outcomes}) or [ranking.batch]
    caption = f"Predicted for {asked}a batch of {either(batches)} samples on {ranking.cluster.name}; "
    caption += "click a heading to sort."
    parts = [table(_HEAD, rows, caption="All simulated plans.", limit=_ROWS, sortable=True)] if rows else []
    if ranking.rejected:
        rejected: list[list[Cell]] = [[", ".join(r.strategies), r.why, r.fix] for r in ranking.rejected]
        parts.append(
            table(
                ["Strategies without a plan", "Why", "Instead"],
                rejected,
                caption="Strategies that give no plan here.",
                limit=_ROWS,
            )
        )
    title = _finding(ranking.outcomes)
    return tag(
        "figure", tag("figcaption", tag("h3", title), tag("p", caption)), *parts, aria_label=f"{title}. {caption}"
    )


def _finding(outcomes: tuple[Outcome, ...]) -> str:
    fitting = [o for o in outcomes if o.fits]
    if not fitting:
        return "No plan fits into memory"
    best = max(fitting, key=lambda o: figures(o).throughput_samples_per_s or 0.0)
    out = len(outcomes) - len(fitting)
    text = (
        f"{best.plan} is fastest of the {len(fitting)} plans that fit" if len(fitting) > 1 else f"Only {best.plan} fits"
    )
    return text + (f"; {out} {'does' if out == 1 else 'do'} not fit" if out else "")


def _row(outcome: Outcome, *, shown: bool) -> list[Cell]:
    numbers = figures(outcome)
    most = worst(outcome)
    name = join(tag("code", outcome.plan), tag("span", "this page", cls="chip here") if shown else "")
    memory = "not known" if most is None else f"{of_capacity(most.point.total, most.capacity)} on {most.device}"
    return [
        name,
        Number(known(numbers.throughput_samples_per_s, rate), numbers.throughput_samples_per_s),
        Number(interval_text(outcome) or "—", interval[0] if (interval := throughput_interval(outcome)) else None),
        Number(known(numbers.step_s, seconds), numbers.step_s),
        Number(known(numbers.bubble_fraction, percent), numbers.bubble_fraction),
        Number(known(numbers.synchronising_fraction, percent), numbers.synchronising_fraction),
        Number(memory, numbers.peak_bytes),
        Number("yes" if outcome.fits else "no", float(outcome.fits)),
    ]
