"""How many micro-batches each stage of a plan has at once, and how many messages, from the order of its actions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from planner.orders import codes, schedules
from planner.orders.codes import Order
from planner.orders.edges import Edges, chain
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FETCH,
    FORWARD,
    RECV_BACKWARD,
    RECV_FORWARD,
    RELEASE,
    SEND_BACKWARD,
)
from planner.programs.lowering import compute_order, taking_turns
from planner.programs.messages import messages
from planner.programs.program import Program
from planner.programs.savings import offload
from planner.programs.waits import Linked
from planner.values.plan import Plan, asynchronous, windows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ARRANGED = 1 << 20
"""Stages times micro-batches up to which a schedule is arranged for a bound: more takes longer than making the plan."""
KEPT = 64
"""Shapes of which it is kept where stages are: a search asks for one again and again, then for another."""


class Flight(NamedTuple):
    """Most micro-batches that each stage has at once, from the order of its actions.

    `held` are between their forward and the end of their backward, of `resident` ones what they saved is on the device
    (others' is on the host), and of `repeated` ones what they recomputed: of backwards in two halves several. Messages
    are there of `entering` ones from the stage before, of `returning` ones from the stage behind, and of `leaving` ones
    back to the stage before.
    """

    held: tuple[int, ...]
    resident: tuple[int, ...]
    repeated: tuple[int, ...]
    entering: tuple[int, ...]
    returning: tuple[int, ...]
    leaving: tuple[int, ...]

    def of(self, stage: int) -> tuple[int, int, int]:
        """A stage's micro-batches: held, resident and repeated."""
        return self.held[stage], self.resident[stage], self.repeated[stage]

    def messages(self, stage: int) -> tuple[int, int, int]:
        """A stage's messages: entering, returning and leaving."""
        return self.entering[stage], self.returning[stage], self.leaving[stage]


def flight(plan: Plan) -> Flight:
    """Return the most micro-batches that each stage of a plan has at once, as its schedule and offloading have it.

    Where a schedule orders by seconds and the plan has none yet, as many as the schedule's limit allows.
    """
    swapped = plan.offload and schedules.get(plan.schedule).trains
    if plan.uneven:
        return _flight(compute_order(plan), plan.edges, swapped, turns=taking_turns(plan))
    share = plan.microbatches // plan.replicas * (windows(plan) if asynchronous(plan) else 1)
    shape = schedules.Shape(plan.depth, share, plan.chunks, seconds=plan.stage_seconds)
    limit = schedules.get(plan.schedule).limit
    if limit and not shape.seconds:
        most = (min(limit(shape), share),) * shape.stages
        entering = tuple(min(2 * n, share) for n in most)  # those of the stage before, too
        return Flight(most, most, most, entering, most, most)
    return _arranged(plan.schedule, shape, swapped)


@functools.lru_cache(maxsize=4096)
def _arranged(schedule: str, shape: schedules.Shape, swapped: bool) -> Flight:
    return _flight(schedules.arrange(schedule, shape), chain(shape.stages), swapped, schedule)


def _flight(order: Order, edges: Edges, swapped: bool, schedule: str = "", turns: tuple[int, ...] = ()) -> Flight:
    """Count in an order. What is on its way is counted, too, unless a schedule's pace tells."""
    import numpy as np

    def most(rows: Order, begins: tuple[str, ...], ends: tuple[str, ...]) -> tuple[int, ...]:
        found = [1] * edges.stages
        for row in rows:
            for stage in np.unique(codes.stages(row)).tolist():
                own = row[codes.stages(row) == stage]
                change = codes.has(own, *begins).astype(int) - codes.has(own, *ends)
                found[stage] = max(found[stage], int(np.cumsum(change).max()))
        return tuple(found)

    resident = held = most(order, (FORWARD,), (BACKWARD, BACKWARD_WEIGHT))
    repeated = most(order, (BACKWARD_INPUT,), (BACKWARD_WEIGHT,))
    if swapped:
        away = tuple(offload(row) for row in order)
        resident = most(away, (FORWARD, FETCH), (BACKWARD, BACKWARD_WEIGHT, RELEASE))
    if not schedule or schedules.get(schedule).measured:
        return Flight(held, resident, repeated, *_on_their_way(order, edges, turns))
    # One message more than there are micro-batches is posted early. A gradient that is sent stays until that is known:
    # in a plain pipeline the next micro-batch's messages tell.
    one_more, other = tuple(n + 1 for n in held), tuple(n + 1 for n in repeated)
    leaving = repeated if schedules.get(schedule).placement == "straight" else held
    return Flight(held, resident, repeated, one_more, other, leaving)


def _on_their_way(order: Order, edges: Edges, turns: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return messages that are entering, returning and leaving, as the actions of an order have them.

    Where stages have different numbers of replicas, or go at their own pace, all that the stage before has in flight
    may have been posted; and replicas that take turns rarely talk to each other again, so that it takes long until a
    sender knows what has come. What leaves has entered before: of both together, leaving is what exceeds the entering.
    """
    import numpy as np

    linked = Linked(Program(messages(order, edges, turns), edges))
    back = codes.has(linked.flat, BACKWARD, BACKWARD_WEIGHT)
    ends = back if back.any() else codes.has(linked.flat, FORWARD)
    stage, begins = codes.stages(linked.flat), linked.offsets.tolist()
    sends, enters, returns = (codes.has(linked.flat, op) for op in (SEND_BACKWARD, RECV_FORWARD, RECV_BACKWARD))

    def on_row(s: int, row: int) -> tuple[int, int, int]:
        own = slice(begins[row], begins[row + 1])
        mine = stage[own] == s
        over = (mine & ends[own]).astype(int)
        left = (mine & sends[own]).astype(int)
        known = linked.completions[linked.posts[own][left > 0]]
        np.subtract.at(left, known[known >= 0] - own.start, 1)
        entering, returning = (
            np.cumsum(change - over * bool(change.any())) for change in (mine & enters[own], mine & returns[own])
        )
        most = int(entering.max(initial=0))
        both = int((entering + np.cumsum(left)).max(initial=0))
        return most, int(returning.max(initial=0)), both - most

    rows_of = enumerate(linked.program.holders)
    of_stage = [tuple(map(max, zip(*(on_row(s, row) for row in rows), strict=True))) for s, rows in rows_of]
    return tuple(zip(*of_stage, strict=True))


class Moment(NamedTuple):
    """What each row of a pipeline has at one moment between two of its actions, as arrays (stages, rows).

    Of every stage the micro-batches between their forward and the end of their backward, and how many of these have
    repeated nothing yet: what they forget is not there.
    """

    having: Floats
    forgetting: Floats


@functools.lru_cache(maxsize=KEPT)
def fullest(schedule: str, shape: schedules.Shape) -> tuple[Moment, ...]:
    """Return the moments at which rows have most micro-batches, and at which most of them have been repeated.

    Only a backward in two halves leaves a repeated micro-batch there when its first half is done.
    """
    import numpy as np

    found = [Moment(*np.zeros((2, shape.stages, shape.devices))) for _ in range(2)]
    for number, row in enumerate(schedules.arrange(schedule, shape)):
        over = codes.has(row, BACKWARD, BACKWARD_WEIGHT).astype(int)
        having = codes.has(row, FORWARD) - over
        forgetting = codes.has(row, FORWARD).astype(int) - codes.has(row, BACKWARD, BACKWARD_INPUT)
        stages = codes.stages(row)
        for moment, counted in zip(found, (having, having - forgetting), strict=True):
            until = int(np.cumsum(counted).argmax()) + 1
            for into, change in zip(moment, (having, forgetting), strict=True):
                into[:, number] = np.bincount(stages[:until], change[:until], minlength=shape.stages)
    return tuple(found[: 2 if schedules.get(schedule).splits else 1])
