"""What keeps a plan from being faster: where its devices' time goes, the largest share first."""

from __future__ import annotations

from typing import NamedTuple

from planner.basis.units import percent, seconds
from planner.orders import schedules
from planner.orders.operations import OPERATIONS, SYNCHRONISING
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan, windows
from planner.values.trace import COMPUTE, LINK


class Limit(NamedTuple):
    """What takes a share of all devices' time, a loss or computing itself, and its words."""

    share: float
    text: str


def ideal_bubble(plan: Plan) -> float | None:
    """Return the idle share with equal stages and free transfers where it is that of filling and draining, else None.

    A pipeline of K stages that a replica's own M / R micro-batches pass is idle for (K - 1) / (M / R + K - 1) of the
    step (Huang et al., arXiv 1811.06965, section 2.3).
    """
    if schedules.get(plan.schedule).idles != "fill and drain" or plan.uneven:
        return None
    return (plan.depth - 1) / (plan.microbatches // plan.replicas + plan.depth - 1)


def _bubble(outcome: Outcome) -> str:
    plan, ideal = outcome.plan, ideal_bubble(outcome.plan)
    text = f"the bubble: devices stand idle for {percent(outcome.bubble)} of the step"
    if len(plan.stages) == 1:
        return f"{text}, waiting for parameters, gradients or each other"
    if ideal is not None:
        formula = "(K-1)/(M+K-1)" if plan.replicas == 1 else "(K-1)/(M/R+K-1)"
        shape = f"K={plan.depth}, M={plan.microbatches}" + (f", R={plan.replicas}" if plan.replicas > 1 else "")
        return f"{text}; with equal stages and free transfers it would be {formula} = {percent(ideal)} at {shape}"
    alone = schedules.get(plan.schedule).idles == "one at a time"
    return f"{text}, because one works at a time" if alone else text


def _synchronising(outcome: Outcome, seconds_by_op: dict[str, float]) -> str:
    """Say what devices do to agree: `seconds_by_op` are on the devices' own lanes."""
    done = [op for op in SYNCHRONISING if seconds_by_op.get(op, 0.0) > 0 or (op in seconds_by_op and _beside(op))]
    done.sort(key=lambda op: -seconds_by_op[op])
    named = " and ".join(dict.fromkeys(OPERATIONS[op].words for op in done)) or "agreeing with other devices"
    return f"synchronising: devices wait for {percent(outcome.synchronising)} of the step, {named}"


def _beside(op: str) -> bool:
    """Whether an operation's transfer runs beside the device's own lane."""
    return OPERATIONS[op].lane == LINK


def limits(outcome: Outcome, cluster: Cluster) -> list[Limit]:
    """Return what takes the devices' time, the largest share first: their own computing, and losses of 2 % and more."""
    trace = outcome.trace
    if not trace.events:
        own = 1.0 - outcome.bubble - outcome.synchronising
        found = [Limit(outcome.bubble, _bubble(outcome)), Limit(outcome.synchronising, _synchronising(outcome, {}))]
        found = [limit for limit in found if limit.share > 0.02]
        found.append(Limit(own, f"the devices' own work: {percent(own)} of their time"))
        return sorted(found, key=lambda limit: -limit.share)
    count, whole = len(trace.devices), trace.end * len(trace.devices)
    computed = trace.computing
    busiest = max(range(count), key=lambda d: computed[d])
    found = []
    uneven = sum(computed[busiest] - own for own in computed) / whole
    if uneven > 0.02:
        over = computed[busiest] / (sum(computed) / count) - 1
        name = trace.devices[busiest]
        found.append(Limit(uneven, f"uneven devices: {name} works {percent(over)} more than the mean"))
    idle = outcome.bubble - uneven
    if idle > 0.02 and count > 1:
        found.append(Limit(idle, _bubble(outcome)))
    by_op: dict[str, float] = {}
    for event in trace.events:
        if event.lane == COMPUTE:
            by_op[event.op] = by_op.get(event.op, 0.0) + event.work
    for op, operation in OPERATIONS.items():
        if operation.computes or op in SYNCHRONISING:
            continue
        share = by_op.get(op, 0.0) / whole
        if share > 0.02:
            found.append(Limit(share, f"{operation.words}: {percent(share)} of the devices' time"))
    if outcome.synchronising > 0.02:
        found.append(Limit(outcome.synchronising, _synchronising(outcome, by_op)))
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
    own = sum(by_op.get(op, 0.0) for op, operation in OPERATIONS.items() if operation.computes) / whole
    if found:
        found.append(Limit(own, f"the layers' own computing: {percent(own)} of the devices' time"))
    found.sort(key=lambda limit: -limit.share)
    if not found:
        work = seconds(max(computed) / windows(outcome.plan))
        found.append(Limit(0.0, f"the layers' own computing: {work} of the {seconds(outcome.step_s)} step"))
    return found


def bounded_by(outcome: Outcome, cluster: Cluster) -> str:
    """Say the two largest shares of the devices' time."""
    return "; and by ".join(limit.text for limit in limits(outcome, cluster)[:2])
