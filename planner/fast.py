"""A plan's step time and peak memory, as fast as they can be had: what a search asks thousands of times.

Nothing is shared and nothing drawn (`planner.critical_path`), and no times of single actions are kept. A step of many
micro-batches is not walked to its end: its steady state is continued (`planner.extrapolate`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner import tensor
from planner.cluster import Cluster
from planner.costs import costs_of, prices_of
from planner.critical_path import makespan, walk
from planner.extrapolate import extrapolate
from planner.linking import Linked
from planner.lowering import asynchronous, unroll
from planner.memory import MemoryModel
from planner.plan import Plan
from planner.prices import row_devices
from planner.profile import Profile
from planner.steady import steady_step

Floats = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    """Seconds of one step, and the most bytes live on each row of the program."""

    step_s: float
    peak_bytes: Floats


def evaluate(profile: Profile, plan: Plan, cluster: Cluster, linked: Linked | None = None) -> Evaluation:
    """Return a plan's step time and peaks on a cluster's first devices, as `walk` and `MemoryModel.peaks` have them.

    Of a plan without flush the step is the one in the middle. With `linked`, the plan's own program, that program is
    walked; without, one is built, and a large plan's steady state is continued where it has one. Of replicas on equal
    devices one stands for all, as nothing that they share is simulated here: `peak_bytes` are its rows'.

    Raises `PlanError` when the schedule or the cluster cannot do what the plan asks, or the program waits for ever.
    """
    devices = row_devices(plan, cluster)
    alike = not plan.uneven and len({(d.speed, d.threads, d.memory_bytes) for d in devices}) == 1
    profile = tensor.seen(profile, plan.groups, cluster)
    if linked is None:
        copies = 1 if alike else None
        continued = extrapolate(profile, plan, cluster, copies)
        if continued is not None:
            return Evaluation(*continued)
        linked = Linked(unroll(plan, replicas=copies))
    if asynchronous(plan):
        step_s = steady_step(plan, linked, walk(costs_of(profile, plan, linked.program, cluster, linked)).end)
    else:
        walked = linked.buffered() if cluster.buffered else linked
        step_s = makespan(walked, prices_of(profile, plan, linked.program, cluster, walked))
    return Evaluation(float(step_s), MemoryModel(profile, plan, linked).peaks())
