"""Schedules with several stages per device, dealt round: device d of p holds stages d, d + p, d + 2p, ..."""

from __future__ import annotations

import numpy as np

from planner.orders.codes import STAGE, Codes, Order, code, join, run, weave
from planner.orders.operations import BACKWARD, FORWARD
from planner.orders.schedules.registry import Shape, schedule
from planner.orders.schedules.straight import one_forward_one_backward


def rounds(shape: Shape) -> int:
    """Return in how many rounds of at least p the micro-batches go round; there is always one."""
    return max(1, shape.microbatches // shape.devices)


def uneven_rounds(shape: Shape) -> str | None:
    """Return why the rounds would not be equal, or None when they are."""
    if shape.microbatches % rounds(shape):
        return (
            f"M={shape.microbatches} micro-batches do not fall into {rounds(shape)} equal rounds; use a multiple of p"
        )
    return None


@schedule("interleaved", placement="looped", chunks=(1, None), impossible=uneven_rounds)
def interleaved(shape: Shape) -> Order:
    """1F1B over v stages per device: the bubble is v times shorter (Narayanan et al., arXiv 2104.04473).

    The micro-batches go round in rounds of about p; each round passes all of a device's stages. Device i of p holds
    at most `(v - 1) p + 2 (p - 1 - i) + 1` activations of a stage. With v = 1 it is 1F1B.

    >>> from planner.orders.action import grid
    >>> print(grid(interleaved(Shape(2, 2, 2))))
    0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1
    1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
    """
    if shape.chunks == 1:
        return one_forward_one_backward(shape)
    p, v, m = shape.devices, shape.chunks, shape.microbatches
    per_round = m // rounds(shape)

    def row(d: int) -> Codes:
        warm_up = min((v - 1) * per_round + 2 * (p - 1 - d), v * m)
        forward, backward = turns(shape, d, per_round)
        steady = v * m - warm_up
        return join(forward[:warm_up], weave(forward[warm_up:], backward[:steady]), backward[steady:])

    return tuple(row(d) for d in range(p))


def turns(shape: Shape, device: int, per_round: int) -> tuple[Codes, Codes]:
    """Return a device's forwards and backwards in the order in which rounds of micro-batches pass its stages."""
    p, v, m = shape.devices, shape.chunks, shape.microbatches
    k = np.arange(v * m)
    microbatch = k // (per_round * v) * per_round + k % per_round
    chunk = k // per_round % v

    def at(op: str, chunks: Codes) -> Codes:
        return ((chunks * p + device) << STAGE) + microbatch + 1 + code(op, 0)

    return at(FORWARD, chunk), at(BACKWARD, v - 1 - chunk)


@schedule("looped-bfs", placement="looped", chunks=(1, None))
def looped_breadth_first(shape: Shape) -> Order:
    """All micro-batches pass a stage before the device turns to its next one (Lamy-Poirier, arXiv 2211.05953).

    Each stage's parameters are needed once per direction, which is what sharded parameters want; activations are
    those of GPipe. Backwards run in the reverse order of forwards.

    >>> from planner.orders.action import grid
    >>> print(grid(looped_breadth_first(Shape(2, 2, 2))))
    0F0 0F1 2F0 2F1 2B1 2B0 0B1 0B0
    1F0 1F1 3F0 3F1 3B1 3B0 1B1 1B0
    """
    last = shape.microbatches - 1
    return tuple(
        join(
            *(run(FORWARD, s, shape.microbatches) for s in range(d, shape.stages, shape.devices)),
            *(run(BACKWARD, s, range(last, -1, -1)) for s in reversed(range(d, shape.stages, shape.devices))),
        )
        for d in range(shape.devices)
    )
