"""How stale the gradients of an asynchronous plan are."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict

from planner.orders.action import parse
from planner.values.outcome import Outcome
from planner.values.trace import COMPUTE


def staleness(outcome: Outcome) -> float:
    """Return how many updates a gradient's parameters lack when it is applied: the mean over the trace.

    In a pipeline, the updates of a stage between a micro-batch's forward and the end of its backward (with weight
    stashing the backward uses the forward's parameters, so that is what it lacks); with a parameter server, the other
    workers' pushes between a worker's pull and its own push.
    """
    forwards: dict[tuple[int, int, int], float] = {}
    updates: dict[tuple[int, int], list[float]] = defaultdict(list)
    pushes: dict[int, list[tuple[float, int]]] = defaultdict(list)
    backwards: list[tuple[int, int, int, float]] = []
    pulls: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in outcome.trace.events:
        if event.lane != COMPUTE:
            continue
        stage, op, m, _ = parse(event.action)
        if op == "F":
            forwards[event.device, stage, m or 0] = event.ready
        elif op in ("B", "W"):
            backwards.append((event.device, stage, m or 0, event.end))
        elif op == "OPTIMIZER":
            updates[event.device, stage].append(event.ready)
        elif op == "PULL":
            pulls[event.device, stage].append(event.end)
        elif op == "PUSH":
            pushes[stage].append((event.end, event.device))
    if any(pushes.values()):
        lags = []
        for stage, every in pushes.items():
            ends = sorted(end for end, _ in every)
            for end, device in every:
                own = pulls[device, stage]
                before = bisect.bisect_left(own, end)  # the next pull may come at once
                pulled = own[before - 1] if before else 0.0
                lags.append(bisect.bisect_left(ends, end) - bisect.bisect_right(ends, pulled))
        return statistics.fmean(lags)
    found = []
    for device, stage, m, end in backwards:
        own = sorted(updates[device, stage])
        found.append(bisect.bisect_left(own, end) - bisect.bisect_right(own, forwards[device, stage, m]))
    return statistics.fmean(found) if found else 0.0
