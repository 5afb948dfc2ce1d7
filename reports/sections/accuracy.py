"""Predicted against measured: how far apart, and which part of the prediction is to blame."""

from __future__ import annotations

import math

from planner.basis.units import percent, seconds, size
from planner.orders.action import parse
from planner.orders.operations import NUMBER, OPERATIONS
from planner.values.evaluation import Evaluation
from planner.values.outcome import Comparison, Error
from planner.values.plan import Plan
from planner.values.trace import KINDS
from reports.figures import action_name, relative, signed
from reports.markup import Cell, Html, Number, figure, join, table, tag
from reports.plots import line, plot
from reports.registry import section
from reports.report import Report
from reports.sections.memory import kind_name

_SCALES = (0.05, 0.1, 0.25, 0.5)  # where the bars of the error chart may end
_ROWS = 200
_POINTS = 500  # of a curve: as many as a screen can show


@section("accuracy", "Predicted against measured")
def accuracy(report: Report) -> str:
    """The error split by cause, the memory, and the losses of the run."""
    parts: list[Html] = []
    if report.comparison is not None:
        parts += [_times(report.comparison, report.predicted.plan), _memory(report.comparison)]
    if report.measured is not None and report.measured.losses:
        parts.append(_losses(report.measured.losses, report.measured.evaluations))
    if report.measured is not None and report.measured.evaluations:
        parts.append(_evaluations(report.measured.evaluations, report.predicted.evaluation_rate))
    return join(*parts)


def largest_cause(comparison: Comparison, plan: Plan) -> str:
    """Name the largest cause of the error in plain words, or say that it is within the noise."""
    total = relative(comparison.total)
    if total is None:
        return "The step was not timed, so there is no error to explain."
    if abs(total) <= comparison.noise:
        return f"The error of {signed(total)} is within the noise of the measurement (± {percent(comparison.noise)})."
    costs = _worst_cost(comparison, plan)
    blamed = f"; the largest error of a cost is {costs}" if costs else ""
    if comparison.replay is None or relative(comparison.replay) is None:
        return f"The run was not replayed, so costs and schedule cannot be told apart{blamed}."
    replay = comparison.replay.relative
    remaining = total - replay
    if abs(replay) > abs(remaining):
        return (
            "Most of it comes from schedule and communication: with the measured computing times the simulated step is "
            f"still {signed(replay)} off."
        )
    return (
        "Most of it comes from the costs: with the measured computing times the simulated step is "
        f"{signed(replay)} off, so {signed(remaining)} is theirs{blamed}."
    )


def _worst_cost(comparison: Comparison, plan: Plan) -> str:
    """The cost that moves the step most: its error times how often one device pays it."""

    def weight(error: Error) -> float:
        often = plan.microbatches // plan.replicas if _repeats(error.name) else 1
        moved = abs(error.predicted - error.measured) * often
        return moved if math.isfinite(moved) else 0.0

    worst = max(comparison.costs, key=weight, default=None)
    if worst is None or not weight(worst):
        return ""
    found = relative(worst)
    return f"{action_name(worst.name)}, {signed(found) if found is not None else 'measured as nothing'}"


def _repeats(name: str) -> bool:
    return OPERATIONS[parse(name).op].busy


