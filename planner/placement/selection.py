"""Which layers to recompute so that a stage fits: the cheapest ones that free enough bytes. It knows numbers only.

    cheapest(seconds, saved, needed) -> Selection(layers, seconds, freed, bound)

The model is additive: a recomputed layer costs its own seconds and frees its own saved bytes, whatever its neighbours
do. In truth neighbours interact a little. A recomputed layer needs its input kept; where the layer that makes it is
recomputed as well, the two free less than the sum, unless both are repeated in one go, which keeps the first input
only. Who needs the difference prices the chosen set again, and asks for more bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import fsum, inf
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # numpy is imported where it is used: `plan --help` does not wait for it
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]

ROUNDING = 1e-12
"""Relative differences up to this one are those of adding floats in another order."""

ALWAYS_EXACT = 40
"""Among so many layers, free ones not counted, the selection is exact whatever the numbers."""

WIDE = 2**16
"""More partial selections than this are approximated, or joined with every selection of the last `TAIL` layers."""

TAIL = ALWAYS_EXACT // 2
"""So many layers are enumerated: with as many before them, nothing needs to be approximated."""


class Selection(NamedTuple):
    """The layers to recompute, in order, what that costs and frees, and how much cheaper it could be.

    `bound` is a guarantee: `seconds` are at most `1 + bound` times the least possible; 0 for an exact answer.
    """

    layers: tuple[int, ...]
    seconds: float
    freed: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether no selection is cheaper."""
        return self.bound == 0


def cheapest(
    seconds: Sequence[float], saved: Sequence[float], needed: float, *, tolerance: float = 0.01
) -> Selection | None:
    """Choose the layers that free `needed` bytes in the fewest seconds, or return None if all do not free enough.

    `seconds[i]` to repeat layer i and `saved[i]` bytes it then need not keep, both >= 0; a layer whose seconds are
    infinite may not be repeated. The minimum knapsack problem: always exact for up to `ALWAYS_EXACT` layers, and for
    hundreds unless nearly all cost the same per byte, but each another number of bytes (equal layers are counted, not
    enumerated); otherwise within `tolerance`, which is above 0. `bound` says which. Seconds and bytes are compared to
    a part in 10^12.

    Layers are decided in the order of seconds per byte. Kept are the undominated partial selections (Nemhauser and
    Ullmann 1969) whose linear relaxation over the layers left is below the best selection found. When they are many,
    the last layers are enumerated apart and joined (Horowitz and Sahni 1974), or one is kept per interval of seconds
    (Ibarra and Kim 1975): those are at most 2 x layers / tolerance, as the first selection is at most twice the
    optimum (Guentzer and Jungnickel 2000).

    >>> cheapest([3.0, 1.0, 1.0], [30, 10, 20], 30)
    Selection(layers=(1, 2), seconds=2.0, freed=30, bound=0.0)
    >>> cheapest([1.0], [10], 11) is None
    True
    """
    if needed <= 0:
        return Selection((), 0.0, 0, 0.0)
    enough = needed * (1 - ROUNDING)
    usable = [i for i, second in enumerate(seconds) if second < inf]
    if fsum(saved[i] for i in usable) < enough:
        return None
    chosen = [i for i in usable if seconds[i] <= 0]
    short = enough - fsum(saved[i] for i in chosen)
    bound = 0.0
    if short > 0:
        freeing = {i: min(saved[i], short) for i in usable if seconds[i] > 0 and saved[i] > 0}
        order = sorted(freeing, key=lambda i: (seconds[i] / freeing[i], freeing[i], i))
        found, bound = _search([seconds[i] for i in order], [freeing[i] for i in order], short, tolerance)
        chosen += [order[i] for i in found]
    layers = set(chosen)
    for i in sorted(chosen, key=lambda i: (-seconds[i], saved[i])):  # none that is not needed, free ones among them
        if fsum(saved[j] for j in layers - {i}) >= enough:
            layers.remove(i)
    return Selection(
        layers=tuple(sorted(layers)),
        seconds=fsum(seconds[i] for i in layers),
        freed=sum(saved[i] for i in layers),
        bound=bound,
    )


