"""Where stages go: a schedule's pipeline over K devices, cut so that the slowest stage is fastest and all fit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import collectives
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, StageCosts, layer_table
from planner.orders import codes, schedules
from planner.orders import synchronisation as synchronisations
from planner.orders.codes import Order
from planner.placement import partition
from planner.programs.lowering import compute_order
from planner.values.cluster import Cluster, Device
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerProfile, Profile, interpolate, value_bytes

if TYPE_CHECKING:
    from planner.placement.partition import Table

T = TypeVar("T")


class Question(NamedTuple):
    """What a strategy is asked: K devices of a cluster, M micro-batches in a batch of so many samples.

    `replicas` copies of the pipeline, `chunks` stages per device (0: as few as the schedule takes, two where it takes
    any number), each stage's tensors split over `tensor` devices, replicas kept equal by `synchronisation`.
    """

    profile: Profile
    cluster: Cluster
    k: int
    m: int
    batch: int
    replicas: int = 1
    chunks: int = 0
    tensor: int = 1
    synchronisation: str = ""

    @property
    def samples(self) -> int:
        """Samples per micro-batch."""
        return self.batch // self.m

    @property
    def devices(self) -> tuple[Device, ...]:
        """The K devices."""
        return self.cluster.take(self.k).devices


def pipeline(q: Question, strategy: str, schedule: str, *, cut: str = "balanced", synchronisation: str = "") -> Plan:
    """Place a schedule's pipeline on K devices: `replicas` of it, `cut` balanced by cost or equal in layers.

    Raises `PlanError` (exit 2) when the numbers do not go together.
    """
    chosen = schedules.get(schedule)
    chunks = q.chunks or max(chosen.chunks[0], 2 if chosen.placement == "looped" else 1)
    depth = _depth(q)
    shape = schedules.Shape(depth, q.m // q.replicas, chunks)
    reason = schedules.why_not(chosen, shape)
    if q.m % q.replicas:
        reason = f"{q.m} micro-batches are not a multiple of {q.replicas} replicas"
    if reason is not None:
        raise PlanError(
            what=f"{strategy} cannot be arranged",
            where=f"strategy {strategy}, K={q.k}, M={q.m}",
            why=reason,
            fix=f"plan simulate --k {q.k} --m {_next(q.m, 2 * q.k)}",
        )
    count = depth * chunks
    _enough_layers(q, count)
    layers = len(q.profile.layers)
    trial = _plan(q, strategy, schedule, partition.equal(layers, count), chunks, synchronisation)
    if cut == "equal" or count == 1:
        Placed(q.profile, trial, q.cluster)
        return trial
    seen = q._replace(profile=Placed(q.profile, trial, q.cluster).profile)
    plan = _plan(q, strategy, schedule, balanced(seen, trial), chunks, synchronisation)
    return measured(seen, plan) if chosen.measured else plan


def measured(q: Question, plan: Plan) -> Plan:
    """Write each stage's seconds into a plan whose schedule orders by them."""
    import msgspec

    ranges = plan.layer_ranges([layer.name for layer in q.profile.layers])
    seconds = []
    for s, layers in enumerate(ranges):
        device = next(d for d in q.devices if d.name == plan.stages[s].devices[0])
        costs = StageCosts(q.profile, layers, q.samples)
        seconds.append(tuple(float(costs.spread(op, device)[MEDIAN]) for op in ("F", "I", "W")))
    return msgspec.structs.replace(plan, stage_seconds=tuple(seconds))


def balanced(q: Question, plan: Plan) -> tuple[range, ...]:
    """Cut for a plan's schedule and devices: the least slowest stage, transfers included, that fits into memory.

    Where no cut fits, the one that lacks least.
    """

    def make() -> tuple[range, ...]:
        tables = StageTables(q, plan)
        found = partition.cut(tables.seconds, len(plan.stages), tables.filled)
        found = found or partition.lightest(tables.filled, len(plan.stages))
        assert found is not None, "there are enough layers"
        if plan.chunks == 1:
            return found
        schedule = schedules.get(plan.schedule)
        return partition.evened(
            found, [schedule.homes(s, plan.depth)[0] for s in range(len(plan.stages))], tables.seconds, tables.filled
        )

    homes = tuple(stage.devices[0] for stage in plan.stages)
    return memoised(
        q.profile, ("cut", q.cluster.identity, q.k, q.samples, homes, in_flight(plan), plan.recompute), make
    )


