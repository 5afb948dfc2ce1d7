"""PipeDream's partition on a cluster: where to cut, how many replicas each stage gets, and on which devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs import collectives
from planner.costs import placed as costs
from planner.orders import schedules
from planner.placement import savings
from planner.placement.cutting import ranges_of, tables_of
from planner.placement.devices import levels
from planner.placement.filling import Holding, crossing, stage_bytes
from planner.placement.hierarchy import Fits, Level, Members, solve
from planner.placement.pipeline import bucket, check_norm, pipeline
from planner.placement.question import Question
from planner.placement.tables import byte_spans
from planner.simulate.evaluate import evaluate
from planner.values.cluster import Device
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from planner.placement.partition import Table


def replicated(q: Question, strategy: str, schedule: str) -> Plan:
    """Cut and choose each stage's replicas as PipeDream does: within a host, then over hosts (`hierarchy.solve`).

    A stage of r replicas takes 1 / r of its computing per micro-batch, but not less than its gradients' synchronisation
    takes: once per turn of its replicas where parameters change with every micro-batch, once per step otherwise. Values
    and their gradients pass a cut in both directions at once. The fastest partition is taken if it fits, otherwise the
    fastest of those that fit, with as many micro-batches in each stage as keep the devices behind it busy. M need not
    be a multiple of any stage's replicas, which take turns (1F1B-RR); only replicas of one whole pipeline each have the
    same share of it. Devices that this leaves over stay idle.

    The partition takes all devices for alike. Where they are not, a pipeline without replicas, whose stages heed every
    device's speed and memory, is taken if it is quicker.
    """
    check_norm(_whole(q, strategy, schedule))
    most = min(q.k, q.m) if q.k > FEW else q.k
    fewer = range(most, 0, -1) if most <= FEW else [most >> i for i in range(most.bit_length())]
    for count in dict.fromkeys([q.k, *fewer]):
        plan = _on(q._replace(k=count), strategy, schedule)
        if plan is not None:
            return _or_straight(q, plan)
    raise AssertionError("one device can always hold all stages")


def _or_straight(q: Question, plan: Plan) -> Plan:
    """The better one of a partition and, on unequal devices, of a pipeline without replicas; one that fits, if any."""
    if len({(device.speed, device.memory_bytes) for device in q.devices}) == 1:
        return plan
    alone = q._replace(k=min(q.k, len(q.profile.layers)), replicas=1, chunks=1, tensor=1, synchronisation="")
    try:
        straight = pipeline(alone, plan.strategy, plan.schedule)
        straight = savings.apply(alone, straight, savings.behind_cut(alone.savings))
    except PlanError:  # its cuts separate what shares parameters, or its schedule cannot arrange them
        return plan

    def worth(of: Plan) -> tuple[bool, float]:
        return not _fits(q, of), evaluate(costs.Placed(q.profile, of, q.cluster)).step_s

    return min(plan, straight, key=worth)


FEW = 16
"""Up to so many devices every smaller number is tried where M cannot be dealt to all; beyond, halves."""


def _on(q: Question, strategy: str, schedule: str) -> Plan | None:
    """The plan on up to K devices; None where M is too few for its replicas, or cannot be dealt to whole pipelines."""
    hosts = _hosts(q.devices)
    bare = _whole(q, strategy, schedule)
    plan = _quickest(q, _partitions(q, bare, hosts, None))
    if plan is None:
        return None
    saved = savings.apply(q, plan, q.savings)
    if _fits(q, saved):
        return saved
    alone = msgspec.structs.replace(saved, stages=bare.stages, tied=(), recompute_layers=(), recompute_blocks=())
    squeezed = _quickest(q, _partitions(q, alone, hosts, _fitting(q, alone)))
    return saved if squeezed is None else savings.apply(q, squeezed, q.savings)


def _quickest(q: Question, plans: Sequence[Plan]) -> Plan | None:
    """The plan whose step is shortest when it is walked: partitions do not know what shares a host's links."""
    if len(plans) < 2:
        return plans[0] if plans else None
    return min(plans, key=lambda plan: evaluate(costs.Placed(q.profile, plan, q.cluster)).step_s)


def _partitions(q: Question, whole: Plan, hosts: Sequence[Sequence[Device]], fits: Fits | None) -> tuple[Plan, ...]:
    """Solve for each choice of levels, and put the stages on devices; without savings."""
    computing = tables_of(q._replace(savings=()), whole).computing(0)
    if schedules.get(whole.schedule).asynchronous:
        computing = computing + _separating(q.profile)

    def make() -> tuple[Plan, ...]:
        solved = [solve(computing, inner, outer, fits) for inner, outer in _levels(q, whole, hosts)]
        every = [_stages(q, found[1], hosts) for found in solved if found is not None]
        return tuple(_with(q, whole, stages) for stages in dict.fromkeys(every) if _dealt(q, stages))

    saved = whole.recompute, whole.host_optimizer, fits is not None
    return memoised(q.profile, ("replicated", q.cluster.identity, q.k, q.batch, q.m, whole.strategy, saved), make)


def _separating(profile: Profile) -> Table:
    """Tabulate what may not be a stage without a flush (infinite): runs with some of the layers that share a parameter.

    Each stage updates as soon as it has its own gradients (`shares_without_flush`).
    """
    import numpy as np

    layers = len(profile.layers)
    found = np.zeros((layers + 1, layers + 1))
    places = {layer.name: i for i, layer in enumerate(profile.layers)}
    start, stop = np.ogrid[: layers + 1, : layers + 1]
    for _, *names in profile.tied:
        inside = sum(((start <= places[name]) & (places[name] < stop)).astype(int) for name in names)
        found[(inside > 0) & (inside < len(names))] = np.inf
    return found


