"""What keeps a plan from being faster: where its devices' time goes, the largest loss first."""

from __future__ import annotations

from typing import NamedTuple

from planner.basis.units import percent, seconds
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.trace import COMPUTE


class Limit(NamedTuple):
    """One loss: the share of all devices' time, and a sentence."""

    share: float
    text: str


def limits(outcome: Outcome, cluster: Cluster) -> list[Limit]:
    """Return the losses that matter (2 % of the devices' time and more), largest first; or that there is none."""
    trace = outcome.trace
    if not trace.events:
        return [Limit(outcome.bubble, f"the bubble: devices stand idle for {percent(outcome.bubble)} of the step")]
    count, whole = len(trace.devices), trace.end * len(trace.devices)
    busiest = max(range(count), key=lambda d: trace.busy[d])
    found: list[Limit] = []
    uneven = sum(trace.busy[busiest] - busy for busy in trace.busy) / whole
    if uneven > 0.02:
        mean = sum(trace.busy) / count
        over = trace.busy[busiest] / mean - 1
        name = trace.devices[busiest]
        found.append(Limit(uneven, f"uneven devices: {name} works {percent(over)} more than the mean"))
    idle = outcome.bubble - uneven
    if idle > 0.02 and count > 1:
        stages, m = len(outcome.plan.stages), outcome.plan.microbatches
        why = f"the bubble: devices stand idle for {percent(outcome.bubble)} of the step"
        if outcome.plan.schedule in ("gpipe", "1f1b") and stages > 1:
            ideal = (stages - 1) / (m + stages - 1)
            why += f"; with equal stages and free transfers it would be (K-1)/(M+K-1) = {percent(ideal)}"
        elif outcome.plan.schedule == "naive" and stages > 1:
            why += ", because one works at a time"
        elif stages == 1:
            why += ", waiting for parameters, gradients or each other"
        found.append(Limit(idle, why))
    by_op: dict[str, float] = {}
    for event in trace.events:
        if event.lane == COMPUTE:
            by_op[event.op] = by_op.get(event.op, 0.0) + event.work
    for op, what in (
        ("R", "recomputing forwards"),
        ("OPTIMIZER", "the optimizer"),
        ("LOAD", "loading input"),
        ("REDUCE_GRAD", "reducing gradients"),
        ("REDUCE_TIED", "adding up gradients of shared parameters"),
        ("PULL", "pulling parameters"),
        ("PUSH", "pushing gradients"),
    ):
        share = by_op.get(op, 0.0) / whole
        if share > 0.02:
            found.append(Limit(share, f"{what}: {percent(share)} of the devices' time"))
    threads = count * outcome.plan.threads
    cores = cluster.hosts[0].cores
    if cluster.elastic and threads > cores:
        share = 1 - cores / threads
        found.append(
            Limit(
                share,
                f"shared cores: {count} processes on {cores} cores, each at most {percent(cores / threads)} as fast",
            )
        )
    found.sort(key=lambda limit: -limit.share)
    if not found:
        work = seconds(max(trace.busy))
        found.append(Limit(0.0, f"the layers' own computing: {work} of the {seconds(trace.end)} step"))
    return found
