"""Which layers to recompute, against every set of layers and against a table over bytes."""

from __future__ import annotations

from itertools import product
from math import inf, isclose

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from planner.placement import selection
from planner.placement.selection import Selection, cheapest

BYTES = st.integers(0, 30)
SECONDS = st.one_of(st.floats(0, 1e-3), st.integers(0, 5).map(float), st.just(inf))


def cheapest_of_all(seconds: list[float], saved: list[int], needed: int) -> float:
    least = inf
    for taken in product((False, True), repeat=len(seconds)):
        if sum(b for b, t in zip(saved, taken, strict=True) if t) >= needed:
            least = min(least, sum(s for s, t in zip(seconds, taken, strict=True) if t))
    return least


def cheapest_by_bytes(seconds: list[int], saved: list[int], needed: int) -> float:
    """The textbook's table: the least seconds that free at least so many bytes."""
    least = [0.0] + [inf] * needed
    for second, byte in zip(seconds, saved, strict=True):
        for bytes_ in range(needed, 0, -1):
            least[bytes_] = min(least[bytes_], least[max(0, bytes_ - byte)] + second)
    return least[needed]


def check(found: Selection, seconds: list[float], saved: list[int], needed: int) -> None:
    assert list(found.layers) == sorted(set(found.layers))
    assert isclose(found.seconds, sum(seconds[i] for i in found.layers), abs_tol=1e-15)
    assert found.freed == sum(saved[i] for i in found.layers) >= needed
    assert all(found.freed - saved[i] < needed for i in found.layers), "a layer that is not needed"


@settings(max_examples=300)
@given(st.lists(st.tuples(SECONDS, BYTES), max_size=10), st.integers(0, 200))
def test_the_cheapest_of_all_sets(layers: list[tuple[float, int]], needed: int) -> None:
    seconds, saved = [s for s, _ in layers], [b for _, b in layers]
    least = cheapest_of_all(seconds, saved, needed)
    found = cheapest(seconds, saved, needed)
    if found is None:
        assert least == inf
    else:
        check(found, seconds, saved, needed)
        assert found.exact
        assert isclose(found.seconds, least, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.parametrize("wide", [0, 2])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.tuples(SECONDS, BYTES), max_size=10), share=st.floats(0, 1))
def test_joined_with_the_last_layers_it_is_exact(
    wide: int, layers: list[tuple[float, int]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "WIDE", wide)
    monkeypatch.setattr(selection, "TAIL", 5)
    seconds, saved = [s for s, _ in layers], [b for _, b in layers]
    needed = int(share * sum(saved))
    found = cheapest(seconds, saved, needed)
    least = cheapest_of_all(seconds, saved, needed)
    assert (found is None) == (least == inf)
    if found is not None:
        check(found, seconds, saved, needed)
        assert found.exact
        assert isclose(found.seconds, least, rel_tol=1e-9, abs_tol=1e-15)


KEEPS_THE_BEST_OF_AN_INTERVAL = [(31, 46), (37, 50), (11, 31), (8, 21), (3, 12), (26, 48)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(layers=KEEPS_THE_BEST_OF_AN_INTERVAL, share=162 / 208, tolerance=1.0)
@given(
    layers=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=60),
    share=st.floats(0, 1),
    tolerance=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
)
def test_approximated_it_stays_within_what_it_says(
    layers: list[tuple[int, int]], share: float, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "WIDE", 4)
    monkeypatch.setattr(selection, "TAIL", 0)
    monkeypatch.setattr(selection, "ALWAYS_EXACT", 0)
    seconds, saved = [s for s, _ in layers], [b for _, b in layers]
    needed = int(share * sum(saved))
    found = cheapest([float(s) for s in seconds], saved, needed, tolerance=tolerance)
    assert found is not None
    check(found, [float(s) for s in seconds], saved, needed)
    least = cheapest_by_bytes(seconds, saved, needed)
    assert 0 <= found.bound <= tolerance * (1 + 1e-9)
    assert least <= found.seconds <= least * (1 + found.bound) * (1 + 1e-9)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=13, max_size=60), st.floats(0, 1))
def test_deep_models_are_exact_too(layers: list[tuple[int, int]], share: float) -> None:
    seconds, saved = [s for s, _ in layers], [b for _, b in layers]
    needed = int(share * sum(saved))
    found = cheapest([float(s) for s in seconds], saved, needed)
    assert found is not None
    check(found, [float(s) for s in seconds], saved, needed)
    assert found.exact
    assert found.seconds == cheapest_by_bytes(seconds, saved, needed)


@given(st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1, 1e9)), min_size=1, max_size=40), st.floats(0, 1))
def test_all_layers_free_all_their_bytes(layers: list[tuple[float, float]], share: float) -> None:
    seconds, saved = [s for s, _ in layers], [b for _, b in layers]
    found = cheapest(seconds, saved, share * sum(saved))
    assert found is not None
    assert found.freed >= share * sum(saved) * (1 - 1e-11)
    everything = cheapest(seconds, saved, sum(saved))
    assert everything is not None
    assert everything.layers == tuple(range(len(layers)))
    assert cheapest(seconds, saved, sum(saved) * 1.001) is None


def test_forty_layers_without_any_order_are_exact() -> None:
    """Seconds equal to bytes: every one of the 2^40 sets is undominated. Found: the one that fills the need exactly."""
    saved = [7**i % 1_000_003 + (i * 1e-3) for i in range(40)]
    hidden = range(0, 40, 3)
    found = cheapest(saved, saved, sum(saved[i] for i in hidden))
    assert found is not None
    assert found.exact
    assert isclose(found.seconds, sum(saved[i] for i in hidden), rel_tol=1e-9)


def test_a_hundred_blocks_of_four_kinds_are_exact() -> None:
    kinds = [(1.1e-3, 100_003), (2.3e-3, 250_007), (0.4e-3, 30_011), (3.1e-3, 400_009)]
    seconds, saved = ([kind[i] for kind in kinds] * 100 for i in (0, 1))
    found = cheapest(seconds, saved, 30_000_000)
    assert found is not None
    assert found.exact


def test_nothing_to_free_and_nothing_that_may_be_repeated() -> None:
    assert cheapest([1.0], [5], 0) == Selection((), 0.0, 0, 0.0)
    assert cheapest([inf, 1.0], [5, 5], 6) is None
    assert cheapest([0.0, 0.0, 1.0], [5, 9, 9], 9) == Selection((1,), 0.0, 9, 0.0)
