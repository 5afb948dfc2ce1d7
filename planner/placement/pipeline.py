"""Where stages go: a schedule's pipeline over K devices, cut so that the slowest stage is fastest and all fit."""

from __future__ import annotations

import itertools

import msgspec

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, StageCosts
from planner.orders import schedules
from planner.orders import synchronisation as synchronisations
from planner.orders.schedules import Schedule
from planner.placement import partition, savings
from planner.placement.cutting import balanced, fastest, ranges_of, reordered, slowest, tables_of
from planner.placement.mapping import MAPPINGS, Position, estimated, mappings, positions
from planner.placement.question import Question
from planner.programs import extent
from planner.values.plan import Plan, Stage, norm_without_flush, shares_without_flush

ALONE = "1f1b"
"""What any schedule that flushes comes to where one device holds all stages: one micro-batch after the other."""


def pipeline(q: Question, strategy: str, schedule: str, *, cut: str = "balanced", synchronisation: str = "") -> Plan:
    """Place a schedule's pipeline on K devices: `replicas` of it, `cut` balanced by cost or equal in layers.

    The cut reckons with the savings that choose layers behind it; they have not chosen any yet (`Strategy.finish`).
    Raises `PlanError` (exit 2) when the numbers do not go together.
    """
    depth = _depth(q)
    chosen, chunks = arranged(schedules.get(schedule), depth, q.chunks)
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
    passes = 3 if chosen.splits else 2
    extent.check(passes * count * shape.microbatches, f"{strategy}-k{q.k}-m{q.m}", q.m)
    agreed = synchronisation or q.synchronisation or synchronisations.USUAL
    layers = len(q.profile.layers)
    choice = mappings(q, depth)
    behind = savings.behind_cut(q.savings)
    before = tuple(name for name in q.savings if name not in behind)
    plans: list[tuple[float, Plan]] = []
    for mapping in choice:
        places = positions(q, depth, mapping)
        trial = _trial(q, strategy, chosen, agreed, chunks, places)
        trial = msgspec.structs.replace(trial, mark="" if mapping == MAPPINGS[0] else mapping)
        trial = savings.apply(q, with_layers(q, trial, partition.equal(layers, count)), before)
        seen = q._replace(profile=Placed(q.profile, trial, q.cluster).profile)
        plan = _placed(seen, trial, places) if cut != "equal" and count > 1 else trial
        seconds = _estimated(seen, plan) if len(choice) > 1 else 0.0
        plans.append((seconds, measured(seen, plan) if chosen.measured else plan))
    found = min(plans, key=lambda one: one[0])[1]
    shared = shares_without_flush(found)
    if shared is not None:
        raise PlanError(
            what="a pipeline without a flush cannot cut between layers that share parameters",
            where=f"strategy {strategy}, K={q.k}",
            why=shared,
            fix="choose a schedule that flushes (1f1b), or a model whose layers do not share",
        )
    check_norm(found)
    return found


def check_norm(plan: Plan) -> None:
    """Raise `PlanError` (exit 2) when stages update apart, of a model that clips or scales all gradients."""
    alone = norm_without_flush(plan)
    if alone is not None:
        raise PlanError(
            what="not for a model that clips or scales its gradients",
            where=f"strategy {plan.strategy}, K={len(plan.device_names)}",
            why=alone,
            fix="choose a schedule that flushes (1f1b) and replicas that reduce (all-reduce), or no clip and fp16",
        )


def arranged(schedule: Schedule, depth: int, chunks: int) -> tuple[Schedule, int]:
    """Return what a schedule comes to on `depth` devices, and its stages per device: of `chunks` 0, its fewest."""
    if depth == 1 and schedule.trains and not schedule.asynchronous:
        return schedules.get(ALONE), 1
    return schedule, chunks or max(schedule.chunks[0], 2 if schedule.placement == "looped" else 1)


def _placed(q: Question, trial: Plan, places: tuple[Position, ...]) -> Plan:
    """Cut for the devices in their order, and in the order that is best for unequal ones; return the better plan.

    What fits without savings where it is fastest is cut as without: savings then add work to the same stages, and none
    wins by another cut.
    """
    if q.savings:
        bare, without = q._replace(savings=()), savings.without(trial)
        if reordered(bare, without, places) != places or not fastest(bare, without).squeezed:
            unsaved = _placed(bare, without, places)
            if not fastest(bare, unsaved).squeezed:
                return msgspec.structs.replace(trial, stages=unsaved.stages, tied=unsaved.tied)
    plan = with_layers(q, trial, balanced(q, trial))
    order = reordered(q, trial, places)
    if order == places:
        return plan
    other = with_devices(trial, order)
    other = with_layers(q, other, balanced(q, other))
    return min(plan, other, key=lambda plan: slowest(q, plan))