def _search(
    seconds: Sequence[float], saved: Sequence[float], needed: float, tolerance: float
) -> tuple[Sequence[int], float]:
    """Select among layers in order of seconds per byte, none of them zero; all of them are enough. See `cheapest`."""
    import numpy as np

    layers = len(seconds)
    seconds_to = np.array([0.0, *accumulate(seconds)])
    saved_to = np.array([0.0, *accumulate(saved)])
    chosen: Sequence[int] = _twice(seconds, saved, needed)
    best = fsum(seconds[i] for i in chosen)
    least = max(best / 2, float(np.interp(needed, saved_to, seconds_to)))
    width = tolerance * least / layers
    lost = 0.0
    cost, freed = np.zeros(1), np.zeros(1)
    steps: list[Indices] = []  # of every partial selection, the one it came from, inverted where the layer was taken

    def selected(index: int) -> list[int]:
        taken = []
        for layer in reversed(range(len(steps))):
            index = int(steps[layer][index])
            if index < 0:
                taken.append(layer)
                index = ~index
        return taken

    for layer in range(layers):
        target = saved_to[layer] + needed - freed
        whole = np.searchsorted(saved_to, target)  # the layers from here to there fill the need
        feasible = whole <= layers
        filled = np.where(feasible, cost + seconds_to[np.minimum(whole, layers)] - seconds_to[layer], np.inf)
        first = int(filled.argmin())
        if filled[first] < best:
            best = float(filled[first])
            chosen = [*selected(first), *range(layer, int(whole[first]))]
        relaxed = cost + np.interp(target, saved_to, seconds_to) - seconds_to[layer]
        alive = np.flatnonzero(feasible & (relaxed < best * (1 - ROUNDING)))
        if len(alive) > WIDE and layers - layer > TAIL and layers > ALWAYS_EXACT:
            interval = np.floor(cost[alive] / width)
            alive = alive[np.append(interval[1:] > interval[:-1], True)]  # the last of an interval frees most
            lost += width
        cost, freed = cost[alive], freed[alive]
        if not len(alive):
            break
        if len(alive) > WIDE and layers - layer <= TAIL:
            tail_cost, tail_freed, members = _all(seconds[layer:], saved[layer:])
            behind = np.searchsorted(tail_freed, needed - freed)
            total = cost + np.append(tail_cost, np.inf)[behind]
            first = int(total.argmin())
            if total[first] < best:
                best = float(total[first])
                taken = int(members[behind[first]])
                tail = [layer + i for i in range(layers - layer) if taken >> i & 1]
                chosen = [*selected(int(alive[first])), *tail]
            break
        both_cost, both_freed = np.append(cost, cost + seconds[layer]), np.append(freed, freed + saved[layer])
        kept = _undominated(both_cost, both_freed)
        kept = kept[both_freed[kept] < needed]  # the others have been seen as `filled`
        cost, freed = both_cost[kept], both_freed[kept]
        steps.append(np.append(alive, ~alive)[kept])
    if best <= least * (1 + ROUNDING):
        return chosen, 0.0
    return chosen, best / max(least, best - lost) - 1 if lost else 0.0


def _twice(seconds: Sequence[float], saved: Sequence[float], needed: float) -> list[int]:
    """Select greedily, at most twice the optimum: a layer that fills the need is tried, then passed over."""
    best, chosen = inf, list[int]()
    small: list[int] = []
    cost = freed = 0.0
    for i, (second, byte) in enumerate(zip(seconds, saved, strict=True)):
        if freed + byte < needed:
            small.append(i)
            cost, freed = cost + second, freed + byte
        elif cost + second < best:
            best, chosen = cost + second, [*small, i]
    return chosen


def _all(seconds: Sequence[float], saved: Sequence[float]) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Every undominated selection: seconds and bytes, both rising, and its members, a bit each."""
    import numpy as np

    cost, freed, members = np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64)
    for i, (second, byte) in enumerate(zip(seconds, saved, strict=True)):
        cost, freed = np.append(cost, cost + second), np.append(freed, freed + byte)
        members = np.append(members, members | 1 << i)
        kept = _undominated(cost, freed)
        cost, freed, members = cost[kept], freed[kept], members[kept]
    return cost, freed, members


def _undominated(cost: Floats, freed: Floats) -> Indices:
    """Return, by rising cost, the indices of what frees more than everything that costs no more."""
    import numpy as np

    order = np.argsort(cost, kind="stable")
    most = np.maximum.accumulate(freed[order])
    order = order[np.append(True, freed[order][1:] > most[:-1])]
    last: Indices = order[np.append(cost[order][1:] > cost[order][:-1], True)]
    return last
