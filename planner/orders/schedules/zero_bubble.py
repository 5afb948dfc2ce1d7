"""Schedules that split the backward: I hands the input gradient on, W (the weight gradient) waits and fills bubbles.

Bubbles are given for equal stages whose actions take F, B (for I) and W seconds; activations are held from F to W.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from planner.orders.codes import Codes, Order, run, with_op
from planner.orders.operations import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from planner.orders.schedules.greedy import Rules, best
from planner.orders.schedules.interleaved import rounds, turns, uneven_rounds
from planner.orders.schedules.registry import Shape, schedule

RULES = tuple(Rules(*choice) for choice in product((1.0, 1.25, 2.0, 1e9), (0.0, 0.5), (True, False)))
"""What the list schedulers try: 1F1B's forwards ahead, ZB-H2's, something between, and as many as memory allows."""


@schedule("zb-h1", splits=True)
def handcrafted_1(shape: Shape) -> Order:
    """1F1B whose W lag behind: in as much memory as 1F1B, a third of its bubble (Qi et al., arXiv 2401.10241, 2.1).

    Makespan bubble `(p - 1) (F + B - W)` if W <= F and W <= B, in general `(p - 1) max(F, B, F + B - W)`, for M >= p;
    with fewer micro-batches, and W <= F and W <= B, `(p - 1) (F + B) - (M - 1) W`. Every device holds at most min(p, M)
    activations.

    >>> from planner.orders.action import grid
    >>> print(grid(handcrafted_1(Shape(3, 4))))
    0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """
    last = shape.devices - 1
    return tuple(_row(d, shape.microbatches, last - d, last) for d in range(shape.devices))


@schedule("zb-h2", splits=True)
def handcrafted_2(shape: Shape) -> Order:
    """No bubble between a device's first and last action, if F = B = W (Qi et al., arXiv 2401.10241, 2.2).

    Span bubble `(p - 1) (F + B - 2W)` if W <= F and W <= B, in general `(p - 1) max(F + B - 2W, B - F, 0)`, for
    M >= 2p - 1; fewer micro-batches do not fill the pipeline. Every device holds at most min(2p - 1, M) activations.

    >>> from planner.orders.action import grid
    >>> print(grid(handcrafted_2(Shape(2, 4))))
    0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3
    """
    last = shape.devices - 1
    return tuple(_row(d, shape.microbatches, 2 * (last - d), 2 * last) for d in range(shape.devices))


def _row(stage: int, microbatches: int, backward: int, weight: int) -> Codes:
    parts = (FORWARD, 0), (BACKWARD_INPUT, backward), (BACKWARD_WEIGHT, weight)
    return stagger(*((run(op, stage, microbatches), turn) for op, turn in parts))


def stagger(*parts: tuple[Codes, int]) -> Codes:
    """Take one of each part in turn, each part starting in a turn of its own and ending when it is used up.

    >>> from planner.orders.codes import unpack
    >>> [unpack(c)[::2] for c in stagger((run("F", 0, 3), 0), (run("I", 0, 3), 1)).tolist()]
    [('F', 0), ('F', 1), ('I', 0), ('F', 2), ('I', 1), ('I', 2)]
    """
    turns = np.concatenate([np.arange(first, first + len(part)) for part, first in parts])
    which = np.repeat(np.arange(len(parts)), [len(part) for part, _ in parts])
    taken: Codes = np.concatenate([part for part, _ in parts])[np.lexsort((which, turns))]
    return taken


@schedule("zb-interleaved", placement="looped", chunks=(1, None), splits=True, impossible=uneven_rounds)
def interleaved_zero_bubble(shape: Shape) -> Order:
    """ZB-H1 over v stages per device, as torch's InterleavedZeroBubble has it (Qi et al., arXiv 2401.10241).

    Makespan bubble `(p - 1) (F + B - W)` in the seconds of one of the v stages, for M >= p and W <= F, B; every device
    holds v p activations of a stage where M is a multiple of p. With v = 1 it is ZB-H1.

    >>> from planner.orders.action import grid
    >>> print(grid(interleaved_zero_bubble(Shape(2, 2, 2))))
    0F0 0F1 2F0 2F1 2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1
    1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 3W1 1I1 1W0 1W1
    """
    p, v, m = shape.devices, shape.chunks, shape.microbatches
    per_round = m // rounds(shape)

    def row(d: int) -> Codes:
        forward, backward = turns(shape, d, per_round)
        first = min((v - 1) * per_round + p - 1 - d, v * m)
        return stagger(
            (forward, 0),
            (with_op(backward, BACKWARD_INPUT), first),
            (with_op(backward, BACKWARD_WEIGHT), first + d),
        )

    return tuple(row(d) for d in range(p))


def _once(shape: Shape) -> int:
    return shape.devices


def _twice(shape: Shape) -> int:
    return 2 * shape.devices


@schedule("zb-greedy", splits=True, limit=_once)
def greedy_1p(shape: Shape) -> Order:
    """The best of ZB-H1 and list scheduling for measured seconds, in 1F1B's memory (arXiv 2401.10241, section 3).

    Also tried is ZB-H1 with W placed where the seconds want them. Every device holds at most p activations, and it is
    never slower than ZB-H1.

    >>> from planner.orders.action import grid
    >>> print(grid(greedy_1p(Shape(2, 3, seconds=((2, 1, 1), (1, 1, 1))))))
    0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    return best("zb-greedy", shape, _once(shape), RULES, [handcrafted_1(shape)])


@schedule("zb-greedy-2p", splits=True, limit=_twice)
def greedy_2p(shape: Shape) -> Order:
    """As `greedy_1p`, but in twice the memory: at most 2p activations, never slower than ZB-H1 and ZB-H2.

    >>> from planner.orders.action import grid
    >>> print(grid(greedy_2p(Shape(2, 3, seconds=((2, 1, 1), (1, 1, 1))))))
    0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2
    1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2
    """
    others = [greedy_1p(shape), handcrafted_2(shape)]
    return best("zb-greedy-2p", shape, _twice(shape), RULES, others)
