"""A plan's step time and peak memory, as fast as they can be had: what a search asks thousands of times.

Nothing is drawn, no times of single actions are written down, and of sharing only what is certain is known: a step
takes at least what its longest path takes (`planner.simulate.longest_path`), what its links need
(`planner.simulate.link_bound`) and what its batch takes to be made (`planner.costs.loading`).
A step of many micro-batches is not walked to its end: its steady state is continued (`planner.simulate.extrapolate`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.costs.loading import least_step
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import costs_of, prices_of
from planner.costs.stage_costs import MEDIAN
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.extrapolate import extrapolate
from planner.simulate.link_bound import busiest, crowded, everybody, link_bound
from planner.simulate.longest_path import makespan, walk
from planner.simulate.steady import steady_step
from planner.values.plan import asynchronous, windows

Floats = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    """Seconds of one step, the most bytes live on each row of the program, and on each host."""

    step_s: float
    peak_bytes: Floats
    host_bytes: dict[str, float]

    def worst(self, placed: Placed) -> tuple[float, str]:
        """Return need over capacity of the memory that is fullest, and its host's name; empty for a device's own."""
        room = placed.capacities
        own = max(peak / capacity for peak, capacity in zip(self.peak_bytes, room, strict=False))
        hosts = placed.host_capacities
        return max((float(own), ""), *((need / hosts[name], name) for name, need in self.host_bytes.items()))


def evaluate(placed: Placed, linked: Linked | None = None) -> Evaluation:
    """Return a plan's step time and peaks, as `walk` and `MemoryModel.peaks` have them.

    Of a plan without flush the step is the one in the middle. With `linked`, the plan's own program, that program is
    walked; without, one is built, and a large plan's steady state is continued where it has one. Of replicas on equal
    devices one stands for all, as nothing that they share is simulated here: `peak_bytes` are its rows'.

    Raises `PlanError` when the schedule or the cluster cannot do what the plan asks, or the program waits for ever.
    """
    plan = placed.plan
    if linked is None:
        replicas = 1 if placed.alike else None
        continued = extrapolate(placed, replicas)
        if continued is not None:
            found = Evaluation(*continued)
            return found._replace(step_s=max(found.step_s, float(least_step(placed)[MEDIAN])))
        linked = Linked(unroll(plan, replicas=replicas))
    if asynchronous(plan):
        carried = busiest(placed, linked, prices_of(placed, linked)) / windows(plan)
        step_s = max(steady_step(plan, linked, walk(costs_of(placed, linked)).end), carried)
    else:
        walked = linked.buffered() if placed.cluster.buffered else linked
        prices = prices_of(placed, walked)
        meeting = everybody(placed, prices, walked.devices)
        prices = crowded(placed, prices, meeting)
        step_s, begun = makespan(walked, prices)
        step_s = max(step_s, link_bound(placed, walked, prices, meeting, begun), least_step(placed)[MEDIAN])
    memory = MemoryModel(placed, linked)
    return Evaluation(float(step_s), memory.peaks(), memory.hosts)
