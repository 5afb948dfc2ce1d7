"""How stale the gradients of an asynchronous plan are."""

from __future__ import annotations

import bisect
import statistics
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from planner.orders import schedules
from planner.orders.action import parse
from planner.orders.operations import FORWARD, OPERATIONS, PULL, PUSH
from planner.programs.lowering import unroll
from planner.values.outcome import Outcome
from planner.values.plan import Plan, full, windows
from planner.values.trace import COMPUTE, Event, Trace


def staleness(outcome: Outcome) -> float:
    """Return how many updates a gradient's parameters lack when it is applied: the mean over the steady steps.

    In a pipeline, the updates of the micro-batch's stage before its own that are not in the version that its gradient
    is computed with (`Schedule.reads`): PipeDream's stage s of p lacks p - 1 - s, with vertical sync p - 1 (Harlap et
    al., arXiv 1806.03377, section 3.3), PipeDream-2BW's 1 (arXiv 2006.09503); one more where replicas reduce beside the
    next backward. With a parameter server, the other
    workers' pushes between the begin of a worker's pull and its own push: K - 1 for K equal workers (Dutta et al.,
    arXiv 1803.01113). What happens at the same moment happens in the program's order, row by row: a worker's pull
    sees its own push before it, and not those of the rows behind.
    """
    if outcome.source != "simulated":  # one step of those that overlap: the rest follows from the order of the rows
        outcome = msgspec.structs.replace(outcome, steps=(_in_order(outcome.plan),), step_times_s=())
    lags = list(_of_server(outcome)) or list(_of_pipeline(outcome))
    return statistics.fmean(lags) if lags else 0.0


def _in_order(plan: Plan) -> Trace:
    """A trace in which every action of the unrolled program takes a second."""
    return Trace(
        devices=plan.devices,
        events=tuple(
            Event(device, COMPUTE, str(action), float(i), float(i), i + 1.0)
            for device, row in enumerate(unroll(plan).rows)
            for i, action in enumerate(row)
        ),
    )


def _of_server(outcome: Outcome) -> Iterator[int]:
    plan = outcome.plan
    pulls: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)
    pushes: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
    for place, event in enumerate(outcome.trace.events):  # row by row, each in its program's order
        stage, op, m = parse(event.action)[:3]
        if op == PULL:
            pulls[event.device, stage].append((event.ready, place))
        elif op == PUSH:
            pushes[stage].append((event.end, place, event.device, m or 0))
    for stage, every in pushes.items():
        every.sort()
        turn: dict[int, int] = defaultdict(int)
        for before, (*_, device, m) in enumerate(every):
            pulled = pulls[device, stage][turn[device]]
            turn[device] += 1
            if steady(plan, m):
                yield before - bisect.bisect_left(every, pulled)


def _of_pipeline(outcome: Outcome) -> Iterator[int]:
    plan = outcome.plan
    reads = schedules.get(plan.schedule).reads
    forwards: dict[tuple[int, int], tuple[float, int]] = {}
    updates: dict[tuple[int, int], list[float]] = defaultdict(list)
    backwards: dict[tuple[int, int], list[tuple[float, int]]] = defaultdict(list)
    for event in outcome.trace.events:
        if event.lane != COMPUTE:
            continue
        stage, op, m = parse(event.action)[:3]
        if op == FORWARD:
            forwards[stage, m or 0] = event.ready, event.device
        elif OPERATIONS[op].gradients == "adds":
            backwards[event.device, stage].append((event.end, m or 0))
        elif OPERATIONS[op].gradients == "uses":
            updates[event.device, stage].append(event.ready)
    for (device, stage), every in backwards.items():
        each = len(every) // len(updates[device, stage]) if updates[device, stage] else 0  # backwards for one update
        for turn, (_, m) in enumerate(sorted(every)):
            if not steady(plan, m):
                continue
            if reads == "window before" or not each:
                yield int(reads == "window before")
                continue
            home = 0 if reads == "input stage" else stage
            read, reader = forwards[home, m]
            known = bisect.bisect_right(updates[reader, home], read)
            if home != stage:
                # A stage of r holders updates once for every r micro-batches, and takes what it has.
                known = known * len(plan.holders[home]) // len(plan.holders[stage])
                known = min(known, bisect.bisect_right(updates[device, stage], forwards[stage, m][0]))
            yield turn // each - known


def steady(plan: Plan, microbatch: int) -> bool:
    """Whether a micro-batch belongs to a step that neither fills nor drains the pipeline."""
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    return microbatch % (share * windows(plan)) // share in full(plan)
