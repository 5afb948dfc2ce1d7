"""Memory over time: one small chart per device, by kind of bytes, against the device's capacity."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from planner.basis.units import seconds, size
from planner.values.outcome import Outcome
from planner.values.trace import KINDS, MemoryPoint
from reports.figures import capacity, of_capacity, share, worst
from reports.markup import Cell, Html, Number, figure, join, table, tag, unbroken
from reports.plots import line, plot
from reports.registry import section
from reports.report import Report

_DEVICES = 8
_POINTS = 1200
_ROWS = 200
_CAPACITY_IN_SIGHT = 4.0  # a capacity up to so many times the highest peak is drawn, one beyond is said in words

Curve = list[MemoryPoint]


def kind_name(kind: str) -> str:
    """Name a kind of bytes for a reader."""
    return {"optimizer": "optimizer state", "versions": "weight versions"}.get(kind, kind)


@section("memory", "Memory over time")
def memory(report: Report) -> str:
    """The predicted curve by kind; the measured total as a line."""
    predicted, measured = report.predicted, report.measured
    most = worst(predicted)
    if most is None:
        return ""
    curves = _curves(predicted)
    ranked = sorted(curves, key=lambda d: (-_fullness(predicted, curves[d], d), d))
    shown = sorted(ranked[:_DEVICES])
    largest = max(range(len(KINDS)), key=lambda i: most.point.bytes[i])
    title = (
        f"{most.device} needs most, {of_capacity(most.point.total, most.capacity)}, mainly {kind_name(KINDS[largest])}"
    )
    caption = "Bytes live on each device over the step, stacked by kind"
    caption += ", with the measured total as a line." if measured is not None and measured.peak else "."
    if len(curves) > len(shown):
        caption += f" The {len(shown)} fullest of {len(curves)} devices are drawn; the table has all."
    if any(len(points) > _POINTS for points in curves.values()):
        caption += f" Each curve is thinned to about {_POINTS} points that keep every peak's height."
    used = [i for i in range(len(KINDS)) if any(p.bytes[i] for d in shown for p in curves[d])]
    theirs = _curves(measured) if measured is not None else {}
    limits = {d: capacity(predicted, d) for d in shown}
    drawn = [(curves[d], predicted.memory_trace.end) for d in shown]
    if measured is not None:
        drawn += [(theirs[d], measured.memory_trace.end) for d in shown if d in theirs]
    axes = _Axes.of(drawn, [limit for limit in limits.values() if limit is not None])
    if not axes.capacity and any(limits.values()):
        caption += f" Every capacity is more than {_CAPACITY_IN_SIGHT:g} times the highest peak, so none is drawn."
    names, held = predicted.memory_trace.devices, predicted.plan.stages_of
    body = join(
        _legend(used, measured=bool(theirs), capacity=axes.capacity),
        tag(
            "div",
            *(_device(names[d], held[d], curves[d], theirs.get(d, []), limits[d], axes) for d in shown),
            cls="multiples",
        ),
    )
    return figure(title=title, caption=caption, body=body, twin=_tables(report, curves, shown))


def _curves(outcome: Outcome) -> dict[int, list[MemoryPoint]]:
    curves: dict[int, list[MemoryPoint]] = defaultdict(list)
    for point in outcome.memory_trace.memory:
        curves[point.device].append(point)
    return {d: sorted(curves[d], key=lambda p: p.time) for d in sorted(curves)}


def _fullness(outcome: Outcome, points: Curve, device: int) -> float:
    limit = capacity(outcome, device)
    return max(p.total for p in points) / (limit or 1.0)


def thinned(points: Curve, count: int = _POINTS) -> Curve:
    """Keep at most about `count` points: of each run of neighbours the lowest and the highest, and both ends."""
    if len(points) <= count:
        return points
    run = -(-2 * len(points) // count)
    kept: list[MemoryPoint] = [points[0]]
    for i in range(0, len(points), run):
        part = points[i : i + run]
        kept += sorted({min(part, key=lambda p: p.total), max(part, key=lambda p: p.total)}, key=lambda p: p.time)
    return [*kept, points[-1]]


class _Axes(NamedTuple):
    """The axes that all devices share, so that their charts can be compared: units, ends, a capacity in sight."""

    clock: str
    clock_s: float
    end_s: float
    unit: str
    unit_bytes: float
    top: float
    capacity: bool

    @classmethod
    def of(cls, curves: list[tuple[list[MemoryPoint], float]], limits: list[float]) -> _Axes:
        end = max(max(end, points[-1].time) for points, end in curves)
        top = max(p.total for points, _ in curves for p in points)
        near = [limit for limit in limits if limit <= _CAPACITY_IN_SIGHT * top]
        clock_s, clock = next(((f, u) for f, u in ((1.0, "s"), (1e-3, "ms")) if end >= f), (1e-6, "µs"))
        units = ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB"))
        power, unit = next(((p, u) for p, u in units if top >= 1024**p), (0, "B"))
        return cls(clock, clock_s, end, unit, 1024.0**power, 1.06 * max([top, *near]), bool(near))

    def layout(self) -> dict[str, object]:
        """The layout of one chart."""
        return {
            "xaxis": {
                "title": {"text": f"time ({self.clock})"},
                "range": [0, self.end_s / self.clock_s],
                "nticks": 6,
                "unifiedhovertitle": {"text": f"%{{x:.4~g}} {self.clock}"},
            },
            "yaxis": {"title": {"text": self.unit}, "range": [0, self.top / self.unit_bytes], "nticks": 6},
            "hovermode": "x unified",
        }


def _device(name: str, held: tuple[int, ...], points: Curve, measured: Curve, limit: float | None, axes: _Axes) -> Html:
    kept = thinned(points)
    times = [p.time for p in kept]
    traces: list[dict[str, object]] = []
    below = [0.0] * len(kept)
    for i, kind in enumerate(KINDS):
        own = [p.bytes[i] for p in kept]
        if not any(own):
            continue
        below = [b + o for b, o in zip(below, own, strict=True)]
        fill: dict[str, object] = {"fill": "tonexty" if traces else "tozeroy", "fillcolor": f"--kind-{kind}"}
        traces.append(_steps(kind_name(kind), times, below, own, f"--kind-{kind}", axes) | fill)
    if measured:
        theirs = thinned(measured)
        totals = [p.total for p in theirs]
        traces.append(_steps("measured", [p.time for p in theirs], totals, totals, "--ink", axes, width=1.5))
    layout = axes.layout()
    words = f"peak {of_capacity(max(p.total for p in points), limit)}"
    if measured:
        words += f", measured {size(max(p.total for p in measured))}"
    if limit is not None and limit <= axes.top:
        height, dashes = limit / axes.unit_bytes, {"color": "--bad", "width": 1.5, "dash": "dash"}
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": dashes}
        layout["shapes"] = [line]
    elif limit is not None and axes.capacity:
        words += "; the capacity is far above the chart"
    return tag(
        "div",
        tag("h4", name, tag("span", f"stage {', '.join(map(str, held))}", cls="muted")),
        tag("p", unbroken(words), cls="note"),
        plot(label=f"Memory of {name} over the step: {words}", traces=traces, layout=layout, height=200),
        cls="multiple",
    )


def _steps(
    name: str, times: list[float], heights: list[float], own: list[float], colour: str, axes: _Axes, width: float = 0
) -> dict[str, object]:
    """A curve of steps at `heights` bytes that says `own` bytes."""
    trace = line(
        name,
        [t / axes.clock_s for t in (*times, max(times[-1], axes.end_s if not width else times[-1]))],
        [h / axes.unit_bytes for h in (*heights, heights[-1])],
        colour,
        customdata=[size(value) for value in (*own, own[-1])],
        hovertemplate="%{customdata}",
    )
    return trace | {"line": {"color": colour, "width": width, "shape": "hv"}}


def _legend(used: list[int], *, measured: bool, capacity: bool) -> Html:
    keys = [tag("li", tag("i", cls=f"key kind-{KINDS[i]}"), kind_name(KINDS[i])) for i in reversed(used)]
    if measured:
        keys.append(tag("li", tag("i", cls="key stroke"), "measured total"))
    if capacity:
        keys.append(tag("li", tag("i", cls="key dashes"), "capacity"))
    return tag("ul", *keys, cls="legend")


def _tables(report: Report, curves: dict[int, list[MemoryPoint]], shown: list[int]) -> Html:
    names = report.predicted.memory_trace.devices
    peaks_of = zip(report.predicted.peak, report.predicted.peak_actions, strict=True)
    doing = {point.device: action for point, action in peaks_of}
    rows: list[list[Cell]] = []
    for device, points in curves.items():
        peak = max(points, key=lambda p: p.total)
        limit = capacity(report.predicted, device)
        part = peak.total / limit if limit else None
        rows.append(
            [
                names[device],
                Number(size(peak.total), peak.total),
                Number(size(limit) if limit else "not known", limit),
                Number(share(part) if part is not None else "not known", part),
                Number(seconds(peak.time), peak.time),
                doing[peak.device] or "—",
                *(Number(size(value), value) for value in peak.bytes),
            ]
        )
    head = ["Device", "Peak", "Capacity", "Share", "At", "During", *(kind_name(kind).capitalize() for kind in KINDS)]
    peaks = table(head, rows, caption="Predicted peak of every device, by kind of bytes.", limit=_ROWS)
    steps: list[list[Cell]] = [
        [
            names[p.device],
            Number(seconds(p.time), p.time),
            Number(size(p.total), p.total),
            *(Number(size(b), b) for b in p.bytes),
        ]
        for device in shown
        for p in curves[device]
    ]
    head = ["Device", "Time", "Total", *(kind_name(kind).capitalize() for kind in KINDS)]
    return join(peaks, table(head, steps, caption="The predicted curve of the devices drawn.", limit=_ROWS))
