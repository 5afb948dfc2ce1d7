"""Where to cut the layers into stages: exact, over numbers.

It knows weights only: seconds, bytes, or anything else. A stage of layers `start` to `stop - 1` is the entry
`[start, stop]` of a table with one row and one column more than there are layers; entries with `stop <= start` are not
looked at. Nothing is assumed about a table: a longer stage may take less time, because another value crosses its cut.

    table = spans([3.0, 1.0, 2.0], entering=[0.0, 5.0, 1.0, 0.0])   seconds of every run of layers
    cut(table, 2)                                                   the fastest two of them that make up the model
    cut(lambda stage: table / speed[stage], 2)                      the same on unequal devices, placed in their order
    cut(table, 2, filled)                                           the same where memory suffices
    lightest(filled, 2)                                             the nearest to fitting, when that found none

Layers may be recomputed to fit, too: `planner.placement.selection`. Over how many devices to spread each stage is
`planner.placement.hierarchy`'s question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # numpy is imported where it is used: `plan --help` does not wait for it
    import numpy as np
    from numpy.typing import NDArray

    Table: TypeAlias = NDArray[np.float64]
    Tables: TypeAlias = Table | Callable[[int], Table]
    """One table for every stage (two dimensions), one per stage (three), or a function of the stage's index."""


