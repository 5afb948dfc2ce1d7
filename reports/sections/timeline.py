"""The timeline: predicted above measured for every device, on one time axis."""

from __future__ import annotations

from planner.basis.units import percent, seconds, size
from planner.orders.operations import OPERATIONS, ROLES
from planner.values.outcome import Outcome
from planner.values.trace import LINK, Trace
from reports import timeline as encoding
from reports.figures import device_times, longest_wait
from reports.markup import Cell, Html, Number, data_script, figure, join, table, tag
from reports.registry import section
from reports.report import Report

_ROWS = 200


@section("timeline", "Timeline")
def timeline(report: Report) -> str:
    """The steps whose times are the medians."""
    outcomes = [("predicted", report.predicted), *([("measured", report.measured)] if report.measured else [])]
    traces = [(name, outcome.trace) for name, outcome in outcomes]
    if not any(trace.events for _, trace in traces):
        return ""
    title = _finding(report.predicted)
    caption = _caption(report.predicted, measured=report.measured is not None)
    data = {
        "ops": [
            {
                "name": op.name,
                "words": op.words,
                "short": op.name if op.short is None else op.short,
                "colour": f"--{op.colour}",
            }
            for op in OPERATIONS.values()
        ],
        "devices": [
            {"name": name, "stage": ", ".join(map(str, report.predicted.plan.stages_of[index]))}
            for index, name in enumerate(report.predicted.trace.devices)
        ],
        "sources": [
            {"name": name, "label": "rehearsed" if outcome.source == "rehearsed" else name}
            | encoding.encode(outcome.trace)
            for name, outcome in outcomes
        ],
    }
    body = join(
        _toolbar(traces),
        tag(
            "div",
            tag(
                "canvas",
                id="timeline-canvas",
                tabindex=0,
                role="img",
                aria_label=f"Timeline. {title}. Arrow keys left and right pan, plus and minus zoom, Home shows all, "
                "up and down choose a lane, comma and full stop step through its actions.",
                data_events=sum(len(trace.events) for _, trace in traces),
            ),
            tag("div", cls="tip", hidden=True),
            cls="timeline",
            id="timeline-view",
            hidden=True,
        ),
        tag("p", cls="detail muted", id="timeline-detail", aria_live="polite", hidden=True),
        data_script(data, id="timeline-data"),
        tag(
            "noscript",
            encoding.still(report.predicted.trace),
            tag("p", "The predicted step, one row per device.", cls="note"),
        ),
    )
    twin = join(_split(traces), *(_actions(name, trace) for name, trace in traces))
    return figure(title=title, caption=caption, body=body, twin=twin)


def _finding(outcome: Outcome) -> str:
    if len(outcome.trace.devices) == 1:
        return f"The predicted step takes {seconds(outcome.step_s)} on one device"
    idle = percent(outcome.bubble)
    return f"The predicted step takes {seconds(outcome.step_s)}; its devices stand idle for {idle} of it"


def _caption(outcome: Outcome, *, measured: bool) -> str:
    rows = "Above the prediction, below the measurement" if measured else "One row per device"
    text = f"{rows}; waiting is hatched, and the thin lane is what arrives over links."
    wait = longest_wait(outcome.trace)
    if wait is not None:
        device = outcome.trace.devices[wait.device]
        text += f" The longest predicted wait is {seconds(wait.ready - wait.start)}, on {device} before {wait.action}."
    return text


def _toolbar(traces: list[tuple[str, Trace]]) -> Html:
    seen = {e.op for _, trace in traces for e in trace.events if e.work > 0}
    zoom = tag(
        "span",
        tag("button", "−", type="button", data_zoom="out", aria_label="Zoom out", title="Zoom out (−)"),
        tag("button", "+", type="button", data_zoom="in", aria_label="Zoom in", title="Zoom in (+, or the wheel)"),
        tag("button", "Whole step", type="button", data_zoom="reset", title="Show the whole step (Home)"),
        cls="group",
    )
    shown = [*(name for name, _ in traces), "links"] if len(traces) > 1 else ["links"]
    toggles = tag(
        "span",
        *(tag("button", name, type="button", aria_pressed="true", data_show=name) for name in shown),
        cls="group",
    )
    legend = tag(
        "ul",
        *(tag("li", tag("i", cls=f"key role-{name}"), words) for name, words in _roles(seen)),
        tag("li", tag("i", cls="key waiting"), "waiting"),
        tag("li", tag("i", cls="key idle"), "idle"),
        cls="legend",
    )
    return tag("div", tag("div", zoom, toggles, cls="toolbar", hidden=True), legend)


def _roles(seen: set[str]) -> list[tuple[str, str]]:
    """The roles of the operations seen, in words: those of the one operation that has it, or the role's own."""
    used = {OPERATIONS[op].role for op in seen}
    words = {name: [o.words for o in OPERATIONS.values() if o.role == name] for name in used}
    return [(name, words[name][0] if len(words[name]) == 1 else ROLES[name].words) for name in ROLES if name in used]


def _split(traces: list[tuple[str, Trace]]) -> Html:
    rows: list[list[Cell]] = []
    for source, trace in traces:
        for t in device_times(trace):
            rest = ", ".join(
                f"{op} {seconds(spent)}" for op, spent in sorted(t.by_op.items(), key=lambda i: -i[1]) if spent > 0
            )
            share = t.busy / trace.end if trace.end else 0.0
            numbers = [Number(seconds(value), value) for value in (t.busy, t.waiting, t.idle)]
            rows.append([source, t.name, *numbers, Number(percent(share), share), rest])
    head = ["Source", "Device", "Work", "Waiting", "Other idle time", "Work, share of the step", "Work by operation"]
    return table(head, rows, caption="What each device does with the step.", limit=_ROWS)


def _actions(source: str, trace: Trace) -> Html:
    rows: list[list[Cell]] = [
        [
            trace.devices[e.device],
            e.lane,
            e.action,
            Number(seconds(e.start), e.start),
            Number(seconds(e.ready - e.start), e.ready - e.start),
            Number(seconds(e.work), e.work),
            Number(size(e.bytes) if e.lane == LINK else "", e.bytes),
        ]
        for e in sorted(trace.events, key=lambda e: e.start)[: _ROWS + 1]
    ]
    total = len(trace.events)
    caption = f"The actions of the {source} step, by start: " + (
        f"the first {_ROWS} of {total}." if total > _ROWS else f"all {total}."
    )
    return table(["Device", "Lane", "Action", "Start", "Wait", "Work", "Bytes"], rows[:_ROWS], caption=caption)
