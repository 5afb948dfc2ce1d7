"""Schedules with two pipelines in opposite directions: device d of p holds stages d and p - 1 - d."""

from __future__ import annotations

import numpy as np

from planner.orders.codes import Codes, Order, join, run
from planner.orders.operations import BACKWARD, FORWARD
from planner.orders.schedules.registry import Shape, schedule


def _odd(shape: Shape) -> str | None:
    if shape.devices % 2 or shape.microbatches % 2:
        return f"both directions share alike: p={shape.devices} and M={shape.microbatches} must be even"
    return None


@schedule("chimera", placement="both-ways", impossible=_odd)
def chimera(shape: Shape) -> Order:
    """Two 1F1B pipelines through each other's bubbles (Li and Hoefler, SC 2021, arXiv 2107.06925).

    The first M/2 micro-batches go down (stage s on device s), the others up (stage s on device p - 1 - s). A
    direction's j-th passes stage s in slot `s + 2j` forward and `2p - 1 - s + 2j` backward, where every p/2 of them
    are a unit that starts 2p slots behind the one before; no slot of a device is taken twice, and units follow each
    other without a gap (direct concatenation).

    Bubble p - 2 slots if F = B + W; `2 (p - 2) F` if B + W = 2F and M = p. For M = p the outer devices hold p/2 + 1
    activations, the middle ones p.

    >>> from planner.orders.action import grid
    >>> print(grid(chimera(Shape(4, 4))))
    0F0 0F1 3F2 3B2 3F3 3B3 0B0 0B1
    1F0 2F2 1F1 2F3 2B2 1B0 2B3 1B1
    1F2 2F0 1F3 2F1 2B0 1B2 2B1 1B3
    0F2 0F3 3F0 3B0 3F1 3B1 0B2 0B3
    """
    p, half = shape.devices, shape.microbatches // 2
    j = np.arange(half)
    start = j // (p // 2) * 2 * p + j % (p // 2) * 2

    def row(d: int) -> Codes:
        ways = (d, range(half)), (p - 1 - d, range(half, 2 * half))
        actions = join(*(run(op, s, mine) for op in (FORWARD, BACKWARD) for s, mine in ways))
        slots = join(*(start + s for s, _ in ways), *(start + 2 * p - 1 - s for s, _ in ways))
        taken: Codes = actions[np.argsort(slots)]
        return taken

    return tuple(row(d) for d in range(p))
