"""Where stages go: a schedule's pipeline over K devices, cut so that the slowest stage is fastest and all fit."""

from __future__ import annotations

import itertools

import msgspec

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, StageCosts
from planner.orders import schedules
from planner.orders import synchronisation as synchronisations
from planner.placement import partition
from planner.placement.question import Question
from planner.placement.tables import StageTables, in_flight
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile


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
        found = partition.cut(tables.seconds, len(plan.stages), tables.filled, tables.computing)
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