class StageTables:
    """Seconds and share of memory of every run of layers as a stage of `plan`, for `planner.placement.partition`.

    A stage takes a micro-batch's forward and backward and the posting of its messages, and at least as long as the
    slower of its two links needs for one message. Its memory is that of static bytes and of as many micro-batches as
    the schedule keeps at once, with the largest transient peak of any layer on top: an upper bound for choosing cuts;
    `planner.costs.memory` has the last word on the finished plan.
    """

    def __init__(self, q: Question, plan: Plan) -> None:
        self.q, self.plan = q, plan
        self.held = in_flight(plan)
        names = {device.name: device for device in q.devices}
        self.device = [names[stage.devices[0]] for stage in plan.stages]
        self.cluster = q.cluster.take(q.k)
        self.tables: dict[tuple[object, ...], Table] = {}

    def seconds(self, stage: int) -> Table:
        """Seconds per micro-batch on the stage's device."""
        device = self.device[stage]
        other = self.plan.stages[stage - 1 if stage else 1 % len(self.plan.stages)].devices[0]
        way = self.cluster.path(device.name, other) if other != device.name else ()
        figures = tuple((link.latency_s, link.bandwidth_bytes_per_s) for link in (self.cluster.links[i] for i in way))
        return self._once(("seconds", device.speed, device.threads, figures), lambda: self._seconds(device, way))

    def _seconds(self, device: Device, way: tuple[int, ...]) -> Table:
        import numpy as np

        q = self.q
        computing = run_seconds(q.profile, q.samples, device.threads) / device.speed
        if not way:
            return computing
        sizes = crossing(q.profile, q.samples)
        posts, wires = [0.0] * len(sizes), [0.0] * len(sizes)
        for i, (forward, backward) in list(enumerate(sizes))[1:-1]:
            posts[i] = self.cluster.post_seconds(forward) + self.cluster.post_seconds(backward)
            wires[i] = max(self.cluster.transfer_seconds(way, size) for size in (forward, backward))
        posting = partition.spans([0.0] * len(q.profile.layers), posts, posts)
        found: Table = np.maximum(computing + posting, np.maximum.outer(np.array(wires), np.array(wires)))
        return found

    def filled(self, stage: int) -> Table:
        """Share of the stage's device that its layers would fill."""
        share = self.device[stage].memory_bytes / self.plan.chunks
        return self._once(("filled", self.held[stage], share), lambda: self._filled(self.held[stage], share))

    def _filled(self, held: int, share: float) -> Table:
        q, whole = self.q, self.plan.recompute
        sizes = layer_bytes(q.profile, q.samples)
        keeps = 0 if whole else held
        weights = [own.static + keeps * own.saved for own in sizes]
        cuts = [held * forward for forward, _ in crossing(q.profile, q.samples)]
        peak = max(own.peak for own in sizes) + (max(own.saved for own in sizes) if whole else 0.0)
        found: Table = (partition.spans(weights, cuts, cuts) + peak) / share
        return found

    def _once(self, key: tuple[object, ...], make: Callable[[], Table]) -> Table:
        """Return the table of all stages that are alike."""
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]


class LayerBytes(NamedTuple):
    """A layer's bytes: always there, kept per micro-batch (of which its output), and at most in passing."""

    static: float
    saved: float
    output: float
    peak: float


