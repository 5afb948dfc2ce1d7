"""A trace as the timeline's script reads it (columns of bytes in base64), and as a small still picture without one."""

from __future__ import annotations

import base64
import sys
from array import array
from collections import defaultdict
from typing import Any

from planner.orders.action import parse
from planner.orders.operations import NUMBER, OPERATIONS
from planner.values.trace import LANES, LINK, Event, Trace
from reports.markup import Html, tag

# One column per field of an event. Starts need 64 bits to keep microseconds in a long step; durations do not.
_COLUMNS = (
    ("start", "d"),
    ("wait", "f"),
    ("work", "f"),
    ("bytes", "f"),
    ("op", "B"),
    ("stage", "H"),
    ("microbatch", "i"),
)
_STILL_RECTANGLES = 800


def encode(trace: Trace) -> dict[str, object]:
    """Return the events ordered by device, lane (compute, link) and start, as base64 of little-endian columns.

    `offsets[2 * device + lane]` is the first event of a lane. `microbatch` is -1 where an action has none; `wait` and
    `work` are seconds, `op` is the number of its entry in `planner.orders.operations`.
    """
    lanes: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in trace.events:
        lanes[event.device, event.lane].append(event)
    columns: dict[str, array[Any]] = {name: array(code) for name, code in _COLUMNS}
    offsets = [0]
    for device in range(len(trace.devices)):
        for lane in LANES:
            for event in sorted(lanes[device, lane], key=lambda e: (e.start, e.end)):
                action = parse(event.action)
                columns["start"].append(event.start)
                columns["wait"].append(event.ready - event.start)
                columns["work"].append(event.work)
                columns["bytes"].append(event.bytes)
                columns["op"].append(NUMBER[action.op])
                columns["stage"].append(action.stage)
                columns["microbatch"].append(-1 if action.microbatch is None else action.microbatch)
            offsets.append(len(columns["start"]))
    return {"end_s": trace.end, "offsets": offsets, **{name: _base64(column) for name, column in columns.items()}}


def _base64(column: array[Any]) -> str:
    if sys.byteorder == "big":
        column.byteswap()
    return base64.b64encode(column.tobytes()).decode()


def still(trace: Trace) -> Html:
    """Draw the compute lanes as SVG with at most some 800 rectangles; neighbours too thin to see become one."""
    count = len(trace.devices)
    row = min(22.0, max(4.0, 480.0 / count))
    thinnest = max(1.0, 1000.0 * count / _STILL_RECTANGLES)
    scale = 1000.0 / trace.end if trace.end else 0.0
    rectangles: list[Html] = []
    pending: dict[int, tuple[float, float, str]] = {}

    def draw(device: int, x: float, width: float, op: str) -> None:
        rectangles.append(
            tag(
                "rect",
                x=f"{x:.2f}",
                y=f"{device * row + 1:.1f}",
                width=f"{width:.2f}",
                height=f"{row - 2:.1f}",
                cls=OPERATIONS[op].colour,
            )
        )

    def flush(device: int) -> None:
        if device in pending:
            x, end, op = pending.pop(device)
            draw(device, x, max(end - x, 0.5), op)

    for event in sorted(trace.events, key=lambda e: (e.device, e.start, e.end)):
        if event.lane == LINK or event.work <= 0:
            continue
        x, width = event.ready * scale, event.work * scale
        if event.device in pending and (width >= thinnest or x > pending[event.device][0] + thinnest):
            flush(event.device)
        if width >= thinnest:
            draw(event.device, x, width, event.op)
        else:
            first, _, op = pending.get(event.device, (x, x, event.op))
            pending[event.device] = (first, x + width, op)
    for device in sorted(pending):
        flush(device)
    return tag(
        "svg",
        *rectangles,
        viewBox=f"0 0 1000 {count * row:.0f}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"Predicted step, one row per device: {', '.join(trace.devices)}",
        cls="still",
    )
