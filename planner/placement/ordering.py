"""In which order unequal devices make a pipeline: exact, over numbers, where they are of few kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from planner.placement.partition import Table

STATES = 4096
"""So many ways to have used up some devices of each kind are looked at; beyond, devices stay in their order."""


def ordered(
    seconds: Sequence[Table], counts: Sequence[int], filled: Callable[[int, int], Table] | None = None
) -> tuple[int, ...] | None:
    """Return the kind of device of every stage, so that the slowest stage is as fast as any order and cut allow.

    `seconds[kind]` and `filled(stage, kind)` are tables as in `planner.placement.partition.cut`; all `counts[kind]`
    devices are used, one stage each. None where nothing fits, or where there are more than `STATES` states. Of equal
    optima the last stage has the first kind that it can, then the one before it, and so on.

    Dynamic programming over (devices used of each kind, layers): the stage's number is the sum of the devices used.

    >>> from planner.placement.partition import spans
    >>> table = spans([4, 1, 1, 1, 1])
    >>> ordered([table, table / 2], [1, 1])   # the second kind is twice as fast
    (1, 0)
    """
    import numpy as np

    if prod(count + 1 for count in counts) > STATES:
        return None
    layers = len(seconds[0]) - 1
    runs = ~np.tri(layers + 1, dtype=bool)
    start = tuple(0 for _ in counts)
    best: dict[tuple[int, ...], Table] = {start: np.where(np.arange(layers + 1) > 0, np.inf, 0.0)}
    steps: dict[tuple[int, ...], tuple[NDArray[np.intp], NDArray[np.intp]]] = {}
    for used in product(*(range(count + 1) for count in counts)):
        if used == start:
            continue
        stage = sum(used) - 1
        found, kinds, starts = np.full(layers + 1, np.inf), np.zeros(layers + 1, int), np.zeros(layers + 1, int)
        for kind, count in enumerate(used):
            if not count:
                continue
            allowed = runs if filled is None else runs & (filled(stage, kind) <= 1)
            own = np.where(allowed, seconds[kind], np.inf)
            slowest = np.maximum(best[_without(used, kind)][:, None], own)
            first = slowest.argmin(axis=0)
            value = slowest[first, np.arange(layers + 1)]
            better = value < found
            found, kinds, starts = (
                np.where(better, value, found),
                np.where(better, kind, kinds),
                np.where(better, first, starts),
            )
        best[used], steps[used] = found, (kinds, starts)
    used = tuple(counts)
    if not best[used][layers] < np.inf:
        return None
    order: list[int] = []
    stop = layers
    while used != start:
        kinds, starts = steps[used]
        order.append(int(kinds[stop]))
        used, stop = _without(used, order[-1]), int(starts[stop])
    return tuple(reversed(order))


def _without(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] - 1, *used[kind + 1 :])
