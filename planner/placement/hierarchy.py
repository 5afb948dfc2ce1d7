"""PipeDream's partition over a hierarchy of devices, exact over numbers: within a host, then over hosts.

    A(i, j, m)  seconds between two micro-batches of layers i to j - 1 on m devices of a level, as stages with replicas
    T(i, j, m)  the same as one stage: its devices take micro-batches in turn, and agree on gradients once per turn

    A(i, j, m) = min of T(i, j, m) and, over s and r, max(T(i, s, r), C(s), A(s, j, m - r))
    T(i, j, r) = max(B(i, j) / r, W(i, j, r))

B(i, j) is one device's computing on the lowest level, and the best that the level below can do on all its devices
above it; C(s) moves activations and their gradients over a cut, W synchronises gradients, both over the level's links
(Narayanan et al., SOSP 2019, section 3.1; arXiv 1806.03377, section 3.2, there from the last stage instead of the
first). A stage's replicas hold as many micro-batches as keep all devices behind it busy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from planner.placement.partition import Table

Fits = Callable[[int, float], "NDArray[np.bool_]"]
"""From a stage's replicas and the micro-batches that each holds to the runs of layers that fit."""


class Level(NamedTuple):
    """A level's members (devices of a host, or hosts), what a cut costs, and what so many replicas' agreement costs."""

    members: int
    crossing: Sequence[float]
    agreeing: Callable[[int], Table]


class Members(NamedTuple):
    """A stage: its layers, its members of the level, and for a level above the lowest the stages within each member."""

    layers: range
    members: int
    inside: tuple[Members, ...] = ()

    @property
    def stages(self) -> list[tuple[range, int]]:
        """Every stage's layers and replicas, all levels together."""
        if not self.inside:
            return [(self.layers, self.members)]
        return [(layers, self.members * each) for own in self.inside for layers, each in own.stages]


def solve(
    computing: Table, inner: Level, outer: Level | None = None, fits: Fits | None = None
) -> tuple[float, tuple[Members, ...]] | None:
    """Return the seconds between two micro-batches and the stages of the fastest partition; None where nothing fits.

    At most all members are used. Of equal optima the fewest stages, then those with the fewest members first.

    >>> from planner.placement.partition import spans
    >>> level = Level(4, [0.0] * 3, lambda replicas: spans([0.0, 9.0]) * (replicas > 1))
    >>> solve(spans([9.0, 2.0]), level)[1]
    (Members(layers=range(0, 1), members=3, inside=()), Members(layers=range(1, 2), members=1, inside=()))
    """
    layers = len(computing) - 1
    if outer is None:
        best = _Best(lambda members, behind: computing, inner, fits, 0.0, last_only=True)
        return best.answer(0, layers, inner.members)
    below: dict[float, _Best] = {}

    def within(members: int, behind: int) -> _Best:
        """The best within each of so many hosts that take turns, with other hosts behind them."""
        waiting = inner.members * behind / members if fits else 0.0
        if waiting not in below:
            below[waiting] = _Best(lambda own, left: computing, inner, fits and _of(fits, members), waiting)
        return below[waiting]

    hosts = _Best(lambda members, behind: within(members, behind).seconds[inner.members], outer, None, 0.0, True)
    found = hosts.answer(0, layers, outer.members)
    if found is None:
        return None
    seconds, stages = found
    left, filled = outer.members, []
    for stage in stages:
        left -= stage.members
        own = within(stage.members, left).answer(stage.layers.start, stage.layers.stop, inner.members)
        assert own is not None, "it has been chosen"
        filled.append(stage._replace(inside=own[1]))
    return seconds, tuple(filled)


def _of(fits: Fits, hosts: int) -> Fits:
    """What fits if every host's stage has replicas on so many hosts."""
    return lambda replicas, held: fits(replicas * hosts, held)


class _Best:
    """The recurrence on one level. `below(members, behind)` is what one member does; `last_only` solves for j = N only.

    `seconds[m]` are A(i, j, m).
    """

    def __init__(
        self,
        below: Callable[[int, int], Table],
        level: Level,
        fits: Fits | None,
        waiting: float,
        last_only: bool = False,
    ) -> None:
        import numpy as np

        self.level = level
        members = level.members
        counts = [r for r in range(1, members + 1) if members <= 16 or r & (r - 1) == 0 or r == members]
        size = len(level.crossing)
        runs = ~np.tri(size, dtype=bool)
        crossing = np.array(level.crossing, dtype=float)
        self.seconds: list[Table] = [np.where(np.eye(size, dtype=bool), 0.0, np.inf)]
        self.steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = [(np.zeros(0, int), np.zeros(0, int))]
        ends = [size - 1] if last_only else range(1, size)
        agreeing = {r: level.agreeing(r) for r in counts}
        for used in range(1, members + 1):
            best = np.full((size, size), np.inf)
            chosen, stops = np.zeros((size, size), int), np.zeros((size, size), int)
            for r in (r for r in counts if r <= used):
                one = np.maximum(below(r, used - r) / r, agreeing[r])
                allowed = runs if fits is None else runs & fits(r, (used + waiting) / r)
                alone = np.where(allowed, one, np.inf)
                better = alone < best
                best, chosen = np.where(better, alone, best), np.where(better, r, chosen)
                stops = np.where(better, np.arange(size)[None, :], stops)
                if used == r:
                    continue
                first, rest = np.maximum(alone, crossing[None, :]), self.seconds[used - r]
                for j in ends:
                    both = np.maximum(first, rest[:, j][None, :])
                    both[:, j:] = np.inf
                    at = both.argmin(axis=1)
                    value = both[np.arange(size), at]
                    better = value < best[:, j]
                    best[better, j], chosen[better, j], stops[better, j] = value[better], r, at[better]
            fewer = self.seconds[-1] if used > 1 else best
            self.seconds.append(np.minimum(best, fewer))
            self.steps.append((np.where(fewer < best, 0, chosen), stops))  # 0: a member stays idle

    def answer(self, start: int, stop: int, members: int) -> tuple[float, tuple[Members, ...]] | None:
        """Return the stages of a run of layers on at most so many members."""
        if not self.seconds[members][start, stop] < float("inf"):
            return None
        seconds, found = float(self.seconds[members][start, stop]), list[Members]()
        while start < stop:
            chosen, stops = self.steps[members]
            r = int(chosen[start, stop])
            if not r:
                members -= 1
                continue
            end = int(stops[start, stop])
            found.append(Members(range(start, end), r))
            start, members = end, members - r
        return seconds, tuple(found)
