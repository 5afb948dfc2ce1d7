"""What it costs that processes of a rank make its batches while it computes: no more than a step, or they bound it."""

from __future__ import annotations

import numpy as np

from planner.costs.placed import Placed
from planner.costs.stage_costs import QUANTILES, Spread, at
from planner.orders import codes
from planner.orders.operations import LOAD
from planner.programs.waits import Linked
from planner.values.plan import asynchronous


def least_step(placed: Placed) -> Spread:
    """Return the seconds, at every quantile, in which the workers of a rank make one step's share: no step is shorter.

    Each of several workers makes a share of its own, so that one comes in every so manieth part of the time.
    """
    loading, table = placed.profile.loading, placed.plan.edges.table
    if loading is None or not loading.workers or asynchronous(placed.plan):
        return np.zeros(len(QUANTILES))
    stages = np.flatnonzero((np.diff(table.leaves) == 0) | (np.diff(table.reaches) == 0)).tolist()
    each = [[at(loading.making, placed.plan.loaded(s), q) for q in QUANTILES] for s in stages]
    found: Spread = np.max(np.array(each), axis=0) / loading.workers
    return found


def making(placed: Placed, linked: Linked) -> dict[int, float]:
    """Return for every LOAD of a program, by its place, for how long its rank's workers then keep a core busy."""
    loading = placed.profile.loading
    if loading is None or not loading.workers:
        return {}
    places = np.flatnonzero(codes.has(linked.flat, LOAD))
    stages = codes.stages(linked.flat[places]).tolist()
    return {
        place: loading.busy * at(loading.making, placed.plan.loaded(stage), "median")
        for place, stage in zip(places.tolist(), stages, strict=True)
    }


def waiting(linked: Linked) -> list[int]:
    """Return the places of the LOADs that wait for workers which do not keep up: those of inputs.

    The last stage's workers have as much time for its targets, and it asks for them later: while inputs are waited for,
    its own next batch is made, so its waiting is that for the first micro-batch.
    """
    places = np.flatnonzero(codes.has(linked.flat, LOAD))
    inputs = np.diff(linked.edges.table.reaches) == 0
    found: list[int] = places[inputs[codes.stages(linked.flat[places])]].tolist()
    return found
