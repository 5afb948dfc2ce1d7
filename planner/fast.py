"""A plan's step time and peaks without SimPy."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from planner import tensor
from planner.cluster import Cluster
from planner.costs import costs_of
from planner.critical_path import walk
from planner.linking import Linked
from planner.lowering import asynchronous, unroll
from planner.memory import MemoryModel
from planner.plan import Plan
from planner.profile import Profile
from planner.simulate import placed
from planner.steady import steady_step


class Evaluation(NamedTuple):
    """Seconds per step where nothing is shared, and each row's peak bytes."""

    step_s: float
    peak_bytes: tuple[float, ...]


def evaluate(profile: Profile, plan: Plan, cluster: Cluster, linked: Linked | None = None) -> Evaluation:
    """Predict a plan with the compiled interpreter.

    Of replicas on equal devices one stands for all: nothing that they share is simulated here.
    """
    taken = placed(plan, cluster)
    depth = len(plan.groups) if plan.uneven else plan.depth
    alike = len({(d.speed, d.threads, d.memory_bytes) for d in taken.devices}) == 1
    if alike and depth < len(taken.devices):
        taken = msgspec.structs.replace(taken, devices=taken.devices[:depth])
        program = unroll(plan, replicas=1)
    else:
        program = unroll(plan)
    profile = tensor.seen(profile, plan.groups, cluster)
    costs = costs_of(profile, plan, program, taken, linked)
    walked = walk(costs)
    step = steady_step(plan, costs.linked, walked.end) if asynchronous(plan) else walked.step_s
    return Evaluation(step, tuple(MemoryModel(profile, plan, costs.linked).peaks().tolist()))
