"""Schedules with one stage per device, forward then whole backward."""

from __future__ import annotations

from collections.abc import Sequence

from planner.orders.codes import Codes, Order, join, run, weave
from planner.orders.operations import BACKWARD, FORWARD
from planner.orders.schedules.registry import Shape, schedule


@schedule("naive", uneven=True, idles="one at a time")
def naive(shape: Shape) -> Order:
    """One micro-batch at a time goes forward and back: one device works, the others wait.

    >>> from planner.orders.action import grid
    >>> print(grid(naive(Shape(2, 2))))
    0F0 0B0 0F1 0B1
    1F0 1B0 1F1 1B1
    """
    return tuple(weave(run(FORWARD, s, mine), run(BACKWARD, s, mine)) for s, mine, _ in shares(shape))


@schedule("gpipe", uneven=True, idles="fill and drain")
def gpipe(shape: Shape) -> Order:
    """All forwards, then all backwards; every stage holds M activations (Huang et al., arXiv 1811.06965).

    >>> from planner.orders.action import grid
    >>> print(grid(gpipe(Shape(2, 3))))
    0F0 0F1 0F2 0B0 0B1 0B2
    1F0 1F1 1F2 1B0 1B1 1B2
    """
    return tuple(join(run(FORWARD, s, mine), run(BACKWARD, s, mine)) for s, mine, _ in shares(shape))


@schedule("1f1b", uneven=True, idles="fill and drain")
def one_forward_one_backward(shape: Shape) -> Order:
    """Warm up, then alternate; stage s holds at most `stages - s` activations (PipeDream-Flush, arXiv 2006.09503).

    >>> from planner.orders.action import grid
    >>> print(grid(one_forward_one_backward(Shape(2, 3))))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """
    return tuple(alternating(s, mine, warm_up) for s, mine, warm_up in shares(shape))


@schedule("forward-only", updates="never", uneven=True)
def forward_only(shape: Shape) -> Order:
    """Inference, or a teacher: forwards alone.

    >>> from planner.orders.action import grid
    >>> print(grid(forward_only(Shape(2, 3))))
    0F0 0F1 0F2
    1F0 1F1 1F2
    """
    return tuple(run(FORWARD, s, mine) for s, mine, _ in shares(shape))


def alternating(stage: int, mine: range, warm_up: int) -> Codes:
    """One stage's 1F1B: `warm_up` forwards ahead, then one backward for each forward, then the rest backward."""
    forward, backward = run(FORWARD, stage, mine), run(BACKWARD, stage, mine)
    steady = max(0, len(mine) - warm_up)
    return join(forward[:warm_up], weave(backward[:steady], forward[warm_up:]), backward[steady:])


def shares(shape: Shape) -> list[tuple[int, range, int]]:
    """Return stage, micro-batches and warm-up of every device.

    A stage's replicas take the micro-batches in turn (PipeDream's 1F1B-RR); each holds `in_flight` of them.
    """
    replicas = shape.replicas or (1,) * shape.devices
    return [
        (s, range(j, shape.microbatches, r), min(in_flight(s, replicas), len(range(j, shape.microbatches, r))))
        for s, r in enumerate(replicas)
        for j in range(r)
    ]


def in_flight(stage: int, replicas: Sequence[int]) -> int:
    """Return how many micro-batches each replica of a stage has at once, between forward and backward.

    Behind and including stage s there are `sum(replicas[s:])` devices to be kept busy, so each of its r replicas holds
    that over r micro-batches, rounded up: for r = 1 everywhere the `stages - s` of 1F1B, at the input stage PipeDream's
    NOAM (arXiv 1806.03377).

    >>> [in_flight(s, (1, 1, 1)) for s in range(3)], [in_flight(s, (1, 7)) for s in range(2)]
    ([3, 2, 1], [8, 1])
    """
    return -(-sum(replicas[stage:]) // replicas[stage])
