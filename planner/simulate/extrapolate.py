"""A step of very many micro-batches from one of few: what its steady state adds per round is added as often as asked.

A program for M + c micro-batches is that for M with a round of c more in the middle of every run of them. So each
action of the shorter one has its own in the longer one: the same micro-batch if that lies in the first half, else the
one c further. Three lengths are walked, c apart. If every action comes later by the same from the first to the second
as from the second to the third, and nothing that an action waits for is delayed by more than the action itself, then
whatever decides when it happens decides it in all longer steps as well, and it comes later by that much with every
round (a max-plus recurrence that has become periodic: Baccelli et al., Synchronization and Linearity, 1992, ch. 3).
Bytes are treated likewise. Where that does not hold, longer steps are tried; where it never does, there is no answer.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders import codes
from planner.orders.operations import LOAD, OPS
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.longest_path import walk
from planner.values.plan import asynchronous

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WORTH_IT = 64
"""So many times longer than the longest of three walked must a step be: comparing three costs twenty walks."""
TOLERANCE = 1e-12
"""Of a step's seconds, or a device's bytes: rounding when times are added up in another order."""


class Step(NamedTuple):
    """A walked step of `microbatches` per pipeline: seconds at which each action ends, bytes it reaches."""

    microbatches: int
    linked: Linked
    end: Floats
    level: Floats


def extrapolate(placed: Placed, replicas: int | None = None) -> tuple[float, Floats, dict[str, float]] | None:
    """Return the step's seconds, every row's and every host's peak bytes, or None where shorter steps do not tell.

    `replicas` is how many of them `unroll` unrolls. Schedules that order by measured seconds, stages with different
    numbers of replicas, plans without flush and plans whose micro-batches take turns on an engine are left to the full
    walk; so are steps that are not long.
    """
    plan, schedule = placed.plan, placed.schedule
    in_turn = plan.offload or "gradients" in placed.synchronisation.shards
    if asynchronous(plan) or plan.uneven or schedule.measured or in_turn:
        return None
    pipelines = plan.replicas * schedule.copies
    target = plan.microbatches // pipelines
    period = 2 * plan.depth  # interleaved schedules go round in p micro-batches
    shortest = 4 * len(plan.stages)
    while True:
        shortest += (target - shortest) % period
        if WORTH_IT * (shortest + 2 * period) > target:
            return None
        lengths = (shortest + turn * period for turn in range(3))
        steps = [_step(placed, length, pipelines, replicas) for length in lengths]
        found = _continued(steps, target)
        if found is not None:
            return *found, MemoryModel(placed, steps[0].linked).hosts
        shortest *= 2


def _step(placed: Placed, microbatches: int, pipelines: int, replicas: int | None) -> Step:
    """Walk fewer micro-batches, at the prices of the plan itself: its batch is loaded once, however long it is."""
    count = microbatches * pipelines
    plan = placed.plan
    short = msgspec.structs.replace(plan, microbatches=count, batch=count * plan.samples)
    linked = Linked(unroll(short, replicas=replicas))
    return Step(microbatches, linked, walk(costs_of(placed, linked)).end, MemoryModel(placed, linked).levels())


def _continued(steps: list[Step], target: int) -> tuple[float, Floats] | None:
    """Continue the last of three steps, if they are periodic."""
    first, second, third = steps
    half, period = first.microbatches // 2, second.microbatches - first.microbatches
    places = [_Places(step.linked, step.microbatches) for step in steps]
    to_second = places[1].find(places[0], half, period)
    to_third = places[2].find(places[1], half, period)
    if to_second is None or to_third is None:
        return None
    later = third.end[to_third] - second.end
    more = third.level[to_third] - second.level
    exact = TOLERANCE * third.end.max()
    if np.abs((second.end[to_second] - first.end) - later[to_second]).max() > exact:
        return None
    if np.abs((second.level[to_second] - first.level) - more[to_second]).max() > TOLERANCE * third.level.max():
        return None
    if not _keeps_up(places[1], places[2], second, third, later + exact, half, period):
        return None
    rounds = (target - second.microbatches) // period
    peaks = np.maximum.reduceat(second.level + rounds * more, second.linked.offsets[:-1])
    return float((second.end + rounds * later).max()), peaks


def _keeps_up(one: _Places, other: _Places, short: Step, long: Step, later: Floats, half: int, period: int) -> bool:
    """Whether nothing that an action waits for is delayed by more than the action itself.

    It waits for the action before it, and for those before the posts of its transfers: a post takes no time.
    """
    linked = short.linked
    first = np.zeros(len(linked.flat), bool)
    first[linked.offsets[:-1][np.diff(linked.offsets) > 0]] = True
    shift = one.shift(half, period)
    actions = np.flatnonzero(~first)
    waits = [(actions, actions - 1)]
    posting = np.flatnonzero((linked.posts >= 0) & ~first)
    by_transfer = posting[np.argsort(linked.posts[posting], kind="stable")]
    transfers = linked.posts[by_transfer]
    for waited in (linked.waits, linked.needs):
        waiting = np.flatnonzero(waited >= 0)
        begin, stop = (np.searchsorted(transfers, waited[waiting], side) for side in ("left", "right"))
        who = np.repeat(waiting, stop - begin)
        nth = np.arange(len(who)) - np.repeat(np.cumsum(stop - begin) - (stop - begin), stop - begin)
        waits.append((who, by_transfer[np.repeat(begin, stop - begin) + nth] - 1))
    for who, before in waits:
        at = other.at(one.name[before] + np.where(one.moves[before], shift[who], 0))
        if at is None or (long.end[at] - short.end[before] > later[who]).any():
            return False
    return True


class _Places:
    """Where every action stands, by its row and its name in which each pipeline's micro-batches count from 0.

    Replicas and Chimera's two directions are pipelines of `microbatches` each; a row's stage belongs to one of them.
    """

    def __init__(self, linked: Linked, microbatches: int) -> None:
        kind = linked.row * (linked.stages * len(OPS)) + codes.stages(linked.flat) * len(OPS)
        self.moves = (linked.flat & codes.MICROBATCH) > 0
        self.local = np.where(self.moves, codes.microbatches(linked.flat) % microbatches, -1)
        self.name = (kind + codes.ops(linked.flat) << 32) + self.local + 1
        self.order = np.argsort(self.name)
        self.starts = codes.has(linked.flat, LOAD)

    def shift(self, half: int, period: int) -> Ints:
        """How many micro-batches later each action is in a longer step; what has none stands at its begin or end."""
        return np.where(np.where(self.moves, self.local >= half, ~self.starts), period, 0)

    def find(self, other: _Places, half: int, period: int) -> Ints | None:
        """Return where the actions of a shorter step stand here, or None when one has no place."""
        return self.at(other.name + np.where(other.moves, other.shift(half, period), 0))

    def at(self, name: Ints) -> Ints | None:
        """Return where actions stand, or None when one does not."""
        found = np.searchsorted(self.name, name, sorter=self.order)
        place = self.order[np.minimum(found, len(self.order) - 1)]
        return place if np.array_equal(self.name[place], name) else None
