"""Seconds that a given plan cannot beat, and the memory that it needs, known without walking its program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, LayerTable, layer_table
from planner.costs.stage_memory import of_stage
from planner.costs.static_memory import static_bytes
from planner.placement.flight import flight
from planner.search import any_cut
from planner.search.best_case import fastest, outward, seams_of
from planner.search.copying import copying
from planner.values.plan import asynchronous
from planner.values.profile import Profile

Floats = npt.NDArray[np.float64]


def plan_bound(placed: Placed, again: Sequence[float] = ()) -> float:
    """Return seconds that this plan cannot beat: its busiest row's computing, and what leads to it and back.

    `again` are seconds per micro-batch that each row of a pipeline repeats besides, where layers are to be chosen.
    A row's first compute is a forward of its first stage, behind those of all earlier stages; its last, where backwards
    are whole, that stage's backward, before those of all earlier stages.
    """
    plan, profile = placed.plan, placed.profile
    if plan.uneven:
        return 0.0
    speed, threads = fastest(placed.cluster, len(plan.device_names))
    table = layer_table(profile, plan.samples, threads)
    splits = placed.schedule.splits
    seams = seams_of(profile)
    sums = [table.forward[MEDIAN] + table.backward[MEDIAN]]
    if splits:
        sums.append(table.forward[MEDIAN] + table.backward_input[MEDIAN] + table.backward_weight[MEDIAN])
    ranges = placed.ranges
    share = plan.microbatches // plan.replicas
    found = 0.0
    for row, besides in zip(range(plan.depth), again or [0.0] * plan.depth, strict=True):
        held = plan.stages_of[row]
        copies = placed.schedule.copies
        work = sum(min(_part(one, ranges[s], profile) for one in sums) for s in held) / copies
        leading = table.forward[MEDIAN] if splits else sums[0]
        before = leading[ranges[min(held)].start] if copies == 1 and not asynchronous(plan) else 0.0
        work += sum(_repeated(table, run) for s in held for run in placed.checkpoints[s]) / copies + besides
        own = placed.devices[row].speed
        found = max(found, share * max(0.0, work - seams) / own + max(0.0, float(before) - seams) / speed)
    return max(found, _between(placed, sums, seams), copying(placed))


def _repeated(table: LayerTable, run: range) -> float:
    """Seconds of repeating a checkpoint's forward, its last layer as far as needed (`StageCosts.recompute`)."""
    last = run[-1]
    again = table.recompute[MEDIAN, last + 1] - table.recompute[MEDIAN, last]
    return float(table.forward[MEDIAN, last] - table.forward[MEDIAN, run.start] + again)


def _between(placed: Placed, sums: list[Floats], seams: float) -> float:
    """Return seconds that what leaves hosts makes a plan's step take at least.

    The busiest host's NICs carry what its stages send, or receive. All hosts of some stages together carry that, and
    the gradients of these stages: those that begin no earlier than some moment come behind it, one after the other.
    """
    bandwidth = outward(placed.cluster)
    if asynchronous(placed.plan) or len(bandwidth) < 2:
        return 0.0
    able = np.array([rate if rate > 0 else np.inf for rate in bandwidth.values()])
    sent, received = _crossing(placed)
    found = float((np.maximum(sent, received) / able).max())
    agreeing = _agreeing(placed, sums, seams)
    for hosts in {one.hosts for one in agreeing} | {frozenset[int]().union(*(one.hosts for one in agreeing))}:
        own, at = [one for one in agreeing if one.hosts <= hosts], sorted(hosts)
        size, rate = sum(one.bytes for one in own), float(able[at].sum())
        if own:
            found = max(found, (size + float(max(sent[at].sum(), received[at].sum()))) / rate)
        for one in own:
            found = max(found, one.begin + sum(other.bytes for other in own if other.begin >= one.begin) / rate)
    return found


class _Agreeing(NamedTuple):
    """Hosts whose replicas of a stage agree, by number; bytes that leave them for that, none before `begin` seconds."""

    hosts: frozenset[int]
    bytes: float
    begin: float


