"""Seconds that a plan's copies to its hosts, and its updates there, make a step take, before its program is made."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from planner.costs.placed import Placed
from planner.costs.stage_memory import of_stage
from planner.orders import schedules
from planner.placement.flight import ARRANGED
from planner.search.room import swapped
from planner.values.plan import asynchronous


def copying(placed: Placed) -> float:
    """Return seconds for which the busiest device's link to its host carries copies one way, or a host's memory all.

    Every copy goes to the host and comes back; all of a host's devices pass its memory, and so does what their updates
    there read and write. 0 where nothing is copied, and where how often is not known without the program: in steps that
    overlap, in stages with different numbers of replicas, and where what is swapped is repeated, too.
    """
    plan, cluster = placed.plan, placed.cluster
    if asynchronous(plan) or plan.uneven or not placed.schedule.trains or not (plan.offload or plan.host_optimizer):
        return 0.0
    of = [of_stage(placed, stage) for stage in range(len(placed.ranges))]
    shape = schedules.Shape(plan.depth, plan.microbatches // plan.replicas, plan.chunks, seconds=plan.stage_seconds)
    one_way = np.zeros(plan.depth)
    if plan.offload and not plan.recomputes and shape.stages * shape.microbatches <= ARRANGED:
        one_way = np.array([own.kept for own in of]) @ swapped(plan.schedule, shape)
    through = 2 * one_way
    if plan.host_optimizer and not placed.synchronisation.server:
        for row, held in enumerate(plan.stages_of[: plan.depth]):
            for stage in held:
                own, shards = (
                    of[stage],
                    len(placed.holders[stage]) if "optimizer" in placed.synchronisation.shards else 1,
                )
                through[row] += (3 * own.parameters + 2 * own.gradients + 2 * own.optimizer) / shards
    routes = cluster.routes
    slowest = [
        size / min((rate for name in group for rate in _links(placed, name)), default=float("inf"))
        for size, group in zip(one_way.tolist(), plan.groups, strict=False)
    ]
    on_host: dict[str, float] = defaultdict(float)
    for row, group in enumerate(plan.groups):
        for name in group:
            on_host[routes.host_of[name]] += float(through[row % plan.depth])
    rate = {host.name: host.memory_bytes_per_s for host in cluster.hosts}
    return max(*slowest, *(size / rate[host] for host, size in on_host.items()))


def _links(placed: Placed, device: str) -> list[float]:
    """Bytes/s of the links between a device and its host whose times are a latency and a bandwidth."""
    links = map(placed.cluster.link_of, placed.cluster.routes.to_host(device))
    return [link.bandwidth_bytes_per_s for link in links if not link.points]
