"""A prediction of a step too large for SimPy: its time, peaks and idle share, and a timeline if it can be drawn."""

from __future__ import annotations

import numpy as np

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.orders.operations import OPERATIONS
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.evaluate import evaluate
from planner.simulate.longest_path import walk
from planner.values.outcome import Outcome, rooms
from planner.values.plan import asynchronous, windows
from planner.values.trace import COMPUTE, KINDS, Event, MemoryPoint, Trace

DRAWN = 100_000
"""Actions up to which the first replica's timeline and memory curve are kept."""


def outline(placed: Placed) -> Outcome:
    """Predict a step as `planner.simulate.evaluate` does: sharing is a bound, every duration the median.

    The trace is the first replica's, where replicas are alike. Where even that is too long to be drawn, it has no
    events, and of the memory only every device's peak.
    """
    plan = placed.plan
    step_s, peaks, kept = evaluate(placed)
    rows = len(peaks)
    linked = Linked(unroll(plan, replicas=1 if rows < len(plan.groups) else None))
    costs = costs_of(placed, linked)
    names = plan.devices[:rows]
    if len(linked.flat) <= DRAWN:
        walked = walk(costs)
        where, every = linked.row.tolist(), zip(linked.actions, walked.ready.tolist(), walked.end.tolist(), strict=True)
        events = tuple(
            Event(row, COMPUTE, str(action), ready, ready, end)
            for row, (action, ready, end) in zip(where, every, strict=True)
        )
        memory = MemoryModel(placed, linked).curve(walked.ready.tolist(), walked.end.tolist())
    else:
        events = ()
        memory = tuple(
            MemoryPoint(row, 0.0, (*[0.0] * (len(KINDS) - 1), float(peak))) for row, peak in enumerate(peaks)
        )
    computed, exchanged = (
        seconds / windows(plan) / rows for seconds in (float(costs.seconds.sum()), _exchanged(costs))
    )
    trace = Trace(devices=names, events=events, memory=memory)
    return Outcome(
        plan=plan,
        source="simulated",
        steps=(trace,),
        profiled_s=costs.by_operation if events else {},
        interval_s=(step_s, step_s),
        capacity_bytes=placed.capacities[:rows],
        hosts=rooms(kept, placed.host_capacities),
        step_times_s=(step_s,) if asynchronous(plan) or not events else (),
        idle=max(0.0, 1.0 - (computed + exchanged) / step_s) if step_s else 0.0,
        synchronised=exchanged / step_s if step_s else 0.0,
        samples_s=(step_s,),
        estimated=placed.profile.estimated,
    )


def _exchanged(costs: Costs) -> float:
    """Seconds, of all rows together, of the transfers that an action waits for as soon as it has posted them.

    And of those beside computing what is left when somebody comes to wait for them.
    """
    linked = costs.linked
    seconds = np.array([kind.seconds for kind in costs.kinds])
    own = linked.posts[(linked.waits >= 0) & (linked.waits == linked.posts)]
    found = float(seconds[costs.transfer_kind[own]].sum()) if len(own) else 0.0
    beside = np.array([OPERATIONS[kind.op].group == "holders" for kind in costs.kinds], bool)
    waiting = np.flatnonzero((linked.needs >= 0) & (linked.waits < 0))
    kinds = costs.transfer_kind[linked.needs[waiting]]
    waiting, kinds = waiting[beside[kinds]], kinds[beside[kinds]]
    if len(waiting):
        walked = walk(costs)
        found += float(np.minimum(walked.ready[waiting] - walked.end[waiting - 1], seconds[kinds]).sum())
    return found
