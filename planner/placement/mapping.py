"""Which device holds which stage: side by side stand the replicas of a stage, or the stages of a pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from planner.basis.memo import memoised
from planner.orders import schedules, synchronisation
from planner.placement.devices import Levels, levels
from planner.placement.filling import crossing
from planner.placement.question import Mapping, Question
from planner.placement.tables import StageTables
from planner.values.cluster import Device
from planner.values.plan import Plan

Group = tuple[Device, ...]
"""The devices that split a stage's tensors: one, if none do."""
Position = tuple[Group, ...]
"""What holds one place of the pipeline: a group for every replica."""


MAPPINGS: tuple[Mapping, ...] = ("pipelines", "stages")
"""What can stand side by side; the first is what people mean who say nothing."""


def across(devices: Sequence[Device]) -> bool:
    """Whether these devices stand on several hosts: on one all are side by side."""
    return len({device.host for device in devices}) > 1


def positions(q: Question, depth: int, mapping: Mapping) -> tuple[Position, ...]:
    """Deal a question's devices to the places of its pipeline: consecutive ones to replicas, or to stages.

    >>> from tests.factory import devices, profile
    >>> q = Question(profile([1.0]), devices(4), 4, 4, 4, replicas=2)
    >>> [[group[0].name for group in place] for place in positions(q, 2, "stages")]
    [['d0', 'd1'], ['d2', 'd3']]
    >>> [[group[0].name for group in place] for place in positions(q, 2, "pipelines")]
    [['d0', 'd2'], ['d1', 'd3']]
    """

    def make() -> tuple[Position, ...]:
        own, width = q.devices, q.tensor
        groups = [own[i : i + width] for i in range(0, len(own), width)]
        if mapping == "stages":
            return tuple(tuple(groups[place * q.replicas : (place + 1) * q.replicas]) for place in range(depth))
        return tuple(tuple(groups[place::depth]) for place in range(depth))

    return memoised(q.cluster, ("positions", q.k, q.replicas, q.tensor, depth, mapping), make)


def mappings(q: Question, depth: int) -> tuple[Mapping, ...]:
    """Return the mappings that differ, or the one that is asked for: on one host all devices are side by side."""
    if q.mapping:
        return (q.mapping,)
    several = q.replicas > 1 and depth > 1 and across(q.devices)
    return MAPPINGS if several else MAPPINGS[:1]


def estimated(q: Question, plan: Plan, ranges: Sequence[range], tables: StageTables) -> float:
    """Return about how long a step takes, to compare the same pipeline on differently arranged devices.

    M / R times the slowest stage or, where that takes longer, what the busiest host sends for one micro-batch of every
    replica; filling and draining; and the gradients, in rings within hosts and over them, all stages' at a time. Hosts
    are alike (`planner.placement.devices.levels`), links within a host do not disturb each other.
    """
    between, profile = levels(q.cluster, q.devices), q.profile
    depth, count, share = plan.depth, len(plan.stages), plan.microbatches // plan.replicas
    host_of = {device.name: device.host for device in q.devices}
    homes = [schedules.get(plan.schedule).homes(s, depth)[0] for s in range(count)]
    hosts = [[host_of[plan.groups[r * depth + home][0]] for r in range(plan.replicas)] for home in homes]
    seconds = [float(tables.computing(s)[own.start, own.stop]) for s, own in enumerate(ranges)]
    sizes = crossing(profile, q.samples)
    busy: dict[tuple[str, str], float] = defaultdict(float)
    wires = 0.0
    for producer, consumer, *_ in plan.edges:
        if homes[producer] != homes[consumer]:
            forward, backward = (size * plan.tensor for size in sizes[ranges[consumer].start])
            wires += _crossed(between, hosts[producer], hosts[consumer], forward, busy)
            wires += _crossed(between, hosts[consumer], hosts[producer], backward, busy)
    period = max(*seconds, between.across_seconds(max(busy.values(), default=0.0)))
    gradients = [sum(profile.held_bytes(own, "gradient_bytes")) * plan.tensor for own in ranges]
    halves = _halves(plan, share)
    return sum(seconds) + wires + (share - 1) * period + halves / 2 * _reduced(between, hosts, gradients)


def _crossed(
    between: Levels, sources: Sequence[str], targets: Sequence[str], size: float, busy: dict[tuple[str, str], float]
) -> float:
    """Seconds of one micro-batch of every replica from one stage to the next; what leaves and enters hosts is noted."""
    sent: dict[str, float] = defaultdict(float)
    for source, target in zip(sources, targets, strict=True):
        if source != target:
            sent[source] += size
            busy[source, "out"] += size
            busy[target, "in"] += size
    within = between.inside_seconds(size) if len(sent) < len(set(sources)) else 0.0
    return max(within, between.across_seconds(max(sent.values(), default=0.0)))


def _reduced(between: Levels, hosts: Sequence[Sequence[str]], gradients: Sequence[float]) -> float:
    """Seconds of all stages' all-reduces: rings within a host, then over hosts, which share what leaves a host."""
    inside, leaving = 0.0, defaultdict[str, float](float)
    for own, size in zip(hosts, gradients, strict=True):
        each = {host: own.count(host) for host in own}
        most = max(each.values())
        inside = max(inside, between.inside_seconds(2 * (most - 1) / most * size))
        for host in each:
            leaving[host] += 2 * (len(each) - 1) / len(each) * size
    return inside + between.across_seconds(max(leaving.values()))


def _halves(plan: Plan, share: int) -> int:
    """Reduce-scatters and all-gathers of a step: an all-reduce is one of each."""
    if schedules.get(plan.schedule).updates == "microbatch":
        return 2 * share
    shards = synchronisation.get(plan.synchronisation).shards
    return 3 * share if "parameters" in shards else share + 1 if "gradients" in shards else 2
