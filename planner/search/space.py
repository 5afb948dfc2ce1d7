"""The space of plans that a search ranks: every strategy, K, M, replicas, tensor split, chunks and saving.

A candidate is a point of it; making its plan costs milliseconds, so each has a bound that costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import tensor
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, LayerTable, layer_table
from planner.orders import schedules, synchronisation
from planner.placement import savings, strategies
from planner.placement.question import Question
from planner.values.cluster import Cluster
from planner.values.plan import Plan, asynchronous
from planner.values.profile import Profile

SMALL = 16
"""Up to so many devices every K is tried; beyond, powers of two and all of them."""


class Space(NamedTuple):
    """What is tried: strategies by name, K, M, replicas, tensor splits, chunks, synchronisations, sets of savings."""

    strategies: tuple[str, ...]
    ks: tuple[int, ...]
    ms: tuple[int, ...]
    replicas: tuple[int, ...]
    tensors: tuple[int, ...]
    chunks: tuple[int, ...]
    synchronisations: tuple[str, ...]
    savings: tuple[tuple[str, ...], ...]


class Candidate(NamedTuple):
    """One point of the space. `bound_s` is a lower bound on its step time."""

    strategy: str
    k: int
    m: int
    replicas: int
    chunks: int
    tensor: int
    synchronisation: str
    savings: tuple[str, ...]
    bound_s: float = 0.0

    @property
    def family(self) -> str:
        """What a person would call its kind: the strategy and its savings."""
        way = (self.synchronisation,) if self.synchronisation not in ("", "all-reduce") else ()
        return "+".join((self.strategy, *way, *self.savings))

    @property
    def key(self) -> str:
        """The same point under the same name in every search; `parse` reads it."""
        return "|".join(map(str, (*self[:7], "+".join(self.savings))))

    @classmethod
    def parse(cls, key: str) -> Candidate:
        """Return the point that a key names.

        >>> Candidate.parse(Candidate("1f1b", 8, 32, 2, 1, 1, "zero-1", ("recompute",)).key).savings
        ('recompute',)
        """
        strategy, *numbers, way, chosen = key.split("|")
        k, m, replicas, chunks, split = map(int, numbers)
        return cls(strategy, k, m, replicas, chunks, split, way, tuple(chosen.split("+")) if chosen else ())


def space(profile: Profile, cluster: Cluster, batch: int, **chosen: tuple[object, ...]) -> Space:
    """Return the whole space for a profile, a cluster and a batch, each axis as `chosen` where it is given.

    K goes up to the number of devices, M over the divisors of the batch (powers of two of them, where there are many),
    tensor splits over the powers of two inside a host if layers say how they split.
    """
    count = cluster.hosts[0].cores if cluster.elastic else len(cluster.devices)
    powers = [2**i for i in range(count.bit_length())]
    ks = tuple(range(1, count + 1)) if count <= SMALL else tuple(sorted({*powers, count}))
    divisors = [m for m in range(1, batch + 1) if batch % m == 0]
    if len(divisors) > SMALL:
        divisors = sorted({m for m in divisors if m & (m - 1) == 0} | {batch})
    inside = max((sum(d.host == h.name for d in cluster.devices) for h in cluster.hosts), default=1)
    splits = any(layer.split for layer in profile.layers)
    most = max(1, len(profile.layers))
    axes: dict[str, tuple[object, ...]] = {
        "strategies": tuple(s.name for s in strategies.all_strategies()),
        "ks": ks,
        "ms": tuple(divisors),
        "replicas": tuple(sorted({1, *(k for k in ks if k <= count)})),
        "tensors": tuple(t for t in powers if t == 1 or (splits and t <= inside)),
        "chunks": tuple(v for v in (1, 2, 3, 4) if v <= most),
        "synchronisations": ("all-reduce", "zero-1"),
        "savings": savings.COMBINATIONS,
    }
    return Space(**{**axes, **{name: axis for name, axis in chosen.items() if axis}})  # type: ignore[arg-type]


def candidates(of: Space, profile: Profile, cluster: Cluster, batch: int) -> Iterator[Candidate]:
    """Yield every point that can possibly be a plan, with its bound."""
    whole = sum(len(layer.times) > 0 for layer in profile.layers)
    for name in of.strategies:
        fixed = _FIXED.get(name)
        schedule = schedules.get(name) if name in schedules.names() else None
        for k in of.ks:
            if name == "single" and k != min(of.ks):
                continue
            for ways in of.tensors:
                for replicas in _replicas(name, k, ways, of):
                    depth = k // (ways * replicas)
                    if depth * ways * replicas != k and name != "single":
                        continue
                    for chunks in _chunks(schedule, fixed, of):
                        if depth * max(1, chunks) > whole:
                            continue
                        for m in of.ms:
                            if m % replicas or batch % m:
                                continue
                            bounds: dict[bool, float] = {}
                            for way in of.synchronisations if replicas > 1 else ("",):
                                for chosen in of.savings:
                                    point = Candidate(name, k, m, replicas, chunks, ways, way, chosen)
                                    more = "recompute" in chosen  # all else that is saved costs nothing for sure
                                    if more not in bounds:
                                        bounds[more] = bound(point, profile, cluster, batch)
                                    yield point._replace(bound_s=bounds[more])


_FIXED = {"single": 1, "data-parallel": 1, "naive": 1, "balanced": 1}


def _replicas(name: str, k: int, tensor: int, of: Space) -> tuple[int, ...]:
    """Replicas of a pipeline; strategies that decide about them themselves have none to choose."""
    if name in schedules.names() and name != "naive":
        return tuple(r for r in of.replicas if r * tensor <= k and (r * tensor < k or k == 1))
    return (1,)


def _chunks(schedule: schedules.Schedule | None, fixed: int | None, of: Space) -> tuple[int, ...]:
    if schedule is None or fixed is not None or schedule.chunks[1] is not None:
        return (0,)
    return tuple(v for v in of.chunks if v > 1)


def bound(point: Candidate, profile: Profile, cluster: Cluster, batch: int) -> float:
    """Return seconds that no plan at this point can beat.

    All devices together must compute every layer for every micro-batch (and repeat forwards, where all are repeated);
    where steps do not overlap, one micro-batch must pass through all layers one after the other (of split backwards
    only the gradients of inputs), and a pipeline is filled and drained. Devices that split tensors count as one, with
    its collectives. The fastest device's speed counts for all.
    """
    count = 1 if point.strategy == "single" else point.k
    speed, threads = _fastest(cluster, count)
    split = count if point.strategy == "tensor-parallel" else point.tensor
    seams = _seams(profile)
    if split > 1:
        profile = _split(profile, cluster, count, split)
    table = layer_table(profile, batch // point.m, threads)
    known = schedules.get(point.strategy) if point.strategy in schedules.names() else None
    depth = point.k // (point.tensor * point.replicas)
    forward = float(table.forward[MEDIAN, -1])
    back, way_back = float(table.backward[MEDIAN, -1]), float(table.backward[MEDIAN, -1])
    if known is not None and known.splits:
        back, way_back = memoised(profile, ("least", batch // point.m, threads), lambda: _least_backward(table))
    again = 0.0
    if "recompute" in point.savings:
        stages = point.k * max(1, point.chunks, known.chunks[0] if known else 1)
        again = memoised(profile, ("again", batch // point.m, threads, stages), lambda: _least_recompute(table, stages))
    passes = forward, forward + way_back + again, forward + back + again
    forward, through, both = (max(0.0, seconds - seams) / speed for seconds in passes)
    shared = point.m * both * split / count
    if _asynchronous(point.strategy):
        return shared  # micro-batches of several steps are on their way at once
    if known is None or depth < 2:
        return max(shared, both)
    if known.placement != "straight":
        return max(shared, through)
    return max(shared, _filled(forward if known.splits else both, both, depth, point.m // point.replicas))


def _split(profile: Profile, cluster: Cluster, count: int, ways: int) -> Profile:
    """The profile that devices see which split tensors; unsplit where that is not possible, which its plan will say."""
    taken = cluster.take(count)
    try:
        return tensor.split(profile, tuple(device.name for device in taken.devices[:ways]), taken)
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
    """Speed and threads of the fastest of the first `count` devices, kept with the cluster."""

    def make() -> tuple[float, int]:
        devices = cluster.take(count).devices
        return max(d.speed for d in devices), max(d.threads for d in devices)

    return memoised(cluster, ("fastest", count), make)


def _asynchronous(strategy: str) -> bool:
    if strategy in schedules.names():
        return schedules.get(strategy).asynchronous
    if strategy in synchronisation.names():
        return synchronisation.get(strategy).asynchronous
    return strategy == "pipedream-replicated"


def _seams(profile: Profile) -> float:
    """Most seconds that a pass over all layers can be quicker than its measured layers."""
    gains = [
        w.layers_forward_s - w.forward_s + w.layers_backward_s - w.backward_s + w.layers_forward_s - w.forward_s
        for w in profile.whole
    ]
    return max(0.0, *gains, 0.0) if gains else 0.0


def make(point: Candidate, profile: Profile, cluster: Cluster, batch: int) -> Plan:
    """Return the plan at a point. Raises `PlanError` where there is none."""
    question = Question(profile, cluster, point.k, point.m, batch, *point[3:7])
    return savings.apply(question, bare(point, profile, cluster, batch), point.savings)


def bare(point: Candidate, profile: Profile, cluster: Cluster, batch: int) -> Plan:
    """Return the plan at a point without its savings. Raises `PlanError` where there is none."""
    question = Question(profile, cluster, point.k, point.m, batch, *point[3:7])
    return strategies.get(point.strategy).spread(question)


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