def layer_bytes(profile: Profile, samples: int) -> list[LayerBytes]:
    """Return every layer's bytes at a micro-batch size, kept with the profile."""

    def make() -> list[LayerBytes]:
        found = []
        for layer in profile.layers:

            def at(field: str, layer: LayerProfile = layer) -> float:
                return interpolate([(float(s.samples), float(getattr(s, field))) for s in layer.sizes], samples)

            static = layer.parameter_bytes + layer.buffer_bytes + layer.gradient_bytes + layer.optimizer_bytes
            output = at("output_bytes") if layer.output_saved else 0.0
            saved = at("saved_bytes") + output
            peak = max(at("forward_peak_bytes"), at("backward_peak_bytes"), at("backward_first_peak_bytes"))
            found.append(LayerBytes(float(static), saved, output, peak))
        return found

    return memoised(profile, ("bytes", samples), make)


def run_seconds(profile: Profile, samples: int, threads: int) -> Table:
    """Return the seconds of a micro-batch's forward and backward for every run of layers, kept with the profile."""

    def make() -> Table:
        table = layer_table(profile, samples, threads)
        both = (table.forward[MEDIAN] + table.backward[MEDIAN]).tolist()
        weights = [b - a for a, b in pairwise(both)]
        *weights, loss = weights
        weights[-1] += loss  # the loss is the last layer's
        return partition.spans(weights)

    return memoised(profile, ("runs", samples, threads), make)


def crossing(profile: Profile, samples: int) -> list[tuple[float, float]]:
    """Bytes that cross every cut position per micro-batch, forward and backward; nothing crosses the two ends."""

    def make() -> list[tuple[float, float]]:
        ends = [[0.0, 0.0] for _ in range(len(profile.layers) + 1)]
        for value in profile.values:
            size = value_bytes(value, samples)
            for cut in range(max(1, value.source + 1), max(value.targets, default=0) + 1):
                ends[cut][0] += size
                ends[cut][1] += size if value.gradient else 0.0
        return [(forward, backward) for forward, backward in ends]

    return memoised(profile, ("crossing", samples), make)


