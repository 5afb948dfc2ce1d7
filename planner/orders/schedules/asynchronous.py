"""Schedules that never flush: parameters change while micro-batches are in the pipeline.

They arrange as many micro-batches as they are given; how many of them are one step, and when the optimizer runs, is
the plan's and `planner.programs.lowering`'s matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.orders.codes import Order
from planner.orders.schedules.registry import Shape, schedule
from planner.orders.schedules.straight import in_flight, one_forward_one_backward


@schedule("pipedream", updates="microbatch", versions=in_flight, uneven=True)
def pipedream(shape: Shape) -> Order:
    """1F1B without end, an update after every backward (Narayanan et al., SOSP 2019).

    Weight stashing: a micro-batch's backward uses the parameters of its forward. A replica updates after every own
    backward, so between the two lie as many updates as it has other micro-batches in flight: with the newest it keeps
    as many versions as micro-batches, p - s at stage s of p. Where replicas average a turn's gradients beside the next
    one's computing, every update comes a backward later: its gradient is one update staler, its versions are as many.
    """
    return one_forward_one_backward(shape)


def _seen_by_input(stage: int, replicas: Sequence[int]) -> int:
    """Versions that a stage keeps whose micro-batches use those that the input stage saw.

    Its own are counted in updates, one for each turn of its replicas, behind the next backward where there are several.
    The oldest that a micro-batch needs is that from before all that the input stage has in flight, and before its own
    turn there.
    """
    first, own = replicas[0], replicas[stage]
    late = in_flight(0, replicas) - (first == 1)  # turns of the input stage
    behind = late * first + first - math.gcd(first, own)
    return max(1, -(-behind // own) + (own == 1))


@schedule("pipedream-vertical", updates="microbatch", versions=_seen_by_input, reads="input stage", uneven=True)
def pipedream_vertical(shape: Shape) -> Order:
    """PipeDream with vertical sync: all stages use the version that the input stage saw.

    A micro-batch takes p - s more updates to come back to stage s than to leave stage 0, and s updates to get there,
    so every stage keeps p versions (Harlap et al., arXiv 1806.03377, section 3.3).
    """
    return one_forward_one_backward(shape)


def _short(shape: Shape) -> str | None:
    if shape.microbatches < shape.devices:
        return f"double buffering needs M >= p: {shape.microbatches} micro-batches, {shape.devices} stages"
    return None


@schedule(
    "pipedream-2bw", updates="window", versions=lambda stage, replicas: 2, reads="window before", impossible=_short
)
def pipedream_2bw(shape: Shape) -> Order:
    """PipeDream with gradients accumulated over M micro-batches and two versions (arXiv 2006.09503)."""
    return one_forward_one_backward(shape)
