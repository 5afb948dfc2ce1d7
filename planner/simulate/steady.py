"""How fast a plan without flush is, once its pipeline is full."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from planner.orders import codes
from planner.orders.operations import BACKWARD, BACKWARD_WEIGHT, FORWARD
from planner.programs.waits import Linked
from planner.values.plan import STEADY_TURNS, Plan, full, whole_turn, windows

ROUNDING = 1e-9
"""Of a turn's seconds: by so much two that are alike may differ."""


def steady_step(plan: Plan, linked: Linked, end: npt.NDArray[np.float64]) -> float:
    """Return the seconds between two steps in the middle of an unrolled asynchronous program.

    A stage's step is over when it has had all backwards of M micro-batches. The first steps fill the pipeline and the
    last drain it; between them lie those that are `full`, over which the mean is taken: that of the slowest stage, as
    one that has waited may catch up for a while. Where replicas take turns, how long a part of a turn takes depends on
    which, and the first turns are not like the others: the mean is that of `_period` micro-batches.
    """
    steady, count = full(plan), windows(plan)
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    backward = codes.has(linked.flat, BACKWARD, BACKWARD_WEIGHT)
    last = backward if backward.any() else codes.has(linked.flat, FORWARD)
    every = np.flatnonzero(last)
    own = codes.microbatches(linked.flat[every]) % (share * count)
    done = np.zeros((linked.stages, share * count))
    np.maximum.at(done, (codes.stages(linked.flat[every]), own), end[every])
    np.maximum.accumulate(done, axis=1, out=done)
    done = done[:, share * steady.start - 1 : share * steady.stop]
    span = _period(plan, done)
    return float((done[:, -1] - done[:, -1 - span]).max()) * share / span


def _period(plan: Plan, done: npt.NDArray[np.float64]) -> int:
    """Return over how many of the last micro-batches to take the mean; `done` is when stages have had each, from 0 on.

    That is the fewest whole turns of all replicas after which everything happens again, later by the same, throughout
    the second half; where there are none among the few that are looked at, all whole turns; where a turn is longer than
    what is unrolled, all. Without turns all, too: a step's updates belong to it.
    """
    turn, most = math.lcm(*plan.turns), int(done.shape[1]) - 1
    for span in range(turn, most // 2 + 1, turn) if whole_turn(plan) > 1 else ():
        if span > turn * STEADY_TURNS // 2:
            break
        begin = min(most // 2, most - 2 * span)
        later = done[:, begin + span :] - done[:, begin : most + 1 - span]
        if (np.ptp(later, axis=1) <= ROUNDING * later.max()).all():
            return span
    return most - most % (turn if turn <= most else 1)
