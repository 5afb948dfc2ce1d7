"""How long each row of a plan must repeat single layers at least to fit, before it is known which.

When a row has most micro-batches, it has what it always needs and what its layers keep of each. A layer
that is repeated frees at most what it saves of these, and takes its seconds for every micro-batch. So parts of the
layers that free most per second are the least that is repeated: the fractional knapsack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, layer_table
from planner.costs.stage_memory import of_stage, stage_memory
from planner.costs.static_memory import static_bytes
from planner.orders import schedules
from planner.placement.filling import sizes_of
from planner.placement.flight import ARRANGED, fullest
from planner.values.plan import asynchronous

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


class Lack(NamedTuple):
    """What the rows of a pipeline lack at one moment: bytes of each, and of which (stages, rows) micro-batches a
    repeated layer frees what it saves."""

    lacking: Floats
    freeing: Floats


def lacks(placed: Placed) -> tuple[Lack, ...]:
    """Return what the rows of a pipeline lack at least without repeating anything, each at its fullest moments.

    Nothing is said of steps that overlap, stages with different numbers of replicas, and what is swapped: these are
    left to the whole program.
    """
    import numpy as np

    plan, schedule = placed.plan, placed.schedule
    shape = schedules.Shape(plan.depth, plan.microbatches // plan.replicas, plan.chunks, seconds=plan.stage_seconds)
    unknown = plan.uneven or asynchronous(plan) or plan.offload or plan.recomputes or not schedule.trains
    if unknown or shape.stages * shape.microbatches > ARRANGED:
        return ()
    of = [of_stage(placed, stage) for stage in range(len(placed.ranges))]
    room = np.array(placed.capacities[: plan.depth]) - static_bytes(placed, of, plan.depth).sum(axis=1)
    if not schedule.splits:  # the next compute is a backward; of two halves what is live may be let go of before
        passing = [_last_backward(placed, stage) for stage in range(len(of))]
        room = room - [min(passing[stage] for stage in held) for held in plan.stages_of[: plan.depth]]
    each = np.array([own.kept for own in of]) + _received(placed)
    return tuple(Lack(each @ having - room, forgetting) for having, forgetting in fullest(plan.schedule, shape))


def least_repeated(placed: Placed) -> list[float]:
    """Return seconds per micro-batch that each row of a pipeline repeats at least, infinite where no choice fits."""
    import numpy as np

    plan, copies = placed.plan, placed.schedule.copies
    found = [0.0] * plan.depth
    sizes = sizes_of(placed.profile, plan.samples)
    seconds = np.diff(layer_table(placed.profile, plan.samples, plan.threads).recompute[MEDIAN])
    for lacking, freeing in lacks(placed):
        for row in np.flatnonzero(lacking > 0).tolist():
            held = plan.stages_of[row]
            layers = np.concatenate([np.array(placed.ranges[stage]) for stage in held])
            counts = np.repeat(freeing[list(held), row], [len(placed.ranges[stage]) for stage in held])
            freed = counts * (sizes.saved - sizes.output)[layers]
            found[row] = max(found[row], _least(seconds[layers] / copies, freed, float(lacking[row])))
    return found


def _least(seconds: Floats, freed: Floats, lack: float) -> float:
    """Return the least seconds of parts that free so much, infinite if all do not."""
    import numpy as np

    needed = lack * (1 - 1e-9)
    if needed <= 0:
        return 0.0
    useful = freed > 0
    seconds, freed = seconds[useful], freed[useful]
    if freed.sum() < needed:
        return float("inf")
    order = np.argsort(seconds / freed)
    return float(np.interp(needed, np.append(0.0, np.cumsum(freed[order])), np.append(0.0, np.cumsum(seconds[order]))))


def _received(placed: Placed) -> list[float]:
    """Bytes per micro-batch that other devices send to each stage: there until its backward."""
    plan, schedule = placed.plan, placed.schedule
    found = [0.0] * len(plan.stages)
    for edge in plan.edges:
        ends = (schedule.homes(stage, plan.depth) for stage in (edge.producer, edge.consumer))
        if all(one != other for one, other in zip(*ends, strict=True)):
            found[edge.consumer] += placed.edge_bytes(edge, gradients=False)
    return found


def _last_backward(placed: Placed, stage: int) -> float:
    """Bytes that a stage's backward needs on top at least, whatever is repeated: those of its last layer's."""
    profile, samples = placed.profile, placed.plan.samples
    last = placed.ranges[stage][-1]
    only = range(last, last + 1)
    return memoised(profile, ("memory", only, samples, ()), lambda: stage_memory(profile, only, samples)).backward_peak