def equal(layers: int, stages: int) -> tuple[range, ...]:
    """Cut so that the numbers of layers differ by at most one.

    >>> equal(5, 2)
    (range(0, 2), range(2, 5))
    """
    cuts = [i * layers // stages for i in range(stages + 1)]
    return tuple(range(a, b) for a, b in pairwise(cuts))


def balanced(weights: Sequence[float], stages: int) -> tuple[range, ...]:
    """Cut so that the heaviest stage is as light as any contiguous cut allows, exactly.

    `cut` for equal devices and cuts that cost nothing. Raises `ValueError` for more stages than layers.

    >>> balanced([1, 1, 1, 5, 1], 2)
    (range(0, 3), range(3, 5))
    """
    found = cut(spans(weights), stages)
    if found is None:
        raise ValueError(f"{len(weights)} layers cannot make {stages} stages: each needs a layer")
    return found


def spans(
    weights: Sequence[float] | Table,
    entering: Sequence[float] | Table | None = None,
    leaving: Sequence[float] | Table | None = None,
) -> Table:
    """Tabulate the weight of every run of layers: its layers', and those of the cuts before and behind it.

    `entering` and `leaving` have one number per cut position, the two ends of the model included: what a stage pays
    that begins, or ends, there. A value that jumps over the cut crosses it as well and is to be counted in.

    >>> spans([3, 1], entering=[0, 5, 0])[1, 2]
    np.float64(6.0)
    """
    import numpy as np

    before = np.zeros(len(weights) + 1)
    np.cumsum(np.asarray(weights, dtype=float), out=before[1:])
    table: Table = before[None, :] - before[:, None]
    if entering is not None:
        table += np.asarray(entering, dtype=float)[:, None]
    if leaving is not None:
        table += np.asarray(leaving, dtype=float)[None, :]
    return table


def cut(
    seconds: Tables, stages: int, filled: Tables | None = None, even: Tables | None = None
) -> tuple[range, ...] | None:
    """Cut so that the slowest stage is as fast as any contiguous cut allows, exactly, or return None if none fits.

    `seconds` of a stage include its transfers, and may be infinite: not here. `filled` is the share of its device's
    memory that a stage takes (it fits up to 1, that included). Both may differ from stage to stage: devices are
    unequal, and under 1F1B stage s of p holds p - s micro-batches. Every stage gets at least one layer.

    Of cuts with the same slowest stage it is the most even one: that with the least sum of squares of `even`, by
    default of the seconds themselves. Where every stage waits for its links as long, the computing is what to even out.
    Of those that are as even, the one whose last stage begins first.

    Dynamic programming over (stages, layers), twice, O(stages x layers^2): the best cut of the first layers into s
    stages is the best of them into s - 1, and one more stage; first for the slowest stage, then, among the stages that
    are no slower, for the sum of squares.

    >>> cut(spans([1, 1, 1, 1], entering=[0, 9, 1, 9, 0]), 2)
    (range(0, 2), range(2, 4))
    >>> cut(lambda stage: spans([1, 1, 1, 1]) / (1, 3)[stage], 2)
    (range(0, 1), range(1, 4))
    >>> cut(spans([1, 1, 1, 1, 1, 9]), 3)  # not 1, 4 and 1 layers: the second best stage counts as well
    (range(0, 2), range(2, 5), range(5, 6))
    """
    import numpy as np
    from numpy.typing import NDArray

    layers = len(_at(seconds, 0)) - 1
    width = layers - stages + 1  # every other stage has a layer: stage s begins at s or up to so many cuts later
    if width < 1:
        return None
    backwards = np.tri(width, k=-1, dtype=bool)

    def part(table: Table, stage: int) -> Table:
        """What a stage may hold: rows are where it begins, columns where it ends."""
        return table[stage : stage + width, stage + 1 : stage + 1 + width]

    def held(stage: int) -> Table:
        """Seconds of what a stage may hold, infinite where it may not."""
        own = part(_at(seconds, stage), stage)
        never = backwards if filled is None else backwards | ~(part(_at(filled, stage), stage) <= 1)
        return np.where(never, np.inf, own)

    slowest = np.where(np.arange(width) > 0, np.inf, 0.0)
    squares, starts = slowest.copy(), list[NDArray[np.intp]]()
    tables = [held(stage) for stage in range(stages)]
    for table in tables:
        slowest = np.maximum(slowest[:, None], table).min(axis=0)
    limit = float(slowest[-1])
    if not limit < np.inf:
        return None
    for stage, own in enumerate(tables):
        value = own if even is None else part(_at(even, stage), stage)
        sums = squares[:, None] + np.square(np.where((own <= limit) & (own < np.inf), value, np.inf))
        start = sums.argmin(axis=0)
        starts.append(start)
        squares = np.take_along_axis(sums, start[None, :], axis=0)[0]
    edges = [layers]
    for stage in reversed(range(stages)):
        edges.append(stage + int(starts[stage][edges[-1] - stage - 1]))
    return tuple(range(a, b) for a, b in pairwise(reversed(edges)))


def lightest(filled: Tables, stages: int) -> tuple[range, ...] | None:
    """Cut so that the fullest device is as empty as any contiguous cut allows: the nearest to fitting.

    `filled` as in `cut`; how far from fitting it is, is the largest share of its stages. None if there are more
    stages than layers.

    >>> lightest(spans([40, 40, 40]) / 60, 2)
    (range(0, 1), range(1, 3))
    """
    return cut(filled, stages)


def evened(ranges: tuple[range, ...], homes: Sequence[int], seconds: Tables, filled: Tables) -> tuple[range, ...]:
    """Shift boundaries while the busiest device gets less to do, where devices hold several stages each.

    `homes` is every stage's device. Stages as equal as `cut` makes them need not add up to equal devices. Of all shifts
    of one boundary by one layer the best is taken, as long as there is one that lowers the largest sum, or as many such
    sums, without filling a device beyond 1; so this ends in a local optimum.

    >>> import numpy as np
    >>> table = spans([1, 1, 1, 5, 1, 1, 1, 1])
    >>> before = cut(table, 4)
    >>> evened(before, [0, 1, 1, 0], table, table * 0)
    (range(0, 3), range(3, 4), range(4, 5), range(5, 8))
    """
    stops = [r.stop for r in ranges]
    times, shares = ([_at(tables, stage) for stage in range(len(ranges))] for tables in (seconds, filled))

    def time(stage: int) -> float:
        return float(times[stage][stops[stage - 1] if stage else 0, stops[stage]])

    load = [0.0] * (max(homes) + 1)
    for stage, home in enumerate(homes):
        load[home] += time(stage)
    while True:
        worst = max(load)
        best: tuple[float, int, int] | None = None
        for left in range(len(stops) - 1):
            pair = {homes[left], homes[left + 1]}
            if len(pair) == 1 or max(load[d] for d in pair) < worst:
                continue
            before = [time(left), time(left + 1)]
            for step in (-1, 1):
                at = stops[left] + step
                if not (stops[left - 1] if left else 0) < at < stops[left + 1]:
                    continue
                stops[left] = at
                after = [time(left), time(left + 1)]
                fits = all(shares[s][stops[s - 1] if s else 0, stops[s]] <= 1 for s in (left, left + 1))
                stops[left] = at - step
                loads = {homes[left + i]: load[homes[left + i]] + after[i] - before[i] for i in range(2)}
                most = max(loads.values())
                if fits and most < worst * (1 - 1e-12) and (best is None or most < best[0]):
                    best = (most, left, step)
        if best is None:
            starts = [0, *stops[:-1]]
            return tuple(range(a, b) for a, b in zip(starts, stops, strict=True))
        _, left, step = best
        for stage in (left, left + 1):
            load[homes[stage]] -= time(stage)
        stops[left] += step
        for stage in (left, left + 1):
            load[homes[stage]] += time(stage)


def _at(tables: Tables, stage: int) -> Table:
    if callable(tables):
        return tables(stage)
    return tables if tables.ndim == 2 else tables[stage]
