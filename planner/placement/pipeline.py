"""Where stages go: a schedule's pipeline over K devices, cut so that the slowest stage is fastest and all fit."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, StageCosts
from planner.orders import schedules
from planner.orders import synchronisation as synchronisations
from planner.placement import partition
from planner.placement.mapping import Position, estimated, mappings, positions
from planner.placement.ordering import ordered
from planner.placement.question import Question
from planner.placement.tables import StageTables
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
    asked = _Pipeline(strategy, schedule, chunks, synchronisation or q.synchronisation or synchronisations.USUAL)
    layers = len(q.profile.layers)
    plans: list[tuple[float, Plan]] = []
    choice = mappings(q, depth)
    for mapping in choice:
        places = positions(q, depth, mapping)
        plan = _plan(q, asked, partition.equal(layers, count), places)
        seen = q._replace(profile=Placed(q.profile, plan, q.cluster).profile)
        if cut != "equal" and count > 1:
            plan = _placed(seen, asked, plan, places)
        seconds = estimated(seen, plan, _ranges(plan), StageTables(seen, plan)) if len(choice) > 1 else 0.0
        plans.append((seconds, measured(seen, plan) if chosen.measured else plan))
    return min(plans, key=lambda one: one[0])[1]


class _Pipeline(NamedTuple):
    """What is placed."""

    strategy: str
    schedule: str
    chunks: int
    synchronisation: str


def _placed(q: Question, asked: _Pipeline, trial: Plan, places: tuple[Position, ...]) -> Plan:
    """Cut for the devices in their order, and in the order that is best for unequal ones; return the better plan."""
    plan = _plan(q, asked, balanced(q, trial), places)
    order = reordered(q, trial, places)
    if order == places:
        return plan
    other = _plan(q, asked, balanced(q, _plan(q, asked, _ranges(trial), order)), order)
    return min(plan, other, key=lambda plan: _slowest(q, plan))


def reordered(q: Question, plan: Plan, places: tuple[Position, ...]) -> tuple[Position, ...]:
    """Return the places of a pipeline in the order in which its slowest stage is fastest (`ordering.ordered`).

    It heeds speed and memory, exactly; links only in that devices of one host stay together where they may. Places that
    are alike, and schedules that put several stages on a device, keep their order.
    """
    tables = StageTables(q, plan)
    weakest = [tables.weakest([device.name for group in place for device in group]) for place in places]
    kinds = [(device.speed, device.threads, device.memory_bytes) for device in weakest]
    sorts = list(dict.fromkeys(kinds))
    if len(sorts) == 1 or len(plan.stages) > len(places) or schedules.get(plan.schedule).copies > 1:
        return places
    example = [weakest[kinds.index(sort)] for sort in sorts]
    order = ordered(
        [tables.computing_on(device) for device in example],
        [kinds.count(sort) for sort in sorts],
        lambda stage, kind: tables.filled_on(stage, example[kind]),
    )
    if order is None:
        return places
    left = {kind: [p for p, own in zip(places, kinds, strict=True) if own == sort] for kind, sort in enumerate(sorts)}
    found: list[Position] = []
    for kind in order:
        near = [p for p in left[kind] if found and p[0][0].host == found[-1][0][0].host]
        found.append((near or left[kind])[0])
        left[kind].remove(found[-1])
    return tuple(found)


def _slowest(q: Question, plan: Plan) -> float:
    """Seconds of a plan's slowest stage, infinite where one does not fit: as `partition.cut` minimises it."""
    tables = StageTables(q, plan)
    fits = all(tables.filled(s)[own.start, own.stop] <= 1 for s, own in enumerate(_ranges(plan)))
    seconds = max(float(tables.seconds(s)[own.start, own.stop]) for s, own in enumerate(_ranges(plan)))
    return seconds if fits else float("inf")


def _ranges(plan: Plan) -> tuple[range, ...]:
    return plan.layer_ranges([name for stage in plan.stages for name in stage.layers])


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
        found = partition.cut(tables.seconds, len(plan.stages), tables.filled, tables.computing)
        found = found or partition.lightest(tables.filled, len(plan.stages))
        assert found is not None, "there are enough layers"
        if plan.chunks == 1:
            return found
        schedule = schedules.get(plan.schedule)
        return partition.evened(
            found, [schedule.homes(s, plan.depth)[0] for s in range(len(plan.stages))], tables.seconds, tables.filled
        )

    tables = StageTables(q, plan)
    homes = tuple((device.name, device.speed, device.memory_bytes) for device in tables.device)
    return memoised(q.profile, ("cut", q.cluster.identity, q.samples, homes, tables.held, plan.recompute), make)


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


def _plan(q: Question, asked: _Pipeline, ranges: tuple[range, ...], places: tuple[Position, ...]) -> Plan:
    chosen, agreed = schedules.get(asked.schedule), synchronisations.get(asked.synchronisation)
    layers = [layer.name for layer in q.profile.layers]

    def held(s: int) -> tuple[str, ...]:
        """The devices of stage s: replica by replica its home, or homes, each a group of `tensor`."""
        homes = [places[home] for home in chosen.homes(s, len(places))]
        groups = itertools.chain.from_iterable(zip(*homes, strict=True))
        return tuple(device.name for group in groups for device in group)

    return Plan(
        strategy=asked.strategy,
        schedule=asked.schedule,
        stages=tuple(Stage(layers=tuple(layers[i] for i in own), devices=held(s)) for s, own in enumerate(ranges)),
        microbatches=q.m,
        batch=q.batch,
        chunks=asked.chunks,
        tensor=q.tensor,
        synchronisation=agreed.name,
        servers=_servers(q, agreed),
        bucket_bytes=bucket(q) if q.replicas * chosen.copies > 1 else 0,
        tied=tied(q.profile, ranges),
        threads=q.devices[0].threads,
    )


def _servers(q: Question, agreed: synchronisations.Synchronisation) -> tuple[str, ...]:
    if agreed.server == "devices":
        return tuple(device.name for device in q.devices)
    return (q.devices[0].host,) if agreed.server == "host" else ()
