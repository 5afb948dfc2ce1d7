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
from planner.orders.operations import BACKWARD, BACKWARD_WEIGHT, FORWARD, OFFLOAD
from planner.placement import savings
from planner.placement.filling import LayersBytes, layers_bytes, sizes_of
from planner.placement.flight import ARRANGED, KEPT
from planner.programs.savings import offload
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
    if schedules.why_not(schedule, shape) is not None or shape.stages > len(profile.layers):
        return nothing
    if shape.stages * shape.microbatches > ARRANGED:
        return nothing
    holders = point.replica_count * schedule.copies
    of = layers_bytes(profile.counted_once())
    static = held(of, point.agreed, holders, on_host=savings.states_on_host(point.savings))
    sizes = sizes_of(profile, samples)
    kept = sizes.saved - sizes.output if savings.keeps(point.savings) else np.zeros(len(static))
    here, many = homes(schedule.name, shape)
    every = here * static.sum() + many * kept.sum()
    weights = here.sum(axis=0) / np.maximum(here.sum(axis=0), every.sum(axis=0))
    whole = (np.outer(here @ weights, static) + np.outer(many @ weights, kept)).min(axis=0)
    bare = (here @ weights).min() * static
    scale = weights.sum() * room
    return Need(float(whole.sum()) / scale, (whole - bare) / scale)


def held(of: LayersBytes, agreed: str, holders: int, *, on_host: bool) -> Floats:
    """Return each layer's bytes that one of its holders always has, at the least."""
    way = synchronisation.get(agreed)
    static: Floats = of.parameters / (holders if "parameters" in way.shards else 1)
    if holders > 1 and not way.server:
        static = static + of.gradients / (holders if "gradients" in way.shards else 1)
    if not way.server and not on_host:
        static = static + of.optimizer / (holders if "optimizer" in way.shards else 1)
    return static


class Homes(NamedTuple):
    """How stages are on rows, as arrays (stages, rows): which, and each one's micro-batches when its row has most."""

    here: Floats
    many: Floats


@functools.lru_cache(maxsize=KEPT)
def homes(schedule: str, shape: schedules.Shape) -> Homes:
    """Return where a schedule has its stages, and how full each row is of them at its fullest moment."""
    here, many = np.zeros((shape.stages, shape.devices)), np.zeros((shape.stages, shape.devices))
    for number, row in enumerate(schedules.arrange(schedule, shape)):
        change = codes.has(row, FORWARD).astype(int) - codes.has(row, BACKWARD, BACKWARD_WEIGHT)
        until = int(np.cumsum(change).argmax()) + 1
        stages = codes.stages(row)
        here[np.unique(stages), number] = 1.0
        many[:, number] = np.bincount(stages[:until], change[:until], minlength=shape.stages)
    return Homes(here, many)


@functools.lru_cache(maxsize=KEPT)
def swapped(schedule: str, shape: schedules.Shape) -> Floats:
    """Return how many micro-batches each row copies to its host and back of each stage, where all are offloaded."""
    found = np.zeros((shape.stages, shape.devices))
    for number, row in enumerate(schedules.arrange(schedule, shape)):
        away = offload(row)
        found[:, number] = np.bincount(codes.stages(away[codes.has(away, OFFLOAD)]), minlength=shape.stages)
    return found