def _agreeing(placed: Placed, sums: list[Floats], seams: float) -> list[_Agreeing]:
    """Return what the replicas of every stage bring between hosts.

    Replicas on h hosts bring their gradients over h - 1 of them per pass at least, whatever the pattern. None begins
    before the last backward of its stage (`_before_last`); what is sharded is reduced and gathered from the beginning.
    """
    plan, agreed = placed.plan, placed.synchronisation
    if agreed.server or placed.schedule.updates == "microbatch" or not placed.overlaps or not placed.schedule.trains:
        return []
    places = {host: number for number, host in enumerate(outward(placed.cluster))}
    host_of = placed.cluster.routes.host_of
    reduced, gathered = any_cut.agreeing(agreed, plan.microbatches // plan.replicas / placed.schedule.copies)
    found = []
    for s, layers in enumerate(placed.ranges):
        held = [[places[host_of[name]] for name in plan.groups[row]] for row in placed.holders[s]]
        spans = [len(set(rank)) for rank in zip(*held, strict=True)]
        if max(spans) < 2:
            continue
        gradients, parameters = (
            sum(placed.profile.held_bytes(layers, field)) for field in ("gradient_bytes", "parameter_bytes")
        )
        size = reduced * gradients + gathered * parameters
        speed = max(placed.devices[row].speed for row in placed.holders[s])
        begin = 0.0 if "gradients" in agreed.shards else _before_last(placed, s, sums, seams) / speed
        found.append(_Agreeing(frozenset().union(*held), sum(count - 1 for count in spans) * size, begin))
    return found


def _before_last(placed: Placed, stage: int, sums: list[Floats], seams: float) -> float:
    """Return seconds, at speed 1, that a row with a stage computes before the stage's last backward.

    All its other backwards. And where the stage is on one row of a pipeline: every micro-batch has passed all stages
    forwards, and all later ones backwards (of split backwards the gradients of inputs), those on this row, too.
    """
    plan, profile, ranges = placed.plan, placed.profile, placed.ranges
    share = plan.microbatches // plan.replicas // placed.schedule.copies
    least = min(_part(one, ranges[stage], profile) for one in sums)
    if placed.schedule.copies > 1:
        return (share - 1) * max(0.0, least - seams)
    table = layer_table(profile, plan.samples, plan.threads)
    forward, back = table.forward[MEDIAN], [table.backward[MEDIAN]]
    if placed.schedule.splits:
        back.append(table.backward_input[MEDIAN])
    held = plan.stages_of[placed.holders[stage][0]]
    work = least + sum(_part(forward, ranges[s], profile) for s in held if s != stage)
    work += sum(min(_part(one, ranges[s], profile) for one in back) for s in held if s > stage)
    own = least - _part(forward, ranges[stage], profile)  # the last backward itself
    return max(0.0, share * max(0.0, work - seams) - own)


def _crossing(placed: Placed) -> tuple[Floats, Floats]:
    """Return the bytes that each host sends, and receives, as stages send to each other."""
    plan, schedule = placed.plan, placed.schedule
    sent, received = np.zeros(len(outward(placed.cluster))), np.zeros(len(outward(placed.cluster)))
    if plan.uneven:
        return sent, received
    share = plan.microbatches // plan.replicas / schedule.copies
    homes = [schedule.homes(stage, plan.depth) for stage in range(len(plan.stages))]
    key = "between hosts", plan.groups, plan.depth
    known = memoised(placed.cluster, key, lambda: dict[tuple[int, int], tuple[Floats, Floats]]())
    for edge in plan.edges:
        forward = share * placed.edge_bytes(edge, gradients=False)
        back = share * placed.edge_bytes(edge, gradients=True) if schedule.trains else 0.0
        for pair in zip(homes[edge.producer], homes[edge.consumer], strict=True):
            if pair not in known:
                known[pair] = _between_hosts(placed, *pair)
            leaving, entering = known[pair]
            sent += forward * leaving + back * entering
            received += forward * entering + back * leaving
    return sent, received


def _between_hosts(placed: Placed, producer: int, consumer: int) -> tuple[Floats, Floats]:
    """How many devices at one place of all pipelines have their next on another host, by their host and by its."""
    cluster, plan = placed.cluster, placed.plan
    places = {host: number for number, host in enumerate(outward(cluster))}
    host_of = cluster.routes.host_of
    rows = zip(plan.groups[producer :: plan.depth], plan.groups[consumer :: plan.depth], strict=True)
    each = (pair for one, other in rows for pair in zip(one, other, strict=True))
    pairs = ((places[host_of[a]], places[host_of[b]]) for a, b in each)
    apart = np.array([pair for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2)
    leaving, entering = (np.bincount(apart[:, end], minlength=len(places)).astype(float) for end in (0, 1))
    return leaving, entering


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
