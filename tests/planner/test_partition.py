"""Where to cut, against every cut there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from planner.placement import partition

Table = NDArray[np.float64]


def cuts(layers: int, stages: int) -> Iterator[tuple[range, ...]]:
    for inner in combinations(range(1, layers), stages - 1):
        yield tuple(range(a, b) for a, b in pairwise((0, *inner, layers)))


def slowest(tables: Callable[[int], Table], ranges: tuple[range, ...]) -> float:
    return max(float(tables(s)[r.start, r.stop]) for s, r in enumerate(ranges))


def tables(layers: int, count: int, high: int = 12) -> st.SearchStrategy[Table]:
    """Tables of small integers that nothing is monotone in, as many as asked for; some runs are impossible."""
    size = count * (layers + 1) ** 2
    entry = st.one_of(st.integers(0, high), st.just(float("inf")))
    return st.lists(entry, min_size=size, max_size=size).map(
        lambda numbers: np.array(numbers, dtype=float).reshape(count, layers + 1, layers + 1)
    )


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_balanced_is_exact(weights: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(weights)))
    found = partition.balanced([float(w) for w in weights], stages)
    assert [i for r in found for i in r] == list(range(len(weights)))
    assert all(found)
    best = min(max(sum(weights[i] for i in r) for r in ranges) for ranges in cuts(len(weights), stages))
    assert max(sum(weights[i] for i in r) for r in found) == best


@given(st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_of_equal_bottlenecks_the_most_even_cut(layers: int, limited: bool, other: bool, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    seconds = data.draw(tables(layers, stages, 4))
    filled = data.draw(tables(layers, stages, 2)) if limited else 0 * np.nan_to_num(seconds, posinf=0)
    even = np.nan_to_num(data.draw(tables(layers, stages, 5)), posinf=9) if other else seconds

    def price(ranges: tuple[range, ...]) -> tuple[float, float]:
        squares = sum(float(even[s][r.start, r.stop]) ** 2 for s, r in enumerate(ranges))
        return slowest(lambda s: seconds[s], ranges), squares

    fitting = [price(c) for c in cuts(layers, stages) if slowest(lambda s: filled[s], c) <= 1]
    best = min(fitting, default=(float("inf"), 0.0))
    found = partition.cut(seconds, stages, filled, even)
    assert (found is None) == (best[0] == float("inf"))
    assert found is None or price(found) == best


def test_even_stages_behind_slow_links() -> None:
    """15 layers into 4 stages, every link slower than any stage: each cut has that bottleneck, and all but one lose."""
    computing = partition.spans([1.0] * 15)
    found = partition.cut(np.maximum(computing, 20.0), 4, even=computing)
    assert found is not None
    assert sorted(map(len, found)) == [3, 4, 4, 4]


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="2 layers cannot make 3 stages"):
        partition.balanced([1.0, 1.0], 3)
    assert partition.cut(partition.spans([1.0, 1.0]), 3) is None
    assert partition.lightest(partition.spans([1.0, 1.0]), 3) is None


@given(st.integers(1, 50), st.data())
def test_equal_differs_by_at_most_one(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    found = partition.equal(layers, stages)
    assert [i for r in found for i in r] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.data())
def test_spans_add_up_layers_and_both_cuts(weights: list[int], data: st.DataObject) -> None:
    positions = st.lists(st.integers(0, 9), min_size=len(weights) + 1, max_size=len(weights) + 1)
    entering, leaving = data.draw(positions), data.draw(positions)
    table = partition.spans(weights, entering, leaving)
    for start, stop in combinations(range(len(weights) + 1), 2):
        assert table[start, stop] == entering[start] + sum(weights[start:stop]) + leaving[stop]


@given(st.integers(1, 6), st.data())
def test_cut_is_exact_for_unequal_devices_under_their_memory(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    seconds = data.draw(tables(layers, stages))
    filled = data.draw(tables(layers, stages)) / data.draw(st.integers(1, 12))
    fitting = [c for c in cuts(layers, stages) if slowest(lambda s: filled[s], c) <= 1]
    best = min((slowest(lambda s: seconds[s], c) for c in fitting), default=float("inf"))
    found = partition.cut(seconds, stages, filled)
    assert found == partition.cut(lambda s: seconds[s], stages, lambda s: filled[s])
    if found is None:
        assert best == float("inf")
    else:
        assert found in fitting
        assert slowest(lambda s: seconds[s], found) == best


@given(st.integers(1, 7), st.data())
def test_cut_is_exact_for_equal_devices(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    seconds = data.draw(tables(layers, 1))[0]
    best = min(slowest(lambda s: seconds, c) for c in cuts(layers, stages))
    found = partition.cut(seconds, stages)
    assert (found is None) == (best == float("inf"))
    assert found is None or slowest(lambda s: seconds, found) == best


@given(st.integers(1, 6), st.data())
def test_lightest_is_exact_and_fits_where_anything_does(layers: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, layers))
    capacities = data.draw(st.lists(st.integers(1, 20), min_size=stages, max_size=stages))
    held = partition.spans(data.draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers)))

    def filled(stage: int) -> Table:
        return held * (stages - stage) / capacities[stage]  # 1F1B

    found = partition.lightest(filled, stages)
    assert found is not None
    least = slowest(filled, found)
    assert least == min(slowest(filled, c) for c in cuts(layers, stages))
    assert (partition.cut(held, stages, filled) is not None) == (least <= 1)


@given(st.lists(st.integers(1, 20), min_size=4, max_size=12), st.integers(1, 3))
def test_evened_devices_are_never_busier(weights: list[int], devices: int) -> None:
    """Two stages per device, in a V: shifting boundaries never makes the busiest device busier, nor loses a layer."""
    stages = min(2 * devices, len(weights) // 2 * 2)
    homes = [s if s < stages // 2 else stages - 1 - s for s in range(stages)]
    table = partition.spans([float(w) for w in weights])
    before = partition.cut(table, stages)
    assert before is not None
    after = partition.evened(before, homes, table, 0 * table)

    def busiest(ranges: tuple[range, ...]) -> int:
        loads = [0] * stages
        for home, layers in zip(homes, ranges, strict=True):
            loads[home] += sum(weights[i] for i in layers)
        return max(loads)

    assert [i for layers in after for i in layers] == list(range(len(weights)))
    assert all(after)
    assert busiest(after) <= busiest(before)
