"""Seconds that no plan at a point of the space can beat, and that no given plan can."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import tensor
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, LayerTable, layer_table
from planner.costs.stage_memory import of_stage
from planner.costs.static_memory import static_bytes
from planner.orders import synchronisation
from planner.orders.schedules import Schedule
from planner.placement.devices import choose
from planner.placement.filling import flight
from planner.placement.freeing import worth_a_checkpoint
from planner.search.room import Need, need
from planner.search.space import Block, Candidate
from planner.values.cluster import Cluster
from planner.values.plan import asynchronous
from planner.values.profile import Profile

Floats = npt.NDArray[np.float64]


class Bounds:
    """Bounds for all points of a space: what many points share is made once."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self.profile, self.cluster = profile, cluster
        self.seams = _seams(profile)
        self.known: dict[tuple[object, ...], _Passes] = {}
        self.seconds: dict[tuple[object, ...], float] = {}
        self.needs: dict[tuple[object, ...], Need] = {}

    def need(self, point: Candidate) -> Need:
        """Return what plans at a point need of the roomiest device's memory (`planner.search.room`)."""
        key = "need", *self._sort(point), point.agreed, frozenset(point.savings)
        if key not in self.needs:
            profile, _ = self._seen(point)
            room = _roomiest(self.cluster, point.devices)
            self.needs[key] = need(point, profile, point.batch // point.m, room)
        return self.needs[key]

    def repeating(self, point: Candidate) -> float:
        """Return seconds that no plan at a point can beat that repeats the forwards that its savings say, 0 if none.

        Where whole stages or blocks are recomputed, the devices compute that besides; a layer's repetition takes at
        least the less of its forward and of what its own checkpoint repeats. Of single layers, those that free most
        for their time, until the plan can fit; infinite where it cannot.
        """
        wanted = {"recompute", "recompute-blocks", "recompute-layers"} & set(point.savings)
        if not wanted or point.how.devices == "chosen":
            return 0.0
        key = "repeating", *self._sort(point), point.agreed, frozenset(point.savings)
        if key not in self.seconds:
            self.seconds[key] = self._repeating(point, wanted)
        return self.seconds[key]

    def _repeating(self, point: Candidate, wanted: set[str]) -> float:
        profile, threads = self._seen(point)
        speed, _ = _fastest(self.cluster, point.devices)
        samples = point.batch // point.m
        table = layer_table(profile, samples, threads)
        again = np.minimum(np.diff(table.forward[MEDIAN])[:-1], np.diff(table.recompute[MEDIAN])[:-1])
        if "recompute" in wanted:
            repeated = float(again.sum())
        elif "recompute-blocks" in wanted:
            blocks = worth_a_checkpoint(self.profile, samples)
            repeated = sum(float(again[block.start : block.stop].sum()) for block in blocks)
        else:
            repeated = _least_repeated(again, *self.need(point))
        both = float(self._passes(point, (point.m,)).both[0]) + max(0.0, repeated - self.seams) / speed
        return point.m * both * point.tensor_count / point.devices

    def _sort(self, point: Candidate) -> tuple[object, ...]:
        """What decides about a point's work and needs."""
        return point.strategy, point.k, point.m, point.replicas, point.chunks, point.tensor, point.batch

    def _seen(self, point: Candidate) -> tuple[Profile, int]:
        """The model as a point's devices see it, and their threads."""
        tensor_count = point.tensor_count
        profile = _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile
        return profile, _fastest(self.cluster, point.devices)[1]

    def of(self, block: Block) -> Floats:
        """Return seconds that no plan of a block can beat, one for each of its M, whatever it saves.

        All devices together must compute every layer for every micro-batch; where steps do not overlap, one micro-batch
        must pass through all layers one after the other (of split backwards only the gradients of inputs), and a
        pipeline is filled and drained. Devices that split tensors count as one, with its collectives. The fastest
        device's speed counts for all.
        """
        point, ms = block.point, np.array(block.ms)
        schedule, _ = point.arranged
        passes = self._passes(point, block.ms)
        both, n = passes.both, ms / point.replica_count
        shared = ms * both * point.tensor_count / point.devices
        if point.asynchronous:
            return shared  # micro-batches of several steps are on their way at once
        if point.how.devices == "chosen" or point.depth < 2:
            return np.maximum(shared, both)
        filled = n * both / point.depth + passes.leading(point.depth, schedule)
        bounds = np.maximum(shared, np.maximum(passes.through, filled))
        if schedule.placement != "straight":
            return bounds
        return np.maximum(bounds, _filled(passes.forward if schedule.splits else both, both, point.depth, n))

    def lack(self, block: Block, agreed: str, *, on_host: bool) -> float:
        """Return the least share of its memory that the fullest device of a plan is filled with, whatever M is.

        Parameters, gradients and the optimizer's state, which may be `on_host`, of the whole model are there at the end
        of the last backward, spread over a pipeline and over those that split tensors or shard the states.
        """
        point = block.point
        shards = synchronisation.get(point._replace(synchronisation=agreed).agreed).shards
        held = self._held(point)
        parts = {"parameters": held[0], "gradients": held[1], "optimizer": 0.0 if on_host else held[2]}
        kept = sum(size / (point.replica_count if part in shards else 1) for part, size in parts.items())
        return kept / point.depth / _roomiest(self.cluster, point.devices)

    def _held(self, point: Candidate) -> tuple[float, float, float]:
        """Bytes of parameters, gradients and optimizer state of the model that a device sees; gradients at least."""
        tensor_count = point.tensor_count
        profile = _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile

        def make() -> tuple[float, float, float]:
            layers = profile.layers
            fields = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
            one, two, three = (float(sum(getattr(layer, field) for layer in layers)) for field in fields)
            return one, two, three

        return memoised(profile, "held", make)

    def _passes(self, point: Candidate, ms: tuple[int, ...]) -> _Passes:
        """Seconds of passes over the whole model, for each number of micro-batches."""
        speed, threads = _fastest(self.cluster, point.devices)
        (schedule, _), tensor_count = point.arranged, point.tensor_count
        key = tensor_count, point.devices if tensor_count > 1 else 0, speed, threads, schedule.splits, point.batch, ms
        if key not in self.known:
            profile = (
                _split(self.profile, self.cluster, point.devices, tensor_count) if tensor_count > 1 else self.profile
            )
            tables = [layer_table(profile, point.batch // m, threads) for m in ms]
            self.known[key] = _Passes.of(tables, schedule.splits, self.seams, speed)
        return self.known[key]


def _least_repeated(seconds: Floats, lack: float, freed: Floats) -> float:
    """Return the seconds of the layers that bring `lack` down to 1 in the least time, parts of layers allowed."""
    missing, total = lack - 1, 0.0
    for layer in np.argsort(seconds / np.maximum(freed, 1e-300)).tolist():
        if missing <= 0:
            break
        part = min(1.0, missing / freed[layer]) if freed[layer] > 0 else 1.0
        missing, total = missing - part * freed[layer], total + part * float(seconds[layer])
    return total if missing <= 1e-9 else float("inf")


class _Passes(NamedTuple):
    """Least seconds of passes over all layers: a forward, both ways as far as they follow each other, all computing.

    Of each number of micro-batches; `before` those of what leads to each layer and back from it.
    """

    forward: Floats
    through: Floats
    both: Floats
    before: Floats
    means: dict[tuple[int, bool], Floats]

    @classmethod
    def of(cls, tables: list[LayerTable], splits: bool, seams: float, speed: float) -> _Passes:
        forward = np.array([table.forward[MEDIAN] for table in tables])
        back = np.array([table.backward[MEDIAN] for table in tables])
        chain = back
        if splits:
            first = np.array([table.backward_input[MEDIAN] for table in tables])
            second = np.array([table.backward_weight[MEDIAN] for table in tables])
            whole, chain = np.diff(back), np.diff(first)
            back = _sums(np.minimum(whole, chain + np.diff(second)))
            chain = _sums(np.minimum(whole, chain))
        before = forward if splits else forward + back

        def quick(seconds: Floats) -> Floats:
            return np.maximum(0.0, seconds - seams) / speed

        return cls(
            quick(forward[:, -1]), quick((forward + chain)[:, -1]), quick((forward + back)[:, -1]), quick(before), {}
        )

    def leading(self, depth: int, schedule: Schedule) -> Floats:
        """Mean over a pipeline's devices of what leads to the first compute of each and back from its last.

        A stage has a layer at least, so as many layers as devices come before a device's first stage; where two copies
        run against each other, before the nearer of its two. All devices being done by the same time, and together
        having all the work, the step takes at least the mean of both.
        """
        key = depth, schedule.copies > 1
        if key not in self.means:
            first = np.arange(depth)
            nearest = np.minimum(first, depth - 1 - first) if schedule.copies > 1 else first
            self.means[key] = self.before[:, nearest].mean(axis=1)
        return self.means[key]


def _sums(seconds: Floats) -> Floats:
    return np.concatenate([np.zeros((len(seconds), 1)), np.cumsum(seconds, axis=1)], axis=1)


def bound(point: Candidate, profile: Profile, cluster: Cluster) -> float:
    """Return seconds that no plan at this point can beat, whatever it saves."""
    block = Block(point._replace(synchronisation="", savings=(), m=0), (point.m,), (), ())
    return float(Bounds(profile, cluster).of(block)[0])


def _split(profile: Profile, cluster: Cluster, count: int, tensor_count: int) -> Profile:
    """The profile that devices see which split tensors; unsplit where that is not possible, which its plan will say."""
    names = tuple(device.name for device in choose(cluster, count))
    try:
        return tensor.split(profile, (names[:tensor_count],), cluster.only(names))
    except PlanError:
        return profile


def _filled(passing: Floats, both: Floats, depth: int, share: Floats) -> Floats:
    """Return a bound on a pipeline's step from what fills and drains its last stage.

    If a micro-batch costs the last stage d seconds, it is busy for `share x d`, and what comes before its first and
    behind its last micro-batch passes all other stages: at least `passing - d` (of split backwards only the forward, as
    the rest may be done meanwhile). The other stages share `both - d`, so the slowest of them is busy for at least
    `share x (both - d) / (depth - 1)`. The least of the larger of the two is where they are equal.
    """
    equal = (share * both / (depth - 1) - passing) / ((share - 1) + share / (depth - 1))
    found = np.maximum(passing, passing + (share - 1) * np.maximum(0.0, equal))
    return np.where(equal <= both, found, share * both / depth)


def _fastest(cluster: Cluster, count: int) -> tuple[float, int]:
    """Speed and threads of the fastest of the `count` devices that a plan takes, kept with the cluster."""

    def make() -> tuple[float, int]:
        devices = choose(cluster, count)
        return max(d.speed for d in devices), max(d.threads for d in devices)

    return memoised(cluster, ("fastest", count), make)


def _roomiest(cluster: Cluster, count: int) -> float:
    """Bytes of the largest of the devices that a plan takes, kept with the cluster."""
    return memoised(
        cluster, ("roomiest", count), lambda: float(max(device.memory_bytes for device in choose(cluster, count)))
    )


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
    sums = [table.forward[MEDIAN] + table.backward[MEDIAN]]
    if splits:
        sums.append(table.forward[MEDIAN] + table.backward_input[MEDIAN] + table.backward_weight[MEDIAN])
    ranges = placed.ranges
    share = plan.microbatches // plan.replicas
    found = 0.0
    for row in range(plan.depth):
        held = plan.stages_of[row]
        copies = placed.schedule.copies
        work = sum(min(_part(one, ranges[s], profile) for one in sums) for s in held) / copies
        leading = table.forward[MEDIAN] if splits else sums[0]
        before = leading[ranges[min(held)].start] if copies == 1 and not asynchronous(plan) else 0.0
        work += sum(_repeated(table, run) for s in held for run in placed.checkpoints[s]) / copies
        own = speeds[plan.groups[row][0]]
        found = max(found, share * max(0.0, work - seams) / own + max(0.0, float(before) - seams) / speed)
    return max(found, _reducing(placed, sums, seams))


def _repeated(table: LayerTable, run: range) -> float:
    """Seconds of repeating a checkpoint's forward, its last layer as far as needed (`StageCosts.recompute`)."""
    last = run[-1]
    again = table.recompute[MEDIAN, last + 1] - table.recompute[MEDIAN, last]
    return float(table.forward[MEDIAN, last] - table.forward[MEDIAN, run.start] + again)


def _reducing(placed: Placed, sums: list[Floats], seams: float) -> float:
    """Return seconds that gradients between hosts make a plan's step take at least, 0 where they make none.

    A stage whose replicas are on h hosts brings its gradients over h - 1 of them per pass at least, whatever the
    pattern; all stages' go over the NICs of all these hosts. None begins before the last backward of its stage, and
    before that come all others of a row that holds it.
    """
    plan, agreed = placed.plan, placed.synchronisation
    if asynchronous(plan) or agreed.server or placed.schedule.updates == "microbatch" or not placed.overlaps:
        return 0.0
    host_of, bandwidth = placed.cluster.routes.host_of, _leaving(placed.cluster)
    passes = 1 if "gradients" in agreed.shards else 2
    leaving, begins, hosts = 0.0, [], set[str]()
    for s, layers in enumerate(placed.ranges):
        own = {host_of[name] for row in placed.holders[s] for name in plan.groups[row]}
        spans = [len({host_of[plan.groups[row][rank]] for row in placed.holders[s]}) for rank in range(plan.tensor)]
        if max(spans) < 2:
            continue
        size = sum(placed.profile.layers[i].gradient_bytes for i in layers)
        leaving += sum(passes * (count - 1) * size for count in spans)
        hosts |= own
        share = plan.microbatches // plan.replicas // placed.schedule.copies
        speed = max(placed.cluster.speeds[plan.groups[row][0]] for row in placed.holders[s])
        least = min(_part(one, layers, placed.profile) for one in sums)
        begins.append((share - 1) * max(0.0, least - seams) / speed)
    if not begins or not all(bandwidth[host] < float("inf") for host in hosts):
        return 0.0
    return min(begins) + leaving / sum(bandwidth[host] for host in hosts)


def _leaving(cluster: Cluster) -> dict[str, float]:
    """Bytes/s that can leave each host: over all its links to nodes outside, infinite where one is not shared."""

    def make() -> dict[str, float]:
        home = {**cluster.routes.host_of, **{host.name: host.name for host in cluster.hosts}}
        found = dict.fromkeys((host.name for host in cluster.hosts), 0.0)
        for link in cluster.links:
            ends = [home.get(end, "") for end in link.between]
            if ends[0] != ends[1]:
                for end in filter(None, ends):
                    found[end] += link.bandwidth_bytes_per_s if link.shared else float("inf")
        return found

    return memoised(cluster, "leaving hosts", make)


def plan_lack(placed: Placed) -> float:
    """Return the least share of its memory that a plan's fullest row fills, without walking its program.

    What is always there, and what one of its stages keeps of the micro-batches that it has at once.
    """
    plan = placed.plan
    rows = len(plan.groups) if plan.uneven else plan.depth
    of = [of_stage(placed, stage) for stage in range(len(placed.ranges))]
    resident = flight(plan).resident
    static = static_bytes(placed, of, rows).sum(axis=1)
    trains = placed.schedule.trains
    return max(
        (float(static[row]) + (max(resident[s] * of[s].kept for s in plan.stages_of[row]) if trains else 0.0))
        / placed.capacities[row]
        for row in range(rows)
    )


def _part(sums: npt.NDArray[np.float64], layers: range, profile: Profile) -> float:
    """Seconds of a run of layers, with the loss behind the last."""
    last = layers.stop == len(profile.layers)
    return float(sums[layers.stop + last] - sums[layers.start])