def _dealt(q: Question, stages: Sequence[Stage]) -> bool:
    """Whether every replica gets a micro-batch of M, and replicas of one pipeline equally many."""
    replicas = {len(stage.devices) for stage in stages}
    return max(replicas) <= q.m and (len(replicas) > 1 or q.m % max(replicas) == 0)


def _with(q: Question, whole: Plan, stages: tuple[Stage, ...]) -> Plan:
    plan = msgspec.structs.replace(savings.without(whole), stages=stages, bucket_bytes=bucket(q))
    return msgspec.structs.replace(plan, tied=q.profile.ties(ranges_of(plan)))


def _whole(q: Question, strategy: str, schedule: str) -> Plan:
    """The model as one stage on one device."""
    layers = tuple(layer.name for layer in q.profile.layers)
    return Plan(
        strategy=strategy,
        schedule=schedule,
        stages=(Stage(layers=layers, devices=(q.devices[0].name,)),),
        microbatches=q.m,
        batch=q.batch,
        sequence=q.profile.sequence,
        norm=q.profile.norm,
        threads=q.devices[0].threads,
    )


def _hosts(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices host by host; where hosts have different numbers of them, each device is a host of its own."""
    homes: dict[str, list[Device]] = {}
    for device in devices:
        homes.setdefault(device.host, []).append(device)
    if len({len(own) for own in homes.values()}) > 1:
        return [[device] for device in devices]
    return list(homes.values())


FLAT = 64
"""Up to so many devices are also taken for one level, as PipeDream's first version had it."""


def _levels(q: Question, whole: Plan, hosts: Sequence[Sequence[Device]]) -> list[tuple[Level, Level | None]]:
    """Return what cuts and agreement cost on each level; several choices of levels, of which the best is taken.

    Over hosts a stage has all devices of each of its hosts. Without levels a stage may have any number of them; what it
    sends then goes from host to host, and its ring passes all that its devices pass.
    """
    between = levels(q.cluster, q.devices)
    cuts = crossing(q.profile, q.samples)
    gradients, _ = byte_spans(q.profile)
    each_update = schedules.get(whole.schedule).updates == "microbatch"

    def turns(replicas: int) -> int:
        """Micro-batches of a stage between two synchronisations."""
        return replicas if each_update else q.m

    def of_devices(replicas: int) -> Table:
        if replicas > q.m:
            return gradients + math.inf
        names = tuple(device.name for host in hosts for device in host)[:replicas]
        per_byte = collectives.all_reduce(between.cluster, names, 2.0**30) / 2**30
        return gradients * per_byte / turns(replicas)

    def of_hosts(replicas: int) -> Table:
        if replicas > q.m:
            return gradients + math.inf
        per_byte = 2 * (replicas - 1) * between.across_seconds(2.0**30 / replicas) / 2**30
        return gradients * per_byte / turns(replicas)

    within = [between.inside_seconds(max(sizes)) if max(sizes) else 0.0 for sizes in cuts]
    across = [between.across_seconds(max(sizes)) if max(sizes) else 0.0 for sizes in cuts]
    if len(hosts) == 1:
        return [(Level(len(hosts[0]), within, of_devices), None)]
    found: list[tuple[Level, Level | None]] = []
    if len(hosts[0]) > 1:
        found.append((Level(len(hosts[0]), within, of_devices), Level(len(hosts), across, of_hosts)))
    if q.k <= FLAT or not found:
        found.append((Level(q.k, across, of_devices), None))
    return found


def _fitting(q: Question, whole: Plan) -> Fits:
    """Return which runs of layers fit as a stage of so many replicas that each hold so many micro-batches."""
    room = float(min(device.memory_bytes for device in q.devices))
    chosen = schedules.get(whole.schedule)
    known: dict[Holding, NDArray[np.bool_]] = {}

    def fits(replicas: int, held: float) -> NDArray[np.bool_]:
        share = -(-q.m // replicas)
        most = min(math.ceil(held), share)
        versions = chosen.versions(0, (replicas, round(held * replicas) - replicas))  # all behind it as one stage
        own = Holding(replicas, versions, q.samples * share, (most, most, 1), (most + 1, 2, 1))
        if own not in known:
            known[own] = stage_bytes(q.profile, whole, own) <= room
        return known[own]

    return fits


def _fits(q: Question, plan: Plan) -> bool:
    tables = tables_of(q._replace(savings=()), plan)
    return all(tables.filled(s)[own.start, own.stop] <= 1 for s, own in enumerate(ranges_of(plan)))


def _stages(q: Question, placed: Sequence[Members], hosts: Sequence[Sequence[Device]]) -> tuple[Stage, ...]:
    """Put stages on devices: those within a host on each of the hosts that take turns, one behind the other."""
    layers = [layer.name for layer in q.profile.layers]
    found: list[Stage] = []
    flat = [[device] for host in hosts for device in host] if not any(own.inside for own in placed) else hosts
    first = 0
    for own in placed:
        members = flat[first : first + own.members]
        offset = 0
        for part in own.inside or (own._replace(members=1),):
            names = tuple(device.name for host in members for device in host[offset : offset + part.members])
            found.append(Stage(layers=tuple(layers[i] for i in part.layers), devices=names))
            offset += part.members
        first += own.members
    return tuple(found)
