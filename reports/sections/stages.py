"""The stages: which layers each holds, and how evenly the time is spread."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import NamedTuple

from planner.basis.units import percent, seconds, size
from planner.orders.operations import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, OPERATIONS, RECOMPUTE
from planner.values.plan import Stage
from planner.values.trace import Trace
from reports.figures import signed
from reports.markup import Cell, Html, Number, figure, join, table, tag, unbroken
from reports.registry import section
from reports.report import Report

_HALVES = (BACKWARD_INPUT, BACKWARD_WEIGHT)
_OPS = (FORWARD, RECOMPUTE, BACKWARD, *_HALVES)
_NAMED = 4
_ROWS = 500


class _StageTime(NamedTuple):
    """A stage with its parameters' bytes and the seconds of its operations per micro-batch."""

    number: int
    stage: Stage
    parameters: float
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@section("stages", "Layers per stage")
def stages(report: Report) -> str:
    """Bars of every stage's time against the mean."""
    plan = report.predicted.plan
    parameters = {layer.name: layer.parameter_bytes for layer in report.profile.layers}
    times = _times(report.predicted.trace, len(plan.stages))
    found = [
        _StageTime(i, stage, sum(parameters.get(name, 0) for name in stage.layers), times[i])
        for i, stage in enumerate(plan.stages)
    ]
    mean = sum(s.total for s in found) / len(found)
    title = _finding(found, mean)
    caption = (
        "Predicted time per micro-batch, forward and backward; the line across the bars is the mean over the stages."
    )
    scale = max((s.total for s in found), default=0.0) or 1.0
    used = [op for op in _OPS if any(s.seconds.get(op) for s in found)]
    legend = tag(
        "ul",
        *(tag("li", tag("i", cls=f"key {OPERATIONS[op].colour}"), OPERATIONS[op].words) for op in used),
        cls="legend",
    )
    body = join(legend, tag("ol", *(_stage(s, mean, scale) for s in found), cls="stages"))
    return figure(title=title, caption=caption, body=body, twin=_tables(report, found, mean))


def _times(trace: Trace, count: int) -> list[dict[str, float]]:
    """Median seconds of forward, recompute and backward or its halves per stage, over micro-batches and replicas."""
    found: list[dict[str, list[float]]] = [defaultdict(list) for _ in range(count)]
    for device in trace.work:
        for action, spent in device.items():
            if action.op in _OPS and action.stage < count:
                found[action.stage][action.op].append(spent)
    return [{op: statistics.median(table[op]) for op in _OPS if table[op]} for table in found]


def _finding(found: list[_StageTime], mean: float) -> str:
    if len(found) == 1:
        return f"One stage holds all {len(found[0].stage.layers)} layers"
    slowest = max(found, key=lambda s: s.total)
    if not mean or slowest.total / mean - 1 < 0.005:
        return f"The {len(found)} stages take equally long"
    return f"Stage {slowest.number} is slowest, {percent(slowest.total / mean - 1)} above the mean"


def _stage(found: _StageTime, mean: float, scale: float) -> Html:
    layers = found.stage.layers
    names = ", ".join(layers[:_NAMED])
    rest = (
        ""
        if len(layers) <= _NAMED
        else tag("details", tag("summary", f"all {len(layers)} layers"), tag("p", ", ".join(layers)))
    )
    bars = [
        tag(
            "span",
            cls=OPERATIONS[op].colour,
            style=f"width:{100 * spent / scale:.2f}%",
            title=f"{OPERATIONS[op].words} {seconds(spent)}",
        )
        for op, spent in found.seconds.items()
    ]
    line = tag("span", cls="mean", style=f"left:{100 * mean / scale:.2f}%")
    parts = ", ".join(f"{OPERATIONS[op].words} {seconds(spent)}" for op, spent in found.seconds.items())
    against = f"{signed(found.total / mean - 1)} against the mean" if mean else ""
    return tag(
        "li",
        tag(
            "div",
            tag("strong", f"Stage {found.number}"),
            tag("span", f"on {', '.join(found.stage.devices)}", cls="muted"),
            tag("span", f"{size(found.parameters)} of parameters", cls="muted"),
            cls="stage-head",
        ),
        tag("div", *bars, line, cls="stage-bar"),
        tag(
            "p",
            tag("span", unbroken(parts) or "no time predicted"),
            tag("span", against, cls="muted"),
            cls="stage-time",
        ),
        tag("p", names if len(layers) <= _NAMED else f"{names}, …", cls="layers"),
        rest,
    )


def _tables(report: Report, found: list[_StageTime], mean: float) -> Html:
    used = [op for op in _OPS if op not in _HALVES or any(op in s.seconds for s in found)]
    rows: list[list[Cell]] = [
        [
            Number(str(s.number), s.number),
            ", ".join(s.stage.devices),
            Number(str(len(s.stage.layers)), len(s.stage.layers)),
            Number(size(s.parameters), s.parameters),
            *(Number(seconds(s.seconds[op]) if op in s.seconds else "—", s.seconds.get(op)) for op in used),
            Number(seconds(s.total), s.total),
            Number(signed(s.total / mean - 1) if mean else "—", s.total),
        ]
        for s in found
    ]
    head = [
        "Stage",
        "Devices",
        "Layers",
        "Parameters",
        *(OPERATIONS[op].words.capitalize() for op in used),
        "Together",
        "Against the mean",
    ]
    whole = table(head, rows, caption="Predicted time of each stage per micro-batch.", limit=_ROWS)
    held = {name: s.number for s in found for name in s.stage.layers}
    layers: list[list[Cell]] = [
        [
            layer.name,
            Number(str(held[layer.name]), held[layer.name]),
            Number(size(layer.parameter_bytes), layer.parameter_bytes),
        ]
        for layer in report.profile.layers
        if layer.name in held
    ]
    return join(whole, table(["Layer", "Stage", "Parameters"], layers, caption="The layers in order.", limit=_ROWS))
