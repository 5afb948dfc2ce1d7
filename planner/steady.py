"""How fast a plan without flush is, once its pipeline is full."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner import codes
from planner.codes import BACKWARD, BACKWARD_WEIGHT, FORWARD
from planner.linking import Linked
from planner.lowering import steady_windows, windows
from planner.plan import Plan


def steady_step(plan: Plan, linked: Linked, end: npt.NDArray[np.float64]) -> float:
    """Return the seconds between two steps in the middle of an unrolled asynchronous program.

    A step of M micro-batches is over when the first stage has had all of their backwards. The first steps fill the
    pipeline and the last drain it; between them lie `steady_windows(plan)`, over which the mean is taken.
    """
    count = windows(plan)
    steady = steady_windows(plan)
    edge = (count - steady) // 2
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    backward = codes.has(linked.flat, BACKWARD, BACKWARD_WEIGHT)
    last = backward if backward.any() else codes.has(linked.flat, FORWARD)
    first = np.flatnonzero(last & (codes.stages(linked.flat) == 0))
    window = codes.microbatches(linked.flat[first]) % (share * count) // share
    done = np.zeros(count)
    np.maximum.at(done, window, end[first])
    return float(done[count - 1 - edge] - done[edge - 1]) / steady
