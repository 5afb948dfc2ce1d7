"""A step of very many micro-batches from one of few: what its steady state adds per round is added as often as asked.

A program for M + c micro-batches is that for M with a round of c more in the middle of every run of them. So each
action of the shorter one has its own in the longer one: the same micro-batch if that lies in the first half, else the
one c further. Three lengths are walked, c apart. If every action comes later by the same from the first to the second
as from the second to the third, and nothing that an action waits for is delayed by more than the action itself, then
whatever decides when it happens decides it in all longer steps as well, and it comes later by that much with every
round (a max-plus recurrence that has become periodic: Baccelli et al., Synchronization and Linearity, 1992, ch. 3).
Bytes are treated likewise, and where links are shared what goes on behind every action: the same recurrence from the
end, of which `planner.simulate.link_bound` makes a bound. Where that does not hold, longer steps are tried; where it
never does, there is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import prices_of
from planner.orders import codes
from planner.orders.operations import LOAD, OPS
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.link_bound import Passing, by_plane, crowded, everybody, heaviest, one_machine, passing
from planner.simulate.longest_path import timed
from planner.values.plan import asynchronous

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WORTH_IT = 64
"""So many times longer than the longest of three walked must a step be: comparing three costs twenty walks."""
TOLERANCE = 1e-12
"""Of a step's seconds, or a device's bytes: rounding when times are added up in another order."""


class Step(NamedTuple):
    """A walked step of `microbatches` per pipeline: seconds at which each action ends, bytes it reaches, its links."""

    microbatches: int
    linked: Linked
    end: Floats
    level: Floats
    links: Passing


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
    walked = linked.buffered() if placed.cluster.buffered else linked
    prices = prices_of(placed, walked)
    meeting = everybody(placed, prices, walked.devices)
    prices = crowded(placed, prices, meeting)
    when = timed(walked, prices)
    links = passing(placed, walked, prices, meeting, when.begun, everywhere=True)
    return Step(microbatches, linked, when.end, MemoryModel(placed, linked).levels(), links)


def _continued(steps: list[Step], target: int) -> tuple[float, Floats] | None:
    """Continue the last of three steps, if they are periodic."""
    first, second, third = steps
    half, period = first.microbatches // 2, second.microbatches - first.microbatches
    places = [_Places(step.linked, step.microbatches) for step in steps]
    to_second = places[1].find(places[0], half, period)
    to_third = places[2].find(places[1], half, period)
    if to_second is None or to_third is None:
        return None
    exact = TOLERANCE * float(third.end.max())
    later = _growth((first.end, second.end, third.end), to_second, to_third, exact)
    levels = (first.level, second.level, third.level)
    more = _growth(levels, to_second, to_third, TOLERANCE * float(third.level.max()))
    if later is None or more is None:
        return None
    edges, shift = _edges(second.linked), places[1].shift(half, period)
    if not _keeps_up(places[1], places[2], edges, shift, (second.end, third.end), later + exact):
        return None
    rounds = (target - second.microbatches) // period
    step_s = float((second.end + rounds * later).max())
    if second.links.total:
        behind = [step.links.following for step in steps]
        longer = _growth(behind, to_second, to_third, exact)
        turned = [(before, who) for who, before in edges]
        if longer is None or not _keeps_up(places[1], places[2], turned, shift, behind[1:], longer + exact):
            return None
        bound = _link_bound(steps, half, period, rounds, exact)
        if bound is None:
            return None
        step_s = max(step_s, bound)
    return step_s, np.maximum.reduceat(second.level + rounds * more, second.linked.offsets[:-1])


def _growth(values: Sequence[Floats], to_second: Ints, to_third: Ints, exact: float) -> Floats | None:
    """Return by how much each value of the second step grows in the third, None where it grew otherwise before."""
    first, second, third = values
    more = third[to_third] - second
    return None if np.abs((second[to_second] - first) - more[to_second]).max(initial=0.0) > exact else more


def _link_bound(steps: list[Step], half: int, period: int, rounds: int, exact: float) -> float | None:
    """Return the bound of what the links carry of a step that is longer than the second by some rounds.

    It is that of a short step, with all transfers of an operation together: of these the first begins first, and the
    last has the shortest rest of the step behind it. So the rounds between need not be known. None where they are not
    periodic.
    """
    _, second, third = steps
    to_second, to_third = (_image(one, other, half, period) for one, other in pairwise(steps))
    if to_second is None or to_third is None:
        return None
    later = _growth([step.links.head for step in steps], to_second, to_third, exact)
    longer = _growth([step.links.behind for step in steps], to_second, to_third, exact)
    if later is None or longer is None:
        return None
    head, behind = second.links.head + rounds * later, second.links.behind + rounds * longer
    bound = 0.0
    total = {link: one + rounds * (third.links.total.get(link, one) - one) for link, one in second.links.total.items()}
    for link in heaviest(total):
        busy, longest = second.links.busy(link), third.links.busy(link)
        mine = busy > 0
        planes, heads, rests = by_plane(second.links.plane[mine], head[mine], behind[mine])
        short, long = (np.bincount(second.links.plane, busy)[planes], np.bincount(third.links.plane, longest)[planes])
        bound = max(bound, one_machine(heads, short + rounds * (long - short), rests))
    return bound


def _image(one: Step, other: Step, half: int, period: int) -> Ints | None:
    """Return where what passes the links of a step has its place among that of a longer one."""
    numbers = one.links.numbers
    planes = one.links.plane[: len(numbers)] - 1
    base, longer = (np.array([base for _, base in step.linked.planes], np.int64) for step in (one, other))
    slot, m = np.divmod(numbers - base[planes], one.linked.microbatches)
    pipeline, local = np.divmod(m, one.microbatches)
    m = pipeline * other.microbatches + local + np.where(local >= half, period, 0)
    image = longer[planes] + slot * other.linked.microbatches + m
    at = np.searchsorted(other.links.numbers, image)
    updates = len(one.links.head) - len(numbers)
    if updates != len(other.links.head) - len(other.links.numbers) or (at == len(other.links.numbers)).any():
        return None
    if not np.array_equal(other.links.numbers[at], image):
        return None
    return np.append(at, len(other.links.numbers) + np.arange(updates))


def _edges(linked: Linked) -> list[tuple[Ints, Ints]]:
    """Return who waits for whom, as places of actions.

    An action waits for the one before it, and for those before the posts of its transfers: a post takes no time.
    """
    first = np.zeros(len(linked.flat), bool)
    first[linked.offsets[:-1][np.diff(linked.offsets) > 0]] = True
    actions = np.flatnonzero(~first)
    edges = [(actions, actions - 1)]
    posting = np.flatnonzero((linked.posts >= 0) & ~first)
    by_transfer = posting[np.argsort(linked.posts[posting], kind="stable")]
    transfers = linked.posts[by_transfer]
    for waited in (linked.waits, linked.needs):
        waiting = np.flatnonzero(waited >= 0)
        begin, stop = (np.searchsorted(transfers, waited[waiting], side) for side in ("left", "right"))
        who = np.repeat(waiting, stop - begin)
        nth = np.arange(len(who)) - np.repeat(np.cumsum(stop - begin) - (stop - begin), stop - begin)
        edges.append((who, by_transfer[np.repeat(begin, stop - begin) + nth] - 1))
    return edges


def _keeps_up(
    one: _Places,
    other: _Places,
    edges: list[tuple[Ints, Ints]],
    shift: Ints,
    values: Sequence[Floats],
    later: Floats,
) -> bool:
    """Whether nothing that an action waits for is delayed by more than the action itself, from one step to the other.

    `values` are when actions end in both; turned round, with edges turned round, what goes on behind them.
    """
    short, long = values
    for who, before in edges:
        at = other.at(one.name[before] + np.where(one.moves[before], shift[who], 0))
        if at is None or (long[at] - short[before] > later[who]).any():
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
