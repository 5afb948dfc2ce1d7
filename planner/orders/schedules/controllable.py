"""V-Min and V-Half: folded pipelines in a third and in half of 1F1B's memory (Qi et al., arXiv 2405.15362).

A schedule is a building block, the actions of one micro-batch, repeated every 6 slots: F, B and W of a device's two
stages. The longer a block holds an activation, the more of them its repetition holds.
"""

from __future__ import annotations

import numpy as np

from planner.orders.codes import Codes, Order, join, run
from planner.orders.operations import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from planner.orders.schedules.greedy import best
from planner.orders.schedules.registry import Shape, schedule

_PERIOD = 6


@schedule("v-min", placement="vee", chunks=(2, 2), splits=True)
def v_min(shape: Shape) -> Order:
    """Repeat the block in which a micro-batch never waits: a third of 1F1B's memory (arXiv 2405.15362, section 3).

    A device holds at most `2 ((p + 4) // 3)` activations. With F = B = W the makespan bubble is `(4p - 5) F`
    for p > 1, or `4 (p - 1) F` where 3 divides p: two thirds of 1F1B's `6 (p - 1) F`.

    >>> from planner.orders.action import grid
    >>> print(grid(v_min(Shape(2, 3, 2))))
    0F0 3F0 3I0 3W0 0F1 0I0 0W0 3F1 3I1 3W1 0F2 0I1 0W1 3F2 3I2 3W2 0I2 0W2
    1F0 2F0 2I0 1I0 1F1 2F1 2W0 1W0 2I1 1I1 1F2 2F2 2W1 1W1 2I2 1I2 2W2 1W2
    """
    # Where 3 divides p, F of the near and I of the far stage would meet in the same slot.
    waits = (0, 0, 0) if shape.devices % 3 else (2, 0, 2)
    return _repeat(shape, _block(shape.devices, (1, 1, 1, 1), waits))


@schedule("v-half", placement="vee", chunks=(2, 2), splits=True)
def v_half(shape: Shape) -> Order:
    """Half of 1F1B's memory, about half of its bubble (arXiv 2405.15362, section 3).

    A device holds at most `2 ((p + 2) // 2)` activations. Hops take 2 slots on the near stages' way forward and on the
    far stages' way back, else 1; then every W is moved to where its device would wait. With F = B = W the makespan
    bubble is `(3p - 5) F` for even and `(3p - 4) F` for odd p > 2 and M > p / 2, where 1F1B has `6 (p - 1) F`.

    >>> from planner.orders.action import grid
    >>> print(grid(v_half(Shape(2, 3, 2))))
    0F0 0F1 3F0 3I0 0F2 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 0I1 3W2 0I2 0W1 0W2
    1F0 2F0 1F1 2I0 2F1 2W0 1F2 1I0 2I1 2W1 2F2 1I1 1W0 2I2 1I2 2W2 1W1 1W2
    """
    waits = (1, 0, 0) if shape.devices % 2 else (3, 0, 4)
    repeated = _repeat(shape, _block(shape.devices, (2, 1, 2, 1), waits))
    return best("v-half", shape._replace(seconds=()), 2 * ((shape.devices + 2) // 2), (), [repeated])


def _block(p: int, hops: tuple[int, int, int, int], waits: tuple[int, int, int]) -> Codes:
    """Return in which slot a micro-batch's near F, far F, far I, near I, far W, near W are (rows), on every device.

    `hops` are the slots from one device to the next in the first four, `waits` those between them. W take the two
    slots of the period that are left, in the order that lets go of the activations sooner.
    """
    down = np.arange(p)
    up = down[::-1]
    slots = [hops[0] * down]
    for direction, hop, wait in zip((up, down, up), hops[1:], waits, strict=True):
        slots.append(slots[-1].max() + 1 + wait + hop * direction)
    taken = np.stack(slots)
    left = np.array([np.setdiff1d(np.arange(_PERIOD), mine) for mine in (taken % _PERIOD).T]).T
    options = [taken[2:] + 1 + (free - taken[2:] - 1) % _PERIOD for free in (left, left[::-1])]
    weights = np.where(options[0].sum(axis=0) <= options[1].sum(axis=0), *options)
    return np.concatenate([taken, weights])


def _repeat(shape: Shape, block: Codes) -> Order:
    start = _PERIOD * np.arange(shape.microbatches)

    def row(d: int) -> Codes:
        near, far = d, 2 * shape.devices - 1 - d
        pairs = ((FORWARD, (near, far)), (BACKWARD_INPUT, (far, near)), (BACKWARD_WEIGHT, (far, near)))
        actions = join(*(run(op, s, shape.microbatches) for op, stages in pairs for s in stages))
        taken: Codes = actions[np.argsort((block[:, d, None] + start).reshape(-1))]
        return taken

    return tuple(row(d) for d in range(shape.devices))