def _estimated(q: Question, plan: Plan) -> float:
    """About how long a step takes, savings aside: they do not decide about the mapping."""
    q, plan = q._replace(savings=()), savings.without(plan)
    return estimated(q, plan, ranges_of(plan), tables_of(q, plan))


def measured(q: Question, plan: Plan) -> Plan:
    """Write each stage's seconds, those of its slowest device, into a plan whose schedule orders by them."""
    ranges = plan.layer_ranges([layer.name for layer in q.profile.layers])
    seconds = []
    for s, layers in enumerate(ranges):
        own = set(plan.stages[s].devices)
        sorts = {(device.speed, device.threads) for device in q.devices if device.name in own}
        costs = StageCosts(q.profile, layers, q.samples)
        seconds.append(
            tuple(max(float(costs.spread(op, n)[MEDIAN]) / speed for speed, n in sorts) for op in ("F", "I", "W"))
        )
    return msgspec.structs.replace(plan, stage_seconds=tuple(seconds))


BUCKET_BYTES = 25 * 2**20
"""DDP's default bucket (torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=25)."""


def bucket(q: Question) -> int:
    """Bytes of a gradient bucket: DDP's own where the reduction has hardware of its own, one bucket where it has not.

    On CPU devices the reduction needs the cores that compute, so overlapping gains nothing.
    """
    return 0 if any(d.shares_cores for d in q.devices) else BUCKET_BYTES


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


def _trial(
    q: Question, strategy: str, schedule: Schedule, synchronisation: str, chunks: int, places: tuple[Position, ...]
) -> Plan:
    """The plan but for its layers: as yet every stage has one of the same name."""
    agreed = synchronisations.get(synchronisation)
    return Plan(
        strategy=strategy,
        schedule=schedule.name,
        stages=tuple(Stage(layers=(f"{s}",), devices=_held(schedule, s, places)) for s in range(len(places) * chunks)),
        microbatches=q.m,
        batch=q.batch,
        sequence=q.profile.sequence,
        norm=q.profile.norm,
        chunks=chunks,
        tensor=q.tensor,
        synchronisation=agreed.name,
        servers=_servers(q, agreed),
        bucket_bytes=bucket(q) if q.replicas * schedule.copies > 1 else 0,
        threads=q.devices[0].threads,
    )


def _held(schedule: Schedule, stage: int, places: tuple[Position, ...]) -> tuple[str, ...]:
    """The devices of a stage: replica by replica its home, or homes, each a group that splits its tensors."""
    homes = [places[home] for home in schedule.homes(stage, len(places))]
    groups = itertools.chain.from_iterable(zip(*homes, strict=True))
    return tuple(device.name for group in groups for device in group)


def with_devices(plan: Plan, places: tuple[Position, ...]) -> Plan:
    """Return the plan on other devices."""
    schedule = schedules.get(plan.schedule)
    stages = tuple(Stage(layers=own.layers, devices=_held(schedule, s, places)) for s, own in enumerate(plan.stages))
    return msgspec.structs.replace(plan, stages=stages)


def with_layers(q: Question, plan: Plan, ranges: tuple[range, ...]) -> Plan:
    """Return the plan cut elsewhere."""
    names = [layer.name for layer in q.profile.layers]
    stages = tuple(
        Stage(layers=tuple(names[i] for i in own), devices=stage.devices)
        for own, stage in zip(ranges, plan.stages, strict=True)
    )
    return msgspec.structs.replace(plan, stages=stages, tied=q.profile.ties(ranges))


def _servers(q: Question, agreed: synchronisations.Synchronisation) -> tuple[str, ...]:
    if agreed.server == "devices":
        return tuple(device.name for device in q.devices)
    if agreed.server != "host":
        return ()
    hosts = tuple(dict.fromkeys(device.host for device in q.devices))
    if len(hosts) > 1:
        raise PlanError(
            what=f"{agreed.name} keeps the parameters in one host's memory",
            where=f"cluster '{q.cluster.name}', K={q.k}",
            why=f"the {q.k} devices are on {len(hosts)} hosts, and those of the others have no link to it",
            fix=f"plan simulate --k {sum(device.host == hosts[0] for device in q.devices)}, or a parameter server",
        )
    return hosts
