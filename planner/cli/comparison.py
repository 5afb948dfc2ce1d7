"""A run held against its prediction: the comparison, as JSON data and as a table."""

from __future__ import annotations

import statistics
from typing import Any

from planner.basis.units import percent, rate, seconds, size
from planner.cli import output
from planner.cli.figures import figures
from planner.cli.training import told
from planner.simulate.predict import replay
from planner.store import Run
from planner.values.outcome import Comparison, Error, compare
from planner.values.profile import Profile


def compared(result: Run, profile: Profile) -> Comparison:
    """Compare a run with its prediction, and with its own durations put through the simulator."""
    cluster = result.cluster or profile.machine
    replays = tuple(replay(profile, result.measured.plan, cluster, trace) for trace in result.measured.steps)
    return compare(result.predicted, result.measured, replays=replays)


def as_data(result: Run, comparison: Comparison) -> dict[str, Any]:
    """A run as JSON data: figures of both worlds and the errors split by cause, as fractions."""

    def error(e: Error, unit: str) -> dict[str, Any]:
        return {
            "name": e.name,
            f"predicted_{unit}": e.predicted,
            f"measured_{unit}": e.measured,
            "relative_error": e.relative,
        }

    return {
        "plan": str(result.measured.plan),
        "steps": result.measured.performed,
        "asked_steps": result.measured.asked_steps,
        "stopped": result.measured.stopped,
        "recorded_steps": len(result.measured.steps),
        "training": {
            "predicted_s": result.measured.performed * result.predicted.step_s,
            "measured_s": result.measured.training_s,
        },
        "predicted": figures(result.predicted),
        "measured": figures(result.measured),
        "losses": list(result.measured.losses),
        "evaluations": [
            {
                "step": e.step,
                "loss": e.loss,
                "metrics": e.metrics,
                "samples": e.samples,
                "predicted_s": e.samples / result.predicted.evaluation_rate
                if result.predicted.evaluation_rate
                else None,
                "measured_s": e.seconds,
            }
            for e in result.measured.evaluations
        ],
        "learning_rates": list(result.measured.rates),
        "gradient_norms": list(result.measured.norms),
        "errors": {
            "total": error(comparison.total, "s"),
            "replay": error(comparison.replay, "s") if comparison.replay else None,
            "costs": [error(e, "s") for e in comparison.costs],
            "memory": [
                {**error(e, "bytes"), "kinds": [error(k, "bytes") for k in kinds]}
                for e, kinds in zip(comparison.memory, comparison.memory_kinds, strict=True)
            ],
        },
        "steps_inside_interval_fraction": comparison.inside,
        "noise_fraction": comparison.noise,
    }


def show(result: Run, comparison: Comparison) -> None:
    """Print figures of both worlds and the errors by cause."""
    from rich.table import Table

    predicted, measured = result.predicted, result.measured
    count = measured.performed
    whole = f"stopped after {count} of {measured.asked_steps} steps" if measured.stopped else f"{count} steps"
    table = Table(box=None, pad_edge=False, title=f"{measured.plan}, {whole}", title_justify="left")
    table.add_column("")
    for name in ("predicted", measured.source, "error"):
        table.add_column(name, justify="right")

    def row(name: str, mine: str, theirs: str, error: float | None) -> None:
        table.add_row(name, mine, theirs, "" if error is None else f"{100 * error:+.1f} %")

    row("step", seconds(predicted.step_s), seconds(measured.step_s), comparison.total.relative)
    row("throughput", rate(predicted.throughput), rate(measured.throughput), None)
    row("bubble", percent(predicted.bubble), percent(measured.bubble), None)
    row("synchronising", percent(predicted.synchronising), percent(measured.synchronising), None)
    training = Error(name="training", predicted=count * predicted.step_s, measured=measured.training_s)
    row(f"all {count} steps", seconds(training.predicted), seconds(training.measured), training.relative)
    if measured.evaluations and predicted.evaluation_rate:
        took = statistics.median(e.seconds for e in measured.evaluations)
        wanted = measured.evaluations[-1].samples / predicted.evaluation_rate
        evaluating = Error(name="evaluating", predicted=wanted, measured=took)
        row("an evaluation", seconds(evaluating.predicted), seconds(evaluating.measured), evaluating.relative)
    if comparison.replay:
        row(
            "step, replayed",
            seconds(comparison.replay.predicted),
            seconds(comparison.replay.measured),
            comparison.replay.relative,
        )
    for memory in comparison.memory:
        row(f"peak memory {memory.name}", size(memory.predicted), size(memory.measured), memory.relative)
    for cost in comparison.costs:
        row(f"  {cost.name}", seconds(cost.predicted), seconds(cost.measured), cost.relative)
    output.results.print(table)
    inside = f"{percent(comparison.inside)} of the steps are inside the predicted interval"
    output.results.print(f"noise of the steps {percent(comparison.noise)}; {inside}")
    if measured.losses:
        output.results.print(f"loss {measured.losses[0]:.4g} at first, {measured.losses[-1]:.4g} at last")
    if measured.evaluations:
        output.results.print(told(measured.evaluations[-1]))