def _times(comparison: Comparison, plan: Plan) -> Html:
    total = relative(comparison.total)
    title = "The step was not timed"
    if total is not None:
        title = f"The predicted step is {percent(abs(total))} too {'long' if total > 0 else 'short'}"
    caption = (
        f"{largest_cause(comparison, plan)} The noise floor is ± {percent(comparison.noise)}, and "
        f"{percent(comparison.inside)} of the measured steps lie inside the predicted interval."
    )
    named = [("Step", "all of it", comparison.total)]
    if comparison.replay is not None:
        words = "schedule and communication alone: the measured computing times, simulated"
        named.append(("Replay", words, comparison.replay))
    spent = [error for error in comparison.costs if error.predicted or error.measured]
    named += [(e.name, action_name(e.name), e) for e in sorted(spent, key=_place)]
    furthest = max((abs(found) for _, _, error in named if (found := relative(error)) is not None), default=0.0)
    scale = next((s for s in _SCALES if s >= furthest), _SCALES[-1])
    rows = [_time_row(name, what, error, scale) for name, what, error in named]
    head = ["Part", "What", "Predicted", "Measured", "Error", f"−{100 * scale:g} % to +{100 * scale:g} %"]
    words = "Times per action are medians over micro-batches and steps; the error is (predicted − measured) / measured."
    if len(spent) < len(comparison.costs):
        words += " Actions without time are left out."
    body = table(head, rows, caption=words, limit=_ROWS)
    return figure(title=title, caption=caption, body=body, twin=None, id="errors")


def _place(error: Error) -> tuple[int, int]:
    action = parse(error.name)
    return action.stage, NUMBER[action.op]


def _time_row(name: str, what: str, error: Error, scale: float) -> list[Cell]:
    return [
        tag("strong", name),
        what,
        Number(seconds(error.predicted), error.predicted),
        Number(seconds(error.measured), error.measured),
        _error_cell(error),
        _bar(error, scale),
    ]


def _error_cell(error: Error) -> Number:
    found = relative(error)
    return Number("—" if found is None else signed(found), found)


def _bar(error: Error, scale: float) -> Html:
    """A bar to the left (predicted too little) or to the right of the middle; one longer than `scale` is broken up."""
    found = relative(error)
    if found is None:
        return tag("span", cls="error-bar")
    half = min(abs(found), scale) / scale * 50
    css = "fill beyond" if abs(found) > scale else "fill"
    left = 50.0 if found >= 0 else 50.0 - half
    return tag("span", tag("span", cls=css, style=f"left:{left:.1f}%;width:{half:.1f}%"), cls="error-bar")


def _memory(comparison: Comparison) -> Html:
    if not comparison.memory:
        return tag("p", "The run recorded no memory, so the peaks cannot be compared.", cls="note")
    errors = [found for e in comparison.memory if (found := relative(e)) is not None]
    title = "No device's memory was measured"
    if errors:
        furthest = max(comparison.memory, key=lambda e: abs(relative(e) or 0.0))
        off = percent(max(map(abs, errors)))
        title = f"Peak memory is at most {off} off, on {furthest.name}"
        if off == percent(0.0):
            title = "Peak memory is as predicted"
    rows = [[row[0], *row[2:]] for row in (_memory_row(e.name, "total", e) for e in comparison.memory)]
    kinds = [
        _memory_row(device.name, kind_name(KINDS[i]), error)
        for device, errors_by_kind in zip(comparison.memory, comparison.memory_kinds, strict=False)
        for i, error in enumerate(errors_by_kind)
        if error.predicted or error.measured
    ]
    head = ["Device", "Bytes", "Predicted", "Measured", "Error"]
    caption = "Each device at its own peak; the table below has the kinds of bytes at that moment."
    return figure(
        title=title,
        caption=caption,
        body=table([head[0], *head[2:]], rows, caption="Peak memory per device.", limit=_ROWS),
        twin=table(head, kinds, caption="Bytes at each device's peak, by kind.", limit=_ROWS),
    )


def _memory_row(device: str, kind: str, error: Error) -> list[Cell]:
    return [
        device,
        kind,
        Number(size(error.predicted), error.predicted),
        Number(size(error.measured), error.measured),
        _error_cell(error),
    ]


