"""Seconds that no plan at a point of the space can beat, and that no given plan can."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import tensor
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, LayerTable, layer_table
from planner.orders import schedules
from planner.placement.devices import choose
from planner.search.space import Candidate
from planner.values.cluster import Cluster
from planner.values.plan import asynchronous
from planner.values.profile import Profile


def bound(point: Candidate, profile: Profile, cluster: Cluster, batch: int) -> float:
    """Return seconds that no plan at this point can beat.

    All devices together must compute every layer for every micro-batch (and repeat forwards, where all are repeated);
    where steps do not overlap, one micro-batch must pass through all layers one after the other (of split backwards
    only the gradients of inputs), and a pipeline is filled and drained. Devices that split tensors count as one, with
    its collectives. The fastest device's speed counts for all.
    """
    count, split = point.devices, point.tensor_ways
    speed, threads = _fastest(cluster, count)
    seams = _seams(profile)
    if split > 1:
        profile = _split(profile, cluster, count, split)
    table = layer_table(profile, batch // point.m, threads)
    known = schedules.get(point.how.schedule)
    depth = point.depth
    forward = float(table.forward[MEDIAN, -1])
    back, way_back = float(table.backward[MEDIAN, -1]), float(table.backward[MEDIAN, -1])
    if known.splits:
        back, way_back = memoised(profile, ("least", batch // point.m, threads), lambda: _least_backward(table))
    again = 0.0
    if "recompute" in point.savings:
        stages = point.k * max(1, point.chunks, known.chunks[0])
        again = memoised(profile, ("again", batch // point.m, threads, stages), lambda: _least_recompute(table, stages))
    passes = forward, forward + way_back + again, forward + back + again
    forward, through, both = (max(0.0, seconds - seams) / speed for seconds in passes)
    shared = point.m * both * split / count
    if point.how.asynchronous:
        return shared  # micro-batches of several steps are on their way at once
    if depth < 2 or point.how.devices == "chosen":
        return max(shared, both)
    if known.placement != "straight":
        return max(shared, through)
    return max(shared, _filled(forward if known.splits else both, both, depth, point.m // point.replicas))


def _split(profile: Profile, cluster: Cluster, count: int, ways: int) -> Profile:
    """The profile that devices see which split tensors; unsplit where that is not possible, which its plan will say."""
    names = tuple(device.name for device in choose(cluster, count))
    try:
        return tensor.split(profile, (names[:ways],), cluster.only(names))
    except PlanError:
        return profile


def _least_backward(table: LayerTable) -> tuple[float, float]:
    """Least seconds of one micro-batch's backward, whole or in two halves, and of the gradient that it passes on."""
    whole, first, second = (
        np.diff(sums[MEDIAN]) for sums in (table.backward, table.backward_input, table.backward_weight)
    )
    return float(np.minimum(whole, first + second).sum()), float(np.minimum(whole, first).sum())


def _least_recompute(table: LayerTable, stages: int) -> float:
    """Least seconds of repeating a micro-batch's forward: so many stages may each stop early in their last layer."""
    again = np.diff(table.forward[MEDIAN])[:-1]
    early = np.sort(np.maximum(0.0, again - np.diff(table.recompute[MEDIAN])[:-1]))[::-1]
    return float(again.sum() - early[:stages].sum())


def _filled(passing: float, both: float, depth: int, share: int) -> float:
    """Return a bound on a pipeline's step from what fills and drains its last stage.

    If a micro-batch costs the last stage d seconds, it is busy for `share x d`, and what comes before its first and
    behind its last micro-batch passes all other stages: at least `passing - d` (of split backwards only the forward, as
    the rest may be done meanwhile). The other stages share `both - d`, so the slowest of them is busy for at least
    `share x (both - d) / (depth - 1)`. The least of the larger of the two is where they are equal.
    """
    equal = (share * both / (depth - 1) - passing) / ((share - 1) + share / (depth - 1))
    return max(passing, passing + (share - 1) * max(0.0, equal)) if equal <= both else share * both / depth


def _fastest(cluster: Cluster, count: int) -> tuple[float, int]:
    """Speed and threads of the fastest of the `count` devices that a plan takes, kept with the cluster."""

    def make() -> tuple[float, int]:
        devices = choose(cluster, count)
        return max(d.speed for d in devices), max(d.threads for d in devices)

    return memoised(cluster, ("fastest", count), make)


def _seams(profile: Profile) -> float:
    """Most seconds that a pass over all layers can be quicker than its measured layers."""
    gains = [
        w.layers_forward_s - w.forward_s + w.layers_backward_s - w.backward_s + w.layers_forward_s - w.forward_s
        for w in profile.whole
    ]
    return max(0.0, *gains, 0.0) if gains else 0.0


def plan_bound(placed: Placed) -> float:
    """Return seconds that this plan cannot beat: its busiest row's computing, and what leads to it and back.

    A row's first compute is a forward of its first stage, behind those of all earlier stages; its last, where backwards
    are whole, that stage's backward, before those of all earlier stages.
    """
    plan, profile = placed.plan, placed.profile
    if plan.uneven:
        return 0.0
    table = layer_table(profile, plan.samples, plan.threads)
    splits = placed.schedule.splits
    speeds = placed.cluster.speeds
    speed, _ = _fastest(placed.cluster, len(plan.device_names))
    seams = _seams(profile)
    ways = [table.forward[MEDIAN] + table.backward[MEDIAN]]
    if splits:
        ways.append(table.forward[MEDIAN] + table.backward_input[MEDIAN] + table.backward_weight[MEDIAN])
    ranges = placed.ranges
    share = plan.microbatches // plan.replicas
    found = 0.0
    for row in range(plan.depth):
        held = plan.stages_of[row]
        copies = placed.schedule.copies
        work = sum(min(_part(way, ranges[s], profile) for way in ways) for s in held) / copies
        way = table.forward[MEDIAN] if splits else ways[0]
        before = way[ranges[min(held)].start] if copies == 1 and not asynchronous(plan) else 0.0
        own = speeds[plan.groups[row][0]]
        found = max(found, share * max(0.0, work - seams) / own + max(0.0, float(before) - seams) / speed)
    return found


def _part(sums: npt.NDArray[np.float64], layers: range, profile: Profile) -> float:
    """Seconds of a run of layers, with the loss behind the last."""
    last = layers.stop == len(profile.layers)
    return float(sums[layers.stop + last] - sums[layers.start])
