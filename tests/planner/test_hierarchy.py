"""PipeDream's partition against its own recurrence, written down again, and against every plan there is."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.placement.hierarchy import Level, solve
from planner.placement.partition import spans

weights = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def level(members: int, crossing: list[int], gradients: list[int], bandwidth: float) -> Level:
    moved = [0.0, *(2 * size / bandwidth for size in crossing[1:]), 0.0]
    table = spans([float(g) for g in gradients])
    return Level(members, moved, lambda r: 2 * (r - 1) / r * table / bandwidth / r)


@given(weights, st.integers(1, 5), st.data())
def test_one_level_against_every_plan(compute: list[int], devices: int, data: st.DataObject) -> None:
    layers = len(compute)
    numbers = st.lists(st.integers(0, 20), min_size=layers, max_size=layers)
    own = level(devices, data.draw(numbers), data.draw(numbers), 2.0)
    table = spans([float(c) for c in compute])
    room = data.draw(st.integers(1, 40))

    def fits(replicas: int, held: float) -> np.ndarray:  # type: ignore[type-arg]
        return table * np.ceil(held) <= room

    def price(ranges: list[range], replicas: tuple[int, ...]) -> float:
        worst = 0.0
        for s, (own_layers, r) in enumerate(zip(ranges, replicas, strict=True)):
            run = own_layers.start, own_layers.stop
            if not fits(r, sum(replicas[s:]) / r)[run]:
                return float("inf")
            worst = max(worst, table[run] / r, float(own.agreeing(r)[run]))
            if s:
                worst = max(worst, own.crossing[own_layers.start])
        return worst

    best = min(
        price([range(a, b) for a, b in pairwise((0, *inner, layers))], replicas)
        for count in range(1, layers + 1)
        for inner in combinations(range(1, layers), count - 1)
        for replicas in product(range(1, devices + 1), repeat=count)
        if sum(replicas) <= devices
    )
    found = solve(table, own, fits=fits)
    if found is None:
        assert best == float("inf")
        return
    seconds, stages = found
    assert seconds == best
    assert price([one.layers for one in stages], tuple(one.members for one in stages)) == best


@given(weights, st.integers(1, 3), st.integers(2, 3), st.data())
def test_two_levels_as_the_paper_states_them(compute: list[int], devices: int, hosts: int, data: st.DataObject) -> None:
    """The recurrences of SOSP 2019, section 3.1, from the last stage: A^k(i, j, m) and T^k(i, j, m)."""
    layers = len(compute)
    numbers = st.lists(st.integers(0, 20), min_size=layers, max_size=layers)
    sizes, gradients = data.draw(numbers), data.draw(numbers)
    levels = [level(devices, sizes, gradients, 4.0), level(hosts, sizes, gradients, 1.0)]
    table = spans([float(c) for c in compute])

    @lru_cache(None)
    def stage(k: int, i: int, j: int, m: int) -> float:
        below = table[i, j] if k == 0 else best(k - 1, i, j, levels[k - 1].members)
        return max(below / m, float(levels[k].agreeing(m)[i, j]))

    @lru_cache(None)
    def best(k: int, i: int, j: int, m: int) -> float:
        split = (
            max(best(k, i, s, m - r), levels[k].crossing[s], stage(k, s, j, r))
            for s in range(i + 1, j)
            for r in range(1, m)
        )
        fewer = best(k, i, j, m - 1) if m > 1 else float("inf")
        return min([stage(k, i, j, m), fewer, *split])

    found = solve(table, *levels)
    assert found is not None
    assert found[0] == best(1, 0, layers, hosts)
    stages = [one for own in found[1] for one in own.stages]
    assert [i for own, _ in stages for i in own] == list(range(layers))
    assert sum(replicas for _, replicas in stages) <= devices * hosts
