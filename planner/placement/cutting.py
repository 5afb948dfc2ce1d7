"""Where a plan is cut for its schedule, devices and savings, and in which order unequal devices take the stages."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.orders import schedules
from planner.placement import partition, savings
from planner.placement.mapping import Position
from planner.placement.ordering import ordered
from planner.placement.question import Question
from planner.placement.tables import StageTables
from planner.values.plan import Plan


class Cut(NamedTuple):
    """Each stage's layers. `squeezed` tells that memory decided: without its limit the cut would be another one."""

    ranges: tuple[range, ...]
    squeezed: bool


def tables_of(q: Question, plan: Plan) -> StageTables:
    """Tabulate what every run of layers costs and fills as a stage of a plan, with the question's savings."""
    return StageTables(q, plan, chosen=bool(savings.behind_cut(q.savings)))


def balanced(q: Question, plan: Plan) -> tuple[range, ...]:
    """Cut for a plan's schedule, devices and savings: the least slowest stage, transfers included, that fits.

    Where no cut fits, the one that lacks least. The plan's own layers do not matter.
    """
    return cut_of(q, plan).ranges


def squeezed(q: Question, placed: Placed) -> bool:
    """Whether a plan without its savings would not fit where it is fastest: if not, savings have moved no cut."""
    plan = savings.without(placed.plan)
    if plan.uneven or len(plan.stages) == 1:
        return False
    return fastest(q._replace(profile=placed.profile, savings=()), plan).squeezed


def fastest(q: Question, plan: Plan) -> Cut:
    """Cut so that the slowest stage is fastest, whatever fits, and tell whether that is too large."""
    plan = msgspec.structs.replace(plan, stage_seconds=())  # those of another cut
    return _fastest(q, plan, tables_of(q, plan))


def _fastest(q: Question, plan: Plan, tables: StageTables) -> Cut:
    def make() -> Cut:
        free = partition.cut(tables.seconds, len(plan.stages), even=tables.computing)
        assert free is not None, "there are enough layers"
        return Cut(free, any(tables.filled(s)[own.start, own.stop] > 1 for s, own in enumerate(free)))

    return memoised(q.profile, ("fastest cut", *_key(q, plan, tables)), make)


def cut_of(q: Question, plan: Plan) -> Cut:
    """Cut as `balanced` does, and tell whether memory decided."""
    plan = msgspec.structs.replace(plan, stage_seconds=())  # those of another cut
    tables, schedule, stages = tables_of(q, plan), schedules.get(plan.schedule), len(plan.stages)

    def make() -> Cut:
        found, squeezed = free = _fastest(q, plan, tables)
        if squeezed:
            fitting = partition.cut(tables.seconds, stages, tables.filled, tables.computing)
            found = fitting or partition.lightest(tables.filled, stages) or free.ranges
        if plan.chunks > 1:
            homes = [schedule.homes(s, plan.depth)[0] for s in range(stages)]
            found = partition.evened(found, homes, tables.seconds, tables.filled)
        return Cut(found, squeezed)

    return memoised(q.profile, ("cut", *_key(q, plan, tables)), make)


def _key(q: Question, plan: Plan, tables: StageTables) -> tuple[object, ...]:
    """All that a cut follows from, devices' and links' names aside."""
    stages, schedule = range(len(plan.stages)), schedules.get(plan.schedule)
    homes = tuple(map(tables.figures, stages))
    versions = tuple(map(plan.versions, stages))
    asked = plan.synchronisation, len(plan.stages[0].devices), plan.microbatches, plan.chunks, tables.chosen
    saved = plan.recompute, plan.recompute_layers, plan.recompute_blocks, plan.host_optimizer
    return (
        q.cluster.identity,
        homes,
        tables.flight,
        versions,
        schedule.updates,
        asked,
        saved,
        q.samples,
        schedule.copies,
    )


def reordered(q: Question, plan: Plan, places: tuple[Position, ...]) -> tuple[Position, ...]:
    """Return the places of a pipeline in the order in which its slowest stage is fastest (`ordering.ordered`).

    It heeds speed and memory, exactly; links only in that devices of one host stay together where they may. Places that
    are alike, and schedules that put several stages on a device, keep their order.
    """
    tables = tables_of(q, plan)
    weakest = [tables.weakest([device.name for group in place for device in group]) for place in places]
    kinds = [(device.speed, device.threads, device.memory_bytes) for device in weakest]
    sorts = list(dict.fromkeys(kinds))
    if len(sorts) == 1 or len(plan.stages) > len(places) or schedules.get(plan.schedule).copies > 1:
        return places
    example = [weakest[kinds.index(sort)] for sort in sorts]
    order = ordered(
        [tables.computing_on(0, device) for device in example],
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


def slowest(q: Question, plan: Plan) -> float:
    """Seconds of a plan's slowest stage, infinite where one does not fit: as `partition.cut` minimises it."""
    tables = tables_of(q, plan)
    fits = all(tables.filled(s)[own.start, own.stop] <= 1 for s, own in enumerate(ranges_of(plan)))
    seconds = max(float(tables.seconds(s)[own.start, own.stop]) for s, own in enumerate(ranges_of(plan)))
    return seconds if fits else float("inf")


def ranges_of(plan: Plan) -> tuple[range, ...]:
    """Each stage's layers, counted from the plan's first."""
    return plan.layer_ranges([name for stage in plan.stages for name in stage.layers])
