"""How fast a plan without flush is, once its pipeline is full."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from planner.orders import codes
from planner.orders.operations import BACKWARD, BACKWARD_WEIGHT, FORWARD
from planner.programs.waits import Linked
from planner.values.plan import Plan, steady_windows, windows


def steady_step(plan: Plan, linked: Linked, end: npt.NDArray[np.float64]) -> float:
    """Return the seconds between two steps in the middle of an unrolled asynchronous program.

    A stage's step is over when it has had all backwards of M micro-batches. The first steps fill the pipeline and the
    last drain it; between them lie `steady_windows(plan)`, over which the mean is taken: that of the slowest stage, as
    one that has waited may catch up for a while. Where replicas take turns, it is that of as many whole turns as these
    steps have: how long a part of a turn takes depends on which.
    """
    count, steady = windows(plan), steady_windows(plan)
    edge = (count - steady) // 2
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    backward = codes.has(linked.flat, BACKWARD, BACKWARD_WEIGHT)
    last = backward if backward.any() else codes.has(linked.flat, FORWARD)
    every = np.flatnonzero(last)
    own = codes.microbatches(linked.flat[every]) % (share * count)
    done = np.zeros((linked.stages, share * count))
    np.maximum.at(done, (codes.stages(linked.flat[every]), own), end[every])
    np.maximum.accumulate(done, axis=1, out=done)
    stop, span = share * (count - edge), share * steady
    turn = math.lcm(*plan.turns)
    span -= span % (turn if turn <= span else 1)
    return float((done[:, stop - 1] - done[:, stop - 1 - span]).max()) * share / span
