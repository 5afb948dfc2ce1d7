from __future__ import annotations

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from planner import partition


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_balanced_is_exact(weights: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(weights)))
    n = len(weights)

    def heaviest(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, n)
        return max(sum(weights[a:b]) for a, b in pairwise(edges))

    best = min(heaviest(cuts) for cuts in combinations(range(1, n), stages - 1))
    found = partition.balanced([float(w) for w in weights], stages)
    assert [i for r in found for i in r] == list(range(n))
    assert all(found)
    assert max(sum(weights[i] for i in r) for r in found) == best


@given(st.integers(1, 50), st.data())
def test_equal_differs_by_at_most_one(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    found = partition.equal(layers, stages)
    assert [i for r in found for i in r] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1
