"""A prediction of a step too large for SimPy: its time, peaks and idle share, and a timeline if it can be drawn."""

from __future__ import annotations

from planner import tensor
from planner.cluster import Cluster
from planner.costs import costs_of
from planner.critical_path import walk
from planner.fast import evaluate
from planner.linking import Linked
from planner.lowering import asynchronous, unroll, windows
from planner.memory import KINDS, MemoryModel
from planner.outcome import Outcome
from planner.plan import Plan
from planner.profile import Profile
from planner.simulate import capacities
from planner.trace import COMPUTE, Event, MemoryPoint, Trace

DRAWN = 100_000
"""Actions up to which the first replica's timeline and memory curve are kept."""


def outline(profile: Profile, plan: Plan, cluster: Cluster) -> Outcome:
    """Predict a step as `planner.fast` does: nothing is shared, every duration is the median.

    The trace is the first replica's, where replicas are alike. Where even that is too long to be drawn, it has no
    events, and of the memory only every device's peak.
    """
    step_s, peaks = evaluate(profile, plan, cluster)
    seen = tensor.seen(profile, plan.groups, cluster)
    rows = len(peaks)
    program = unroll(plan, replicas=1 if rows < len(plan.groups) else None)
    linked = Linked(program)
    costs = costs_of(seen, plan, program, cluster, linked)
    names = plan.devices[:rows]
    if len(linked.flat) <= DRAWN:
        walked = walk(costs)
        where, every = linked.row.tolist(), zip(linked.actions, walked.ready.tolist(), walked.end.tolist(), strict=True)
        events = tuple(
            Event(row, COMPUTE, str(action), ready, ready, end)
            for row, (action, ready, end) in zip(where, every, strict=True)
        )
        memory = MemoryModel(seen, plan, linked).curve(walked.ready.tolist(), walked.end.tolist())
    else:
        events = ()
        memory = tuple(
            MemoryPoint(row, 0.0, (*[0.0] * (len(KINDS) - 1), float(peak))) for row, peak in enumerate(peaks)
        )
    worked = float(costs.seconds.sum()) / windows(plan)
    trace = Trace(devices=names, events=events, memory=memory)
    return Outcome(
        plan=plan,
        source="simulated",
        steps=(trace,),
        profiled_s=costs.by_operation if events else {},
        interval_s=(step_s, step_s),
        capacity_bytes=capacities(plan, cluster)[:rows],
        step_times_s=(step_s,) if asynchronous(plan) or not events else (),
        idle=max(0.0, 1.0 - worked / (rows * step_s)) if step_s else 0.0,
        samples_s=(step_s,),
        estimated=profile.estimated,
    )
