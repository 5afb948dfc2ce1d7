"""What of a model a point's plans must have in memory at the least, however they are cut: no plan is made for it.

At the moment at which a row has most micro-batches, it has what its layers always need, and what they keep of each. If
the rows' needs are weighted and added up, every layer counts at least with its least weighted need on any stage, so the
fullest row has at least that sum over the sum of the weights. The weights are those with which the bound is exact for a
model of equal layers that can be cut anywhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.orders import codes, schedules, synchronisation
from planner.orders.operations import BACKWARD, BACKWARD_WEIGHT, FORWARD
from planner.placement import savings
from planner.placement.filling import layers_bytes, sizes_of
from planner.search.space import Candidate
from planner.values.profile import Profile

Floats = npt.NDArray[np.float64]


class Need(NamedTuple):
    """The share of the roomiest device that the fullest row fills at least, and what recomputing a layer lowers it by.

    `freed` is at most what each layer's recompute takes off the share.
    """

    lack: float
    freed: Floats


def need(point: Candidate, profile: Profile, samples: int, room: float) -> Need:
    """Return what plans at a point need of `room` bytes per device; `profile` is what each device sees of the model."""
    nothing = Need(0.0, np.zeros(len(profile.layers)))
    (schedule, chunks), agreed = point.arranged, synchronisation.get(point.agreed)
    if point.how.devices == "chosen" or schedule.asynchronous or not schedule.trains or agreed.asynchronous:
        return nothing
    shape = schedules.Shape(point.depth, point.m // point.replica_count, chunks)
    # Where two copies run against each other, a stage is on two rows.
    if schedule.copies > 1 or schedules.why_not(schedule, shape) is not None or shape.stages > len(profile.layers):
        return nothing
    holders, served = point.replica_count, bool(agreed.server)
    of = layers_bytes(profile)
    static = of.parameters / (holders if "parameters" in agreed.shards else 1)
    if holders > 1 and not served:
        static = static + of.gradients / (holders if "gradients" in agreed.shards else 1)
    if not served and not savings.states_on_host(point.savings):
        static = static + of.optimizer / (holders if "optimizer" in agreed.shards else 1)
    sizes = sizes_of(profile, samples)
    keeps = not {"offload", "recompute", "recompute-blocks"} & set(point.savings)
    kept = sizes.saved - sizes.output if keeps else np.zeros(len(static))
    row, many = most(schedule.name, shape)
    every = static.sum() + many * kept.sum()
    weights = 1 / np.array([max(1.0, every[row == r].mean()) for r in range(point.depth)])
    own = weights[row]
    whole = (own[:, None] * (static + many[:, None] * kept)).min(axis=0)
    bare = own.min() * static
    scale = weights.sum() * room
    return Need(float(whole.sum()) / scale, (whole - bare) / scale)


@functools.lru_cache(maxsize=4096)
def most(schedule: str, shape: schedules.Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return every stage's row, and its micro-batches at the moment at which that row has most of all its stages."""
    rows, many = np.zeros(shape.stages, np.int64), np.zeros(shape.stages, np.int64)
    order = schedules.arrange(schedule, shape)
    for number, row in enumerate(order):
        change = codes.has(row, FORWARD).astype(int) - codes.has(row, BACKWARD, BACKWARD_WEIGHT)
        until = int(np.cumsum(change).argmax()) + 1
        for stage in np.unique(codes.stages(row)).tolist():
            rows[stage] = number
            many[stage] = int(change[:until][codes.stages(row)[:until] == stage].sum())
    return rows, many
