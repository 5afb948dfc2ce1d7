"""Passes that add memory savings to rows: what is forgotten and computed again, what is copied to the host and back."""

from __future__ import annotations

import numpy as np

from planner.orders import codes
from planner.orders.codes import Codes, Order
from planner.orders.operations import BACKWARD, BACKWARD_INPUT, COMPUTES, FETCH, FORWARD, OFFLOAD, RECOMPUTE, RELEASE


def recompute(rows: Order, stages: Codes) -> Order:
    """Repeat a micro-batch's forward right before its backward, on the given stages."""
    if not len(stages):
        return rows
    return tuple(
        codes.insert(
            row,
            codes.has(row, BACKWARD, BACKWARD_INPUT) & np.isin(codes.stages(row), stages),
            RECOMPUTE,
            behind=False,
        )
        for row in rows
    )


def offload(row: Codes) -> Codes:
    """Copy a micro-batch's saved activations to the host behind its forward, and back one compute before its backward.

    A copy out runs beside the computes. Its memory is freed at the RELEASE before the second compute behind it, which
    waits for the copy: that bounds what is held, whatever the link's speed. A micro-batch with fewer than four computes
    between its forward and its backward stays.

    >>> from planner.orders.action import actions
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(*actions(offload(arrange("1f1b", Shape(6, 6))[1]))[:12])
    1F0 1OFFLOAD0 1F1 1OFFLOAD1 1RELEASE0 1F2 1OFFLOAD2 1RELEASE1 1F3 1OFFLOAD3 1RELEASE2 1FETCH0
    """
    computing = codes.has(row, *COMPUTES)
    computes, turn = np.flatnonzero(computing), np.cumsum(computing) - 1
    forward = np.flatnonzero(codes.has(row, FORWARD))
    takers = np.flatnonzero(codes.has(row, RECOMPUTE, BACKWARD, BACKWARD_INPUT))
    taken, first = np.unique(codes.with_op(row[takers], FORWARD), return_index=True)
    back = takers[first][np.searchsorted(taken, row[forward])]
    before = turn[back] - computing[back]  # the compute before the one that needs the activations
    stays = before - turn[forward] < 4
    forward, before = forward[~stays], before[~stays]
    at = np.concatenate([forward + 1, computes[turn[forward] + 2], computes[before]])
    return np.insert(row, at, np.concatenate([codes.with_op(row[forward], op) for op in (OFFLOAD, RELEASE, FETCH)]))