def in_flight(plan: Plan) -> tuple[int, ...]:
    """Most micro-batches that each stage of a plan holds at once, from the schedule's own order."""
    if plan.uneven:
        return _in_flight(compute_order(plan), len(plan.stages))
    shape = schedules.Shape(plan.depth, plan.microbatches // plan.replicas, plan.chunks)
    return _held(plan.schedule, shape)


@functools.lru_cache(maxsize=4096)
def _held(schedule: str, shape: schedules.Shape) -> tuple[int, ...]:
    # An order by measured seconds keeps the same limits whatever the seconds are.
    return _in_flight(schedules.arrange(schedule, shape), shape.stages)


def _in_flight(order: Order, stages: int) -> tuple[int, ...]:
    import numpy as np

    held = [1] * stages
    for row in order:
        for stage in np.unique(codes.stages(row)).tolist():
            own = row[codes.stages(row) == stage]
            change = codes.has(own, "F").astype(int) - codes.has(own, "B", "W")
            held[stage] = max(held[stage], int(np.cumsum(change).max()))
    return tuple(held)


def replicated(q: Question, strategy: str, schedule: str) -> Plan:
    """Cut and choose each stage's replicas as PipeDream does (SOSP 2019): data parallel where that is cheaper.

    A stage of r replicas takes 1 / r of its computing per micro-batch, but not less than its gradients'
    synchronisation, which a step pays once and its micro-batches share.
    """
    import numpy as np

    device = q.devices[0]
    base = run_seconds(q.profile, q.samples, device.threads) / device.speed
    gradients = partition.spans([float(layer.gradient_bytes) for layer in q.profile.layers])
    shares = q.m if schedules.get(schedule).updates != "microbatch" else 1
    names = tuple(d.name for d in q.devices)
    cluster = q.cluster.take(q.k)

    def seconds(r: int) -> Table:
        if r == 1:
            return base
        per_byte = collectives.all_reduce(cluster, names[:r], 2.0**30) / 2**30
        found: Table = np.maximum(base / r, per_byte * gradients / shares)
        return found

    counts = [r for r in range(1, q.k + 1) if q.m % r == 0 and (q.k <= 16 or r & (r - 1) == 0)]
    found = partition.replicated(seconds, q.k, counts=counts)
    assert found is not None, "one stage is always possible"
    ranges, replicas = found
    layer_names = [layer.name for layer in q.profile.layers]
    stages = []
    first = 0
    for layers, r in zip(ranges, replicas, strict=True):
        stages.append(Stage(layers=tuple(layer_names[i] for i in layers), devices=names[first : first + r]))
        first += r
    if len(set(replicas)) == 1 and replicas[0] > 1 and len(ranges) > 1:
        stages = [
            Stage(layers=s.layers, devices=tuple(names[j * len(ranges) + i] for j in range(replicas[0])))
            for i, s in enumerate(stages)
        ]
    return Plan(
        strategy=strategy,
        schedule=schedule,
        stages=tuple(stages),
        microbatches=q.m,
        batch=q.batch,
        bucket_bytes=bucket(q),
        tied=tied(q.profile, ranges),
        threads=device.threads,
    )


BUCKET_BYTES = 25 * 2**20
"""DDP's default bucket (torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=25)."""


def bucket(q: Question) -> int:
    """Bytes of a gradient bucket: DDP's own where the reduction has hardware of its own, one bucket where it has not.

    On CPU devices the reduction needs the cores that compute, so overlapping gains nothing.
    """
    return 0 if any(d.shares_cores for d in q.devices) else BUCKET_BYTES


def tied(profile: Profile, ranges: tuple[range, ...]) -> tuple[tuple[int, ...], ...]:
    """Groups of stages that share a parameter."""
    home = {profile.layers[i].name: s for s, layers in enumerate(ranges) for i in layers}
    groups = [tuple(sorted({home[layer] for layer in layers})) for _, *layers in profile.tied]
    return tuple(sorted({group for group in groups if len(group) > 1}))


def _depth(q: Question) -> int:
    if q.k % (q.replicas * q.tensor):
        raise PlanError(
            what=f"K={q.k} devices cannot be dealt to {q.replicas} replicas of {q.tensor}",
            where="--k",
            why=f"{q.k} / ({q.replicas} x {q.tensor}) is not a whole number",
            fix=f"plan simulate --k {_next(q.k, q.replicas * q.tensor)} --m {q.m}",
        )
    return q.k // (q.replicas * q.tensor)


def _enough_layers(q: Question, stages: int) -> None:
    layers = len(q.profile.layers)
    if stages > layers:
        raise PlanError(
            what=f"{stages} stages are more than the model's {layers} layers",
            where="--k",
            why="every stage needs at least one layer",
            fix=f"plan simulate --k {min(q.k, layers)} --m {q.m}",
        )


def _next(number: int, multiple: int) -> int:
    return (number // multiple + 1) * multiple


def _plan(
    q: Question, strategy: str, schedule: str, ranges: tuple[range, ...], chunks: int, synchronisation: str
) -> Plan:
    chosen = schedules.get(schedule)
    way = synchronisations.get(synchronisation or q.synchronisation or "all-reduce")
    depth, names = len(ranges) // chunks, [device.name for device in q.devices]
    layers = [layer.name for layer in q.profile.layers]

    def held(s: int) -> tuple[str, ...]:
        """The devices of stage s: replica by replica its home, or homes, each a group of `tensor`."""
        homes, width = chosen.homes(s, depth), q.tensor
        if len(homes) == width == 1:
            return tuple(names[homes[0] :: depth])
        firsts = [(replica * depth + home) * width for replica in range(q.replicas) for home in homes]
        if width == 1:
            return tuple(names[first] for first in firsts)
        return tuple(itertools.chain.from_iterable(names[first : first + width] for first in firsts))

    return Plan(
        strategy=strategy,
        schedule=schedule,
        stages=tuple(
            Stage(
                layers=tuple(layers[i] for i in own),
                devices=held(s),
            )
            for s, own in enumerate(ranges)
        ),
        microbatches=q.m,
        batch=q.batch,
        chunks=chunks,
        tensor=q.tensor,
        synchronisation=way.name,
        servers=tuple(names) if way.server == "devices" else (q.devices[0].host,) if way.server == "host" else (),
        bucket_bytes=bucket(q) if q.replicas * chosen.copies > 1 else 0,
        tied=tied(q.profile, ranges),
        threads=q.devices[0].threads,
    )
