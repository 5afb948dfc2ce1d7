"""A plan's step time and peaks without SimPy."""

from __future__ import annotations

from typing import NamedTuple

from planner import tensor
from planner.cluster import Cluster
from planner.costs import costs_of, row_devices
from planner.critical_path import walk
from planner.linking import Linked
from planner.lowering import asynchronous, unroll
from planner.memory import MemoryModel
from planner.plan import Plan
from planner.profile import Profile
from planner.steady import steady_step


class Evaluation(NamedTuple):
    """Seconds per step where nothing is shared, and each row's peak bytes."""

    step_s: float
    peak_bytes: tuple[float, ...]


def evaluate(profile: Profile, plan: Plan, cluster: Cluster, linked: Linked | None = None) -> Evaluation:
    """Predict a plan with the compiled interpreter.

    Of replicas on equal devices one stands for all: nothing that they share is simulated here.
    """
    devices = row_devices(plan, cluster)
    alike = not plan.uneven and len({(d.speed, d.threads, d.memory_bytes) for d in devices}) == 1
    program = unroll(plan, replicas=1 if alike else None)
    profile = tensor.seen(profile, plan.groups, cluster)
    costs = costs_of(profile, plan, program, cluster, linked)
    walked = walk(costs)
    step = steady_step(plan, costs.linked, walked.end) if asynchronous(plan) else walked.step_s
    return Evaluation(step, tuple(MemoryModel(profile, plan, costs.linked).peaks().tolist()))