def _thinned(losses: tuple[float, ...]) -> tuple[list[int], list[float], int]:
    """The numbers of steps and their losses, or means over so many steps where there are too many to draw.

    >>> _thinned((3.0, 2.0))
    ([1, 2], [3.0, 2.0], 1)
    >>> steps, means, each = _thinned(tuple(map(float, range(1000))))
    >>> steps[:2], means[:2], steps[-1], each
    ([2, 4], [0.5, 2.5], 1000, 2)
    """
    each = -(-len(losses) // _POINTS)
    ends = [*range(each, len(losses), each), len(losses)]
    parts = [losses[max(0, end - each) : end] for end in ends]
    return ends, [sum(part) / len(part) for part in parts], each


def _losses(losses: tuple[float, ...], evaluations: tuple[Evaluation, ...] = ()) -> Html:
    finite = [loss for loss in losses if math.isfinite(loss)]
    count = f"{len(losses)} step{'' if len(losses) == 1 else 's'}"
    if len(finite) < len(losses):
        first = next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
        title = f"The loss stops being finite at step {first + 1} of {len(losses)}"
    elif len(losses) == 1:
        title = f"The loss is {losses[0]:.4g} after one step"
    else:
        trend = "falls" if losses[-1] < losses[0] else "rises" if losses[-1] > losses[0] else "stays"
        title = f"The loss {trend} from {losses[0]:.4g} to {losses[-1]:.4g} over {count}"
    steps, means, each = _thinned(losses)
    traces = [line("loss", steps, means, "--accent", hovertemplate="%{y:.5g}")]
    if len(means) <= 60:
        traces[0] |= {"mode": "lines+markers", "marker": {"size": 5, "color": "--accent"}}
    if evaluations:
        at, found = [e.step for e in evaluations], [e.loss for e in evaluations]
        traces[0] |= {"name": "training"}
        traces.append(line("validation", at, found, "--ink", hovertemplate="%{y:.5g}"))
        traces[1] |= {"mode": "lines+markers", "marker": {"size": 6, "color": "--ink"}}
    layout: dict[str, object] = {
        "xaxis": {
            "title": {"text": "step"},
            "tick0": 1,
            "dtick": max(1, round(len(losses) / 10)),
            "unifiedhovertitle": {"text": "step %{x}"},
        },
        "yaxis": {"title": {"text": "mean loss" if evaluations else "mean loss of the step"}},
        "hovermode": "x unified",
    }
    of_each = "each step" if each == 1 else f"{each} steps, the last of which is named"
    chart = plot(label=f"Loss over {count}: {title}", traces=traces, layout=layout, height=240)
    rows: list[list[Cell]] = [
        [Number(str(s), s), Number(f"{loss:.6g}", loss)] for s, loss in zip(steps, means, strict=True)
    ]
    twin = table(["Step", "Loss"], rows, caption=f"Mean loss of {of_each}, in the loss's own unit.", limit=_ROWS)
    caption = "The run trains for real; its first steps say whether it learns, not how well it will."
    if each > 1:
        caption = f"Every point is the mean of {of_each}."
    return figure(title=title, caption=caption, body=chart, twin=twin, id="losses")


def _evaluations(evaluations: tuple[Evaluation, ...], predicted_rate: float) -> Html:
    last, names = evaluations[-1], list(dict.fromkeys(name for e in evaluations for name in e.metrics))
    rows: list[list[Cell]] = [
        [
            Number(str(e.step), e.step),
            *(Number(f"{value:.6g}", value) for value in (e.loss, *(e.metrics.get(name, math.nan) for name in names))),
            Number(str(e.samples), e.samples),
            Number(seconds(e.seconds), e.seconds),
            Number(seconds(e.samples / predicted_rate), e.samples / predicted_rate) if predicted_rate else "",
        ]
        for e in evaluations
    ]
    best = min(evaluations, key=lambda e: e.loss)
    least = "" if best is last or len(evaluations) == 1 else f", and was least ({best.loss:.4g}) at step {best.step}"
    title = f"The validation loss is {last.loss:.4g} at step {last.step}{least}"
    headings = ["Step", "Loss", *names, "Samples", "Took", "Predicted"]
    caption = "In evaluation mode, over all validation data, by the stages that train; no step's time has it in it."
    body = table(headings, rows, caption="Every evaluation of the run.", limit=_ROWS)
    return figure(title=title, caption=caption, body=body, twin=None, id="evaluations")
