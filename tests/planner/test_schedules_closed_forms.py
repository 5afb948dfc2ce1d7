"""The schedules against the closed forms and the figures of their papers, and against torch's own tables.

The oracle is a tiny exact evaluator: every device performs its row in order, nothing costs but computes.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from planner.basis import compiled
from planner.orders.action import actions
from planner.orders.codes import stages
from planner.orders.schedules import Shape, get, greedy, names, why_not
from planner.programs.program import Program


class Times(NamedTuple):
    makespan: int
    span_bubble: int
    in_flight: tuple[int, ...]


def evaluate(name: str, shape: Shape, f: int = 1, b: int = 1, w: int = 1) -> Times:
    """Perform a schedule: equal stages of f, b (input gradient) and w seconds, no communication.

    Fails when an action is missing, done twice or waits for ever. An activation is held from the start of F to the
    end of B or W.
    """
    rows = [actions(row) for row in get(name).order(shape)]
    seconds = {"F": [f] * shape.stages, "I": [b] * shape.stages, "W": [w] * shape.stages, "B": [b + w] * shape.stages}
    return perform(rows, shape, seconds)


def perform(rows, shape: Shape, seconds) -> Times:
    ends: dict[tuple[str, int, int], int] = {}
    at, clock, held = [0] * len(rows), [0] * len(rows), [[] for _ in rows]
    work, first = [0] * len(rows), [None] * len(rows)
    last = shape.stages - 1
    moved = True
    while moved:
        moved = False
        for d, row in enumerate(rows):
            while at[d] < len(row):
                stage, op, m, _ = row[at[d]]
                needs = []
                if op == "F":
                    needs = [("F", stage - 1, m)] if stage else []
                elif op == "W":
                    needs = [("I", stage, m)]
                else:
                    needs = [("F", stage, m)] + ([("grad", stage + 1, m)] if stage < last else [])
                if not all(need in ends for need in needs):
                    break
                assert (op, stage, m) not in ends, f"{stage}{op}{m} is done twice"
                start = max([clock[d], *(ends[need] for need in needs)])
                clock[d] = end = start + seconds[op][stage]
                ends[op, stage, m] = end
                first[d] = start if first[d] is None else first[d]
                work[d] += seconds[op][stage]
                if op in "IB":
                    assert ("grad", stage, m) not in ends, f"{stage}{op}{m}: backward is done twice"
                    ends["grad", stage, m] = end
                if op in "FBW":
                    held[d].append(1 if op == "F" else -1)
                at[d] += 1
                moved = True
    assert at == [len(row) for row in rows], "a device waits for ever"
    wanted = {(s, m) for s in range(shape.stages) for m in range(shape.microbatches)}
    for done in ("F", "grad"):
        assert {key[1:] for key in ends if key[0] == done} == wanted
    assert {key[1:] for key in ends if key[0] in "BW"} == wanted
    return Times(
        max(clock),
        max(clock[d] - first[d] - work[d] for d in range(len(rows))),
        tuple(max(accumulate(changes)) for changes in held),
    )


P = st.integers(1, 8)
M = st.integers(1, 64)
V = st.integers(1, 4)
SECONDS = st.integers(1, 9)
SPLIT_STRAIGHT = ("zb-h1", "zb-h2", "zb-greedy", "zb-greedy-2p")
FOLDED = ("zb-v", "zb-v-greedy", "v-half", "v-min", "dualpipe-v")


def possible(name: str, shape: Shape) -> Shape:
    assume(why_not(get(name), shape) is None)
    return shape


def bubble(name: str, shape: Shape, f: int = 1, b: int = 1, w: int = 1) -> int:
    return evaluate(name, shape, f, b, w).makespan - shape.chunks * shape.microbatches * (f + b + w)


@given(st.sampled_from(names()), P, M, V)
def test_every_schedule_computes_everything_once_and_ends(name: str, p: int, m: int, v: int) -> None:
    shape = possible(name, Shape(p, m, v))
    if get(name).trains:
        evaluate(name, shape)


@given(st.sampled_from([*SPLIT_STRAIGHT, *FOLDED, "zb-interleaved", "chimera"]), P, M, V)
def test_stages_are_at_home(name: str, p: int, m: int, v: int) -> None:
    shape = possible(name, Shape(p, m, v))
    for d, row in enumerate(get(name).order(shape)):
        assert all(d in get(name).homes(s, p) for s in set(stages(row).tolist()))


@pytest.mark.parametrize(
    ("name", "v", "four", "eight"),
    [
        ("gpipe", 1, 33, 117),
        ("1f1b", 1, 33, 117),
        ("interleaved", 2, 57, 213),
        ("looped-bfs", 2, 57, 213),
        ("zb-h1", 1, 27, 103),
        ("zb-h2", 1, 27, 103),
        ("zb-interleaved", 2, 51, 199),
        ("zb-v", 2, 51, 199),
        ("dualpipe-v", 2, 51, 199),
    ],
)
def test_makespans_of_equal_actions(name: str, v: int, four: int, eight: int) -> None:
    assert evaluate(name, Shape(4, 8, v)).makespan == four
    assert evaluate(name, Shape(8, 32, v)).makespan == eight


@pytest.mark.parametrize(
    ("name", "v", "held"),
    [
        ("gpipe", 1, (8, 8, 8, 8)),
        ("1f1b", 1, (4, 3, 2, 1)),
        ("interleaved", 2, (11, 9, 7, 5)),
        ("interleaved", 4, (19, 17, 15, 13)),
        ("looped-bfs", 2, (16, 16, 16, 16)),
        ("zb-h1", 1, (4, 4, 4, 4)),
        ("zb-h2", 1, (7, 7, 7, 7)),
        ("zb-interleaved", 2, (8, 8, 8, 8)),
        ("zb-v", 2, (8, 8, 8, 8)),
        ("dualpipe-v", 2, (9, 9, 9, 9)),
    ],
)
def test_activations_of_four_devices(name: str, v: int, held: tuple[int, ...]) -> None:
    assert evaluate(name, Shape(4, 8, v)).in_flight == held


@given(P, M, V, SECONDS, SECONDS, SECONDS)
def test_interleaved(p: int, m: int, v: int, f: int, b: int, w: int) -> None:
    """The bubble holds from M = p on, the activations for whole rounds."""
    shape = possible("interleaved", Shape(p, m, v))
    assume(m >= p)
    assert bubble("interleaved", shape, f, b, w) == (p - 1) * (f + b + w)
    if m % p == 0 and v > 1:
        held = tuple(min(v * m, (v - 1) * p + 2 * (p - 1 - i) + 1) for i in range(p))
        assert evaluate("interleaved", shape).in_flight == held


@given(P, M, V, SECONDS, SECONDS, SECONDS)
def test_looped_breadth_first(p: int, m: int, v: int, f: int, b: int, w: int) -> None:
    assume(m >= p)
    assert bubble("looped-bfs", Shape(p, m, v), f, b, w) == (p - 1) * (f + b + w)
    assert evaluate("looped-bfs", Shape(p, m, v)).in_flight == (v * m,) * p


@given(P, M, SECONDS, SECONDS, SECONDS)
@example(4, 8, 5, 6, 4)
def test_zb_h1(p: int, m: int, f: int, b: int, w: int) -> None:
    """(p - 1) (F + B - W) where W fits between the others; below M = p only the last W is not hidden."""
    if m >= p:
        assert bubble("zb-h1", Shape(p, m), f, b, w) == (p - 1) * max(f, b, f + b - w)
    elif w <= min(f, b):
        assert bubble("zb-h1", Shape(p, m), f, b, w) == (p - 1) * (f + b) - (m - 1) * w
    assert evaluate("zb-h1", Shape(p, m)).in_flight == (min(p, m),) * p


@given(P, M, SECONDS, SECONDS, SECONDS)
@example(4, 8, 5, 6, 4)
def test_zb_h2(p: int, m: int, f: int, b: int, w: int) -> None:
    if m >= 2 * p - 1:
        assert evaluate("zb-h2", Shape(p, m), f, b, w).span_bubble == (p - 1) * max(f + b - 2 * w, b - f, 0)
    assert evaluate("zb-h2", Shape(p, m)).in_flight == (min(2 * p - 1, m),) * p


@given(P, M, V, SECONDS, SECONDS, SECONDS)
@example(4, 8, 2, 5, 6, 4)
def test_interleaved_zero_bubble(p: int, m: int, v: int, f: int, b: int, w: int) -> None:
    shape = possible("zb-interleaved", Shape(p, m, v))
    assume(m >= p)
    if m % p == 0:
        assert bubble("zb-interleaved", shape, f, b, w) == (p - 1) * max(f, b, f + b - w)
        assert evaluate("zb-interleaved", shape).in_flight == (v * p,) * p
    elif w <= min(f, b):
        assert bubble("zb-interleaved", shape, f, b, w) == (p - 1) * (f + b - w)


@given(P, st.integers(1, 5))
def test_zb_interleaved_of_one_stage_is_zb_h1(p: int, rounds: int) -> None:
    shape = Shape(p, p * rounds)
    assert Program(get("zb-interleaved").order(shape)) == Program(get("zb-h1").order(shape))


@given(P, M)
def test_zb_v(p: int, m: int) -> None:
    assume(m >= 2 * p - 1)
    times = evaluate("zb-v", Shape(p, m, 2))
    assert times == (6 * m + p - 1, 0, (2 * p,) * p)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 32)])
def test_zb_v_is_not_free_of_bubbles_where_actions_differ(p: int, m: int) -> None:
    """(p - 1) 0.8 at F, B, W = 1, 1.2, 0.8."""
    assert evaluate("zb-v", Shape(p, m, 2), 5, 6, 4).span_bubble == (p - 1) * 4


@given(P, M, SECONDS)
def test_dualpipe_v(p: int, m: int, unit: int) -> None:
    shape = possible("dualpipe-v", Shape(p, m, 2))
    assert bubble("dualpipe-v", shape, unit, unit, unit) == (p - 1) * unit
    assert evaluate("dualpipe-v", shape).in_flight == (2 * p + 1,) * p


@given(P, M)
def test_v_min(p: int, m: int) -> None:
    """Two thirds of 1F1B's bubble 6 (p - 1), in a third of its activations."""
    times = evaluate("v-min", Shape(p, m, 2))
    assert max(times.in_flight) <= 2 * ((p + 4) // 3)
    if p > 1:
        assert times.makespan == 6 * m + 4 * (p - 1) - (p % 3 != 0)


@given(P, M)
def test_v_half(p: int, m: int) -> None:
    """Less than half of 1F1B's bubble 6 (p - 1), in half of its activations."""
    times = evaluate("v-half", Shape(p, m, 2))
    assert max(times.in_flight) <= 2 * ((p + 2) // 2)
    if p > 2 and 2 * m > p:
        assert times.makespan == 6 * m + 3 * p - 5 + p % 2


@given(st.integers(1, 4).map(lambda half: 2 * half), st.integers(1, 6), SECONDS)
def test_chimera(p: int, units: int, f: int) -> None:
    """F as long as a whole backward, then half as long: the second is exact for one unit of p micro-batches."""
    assert evaluate("chimera", Shape(p, p * units), 2 * f, f, f).makespan == 4 * f * p * units + (p - 2) * 2 * f
    once = evaluate("chimera", Shape(p, p), f, f, f)
    assert once.makespan == 3 * f * p + 2 * (p - 2) * f
    assert once.in_flight == tuple(p // 2 + 1 + min(d, p - 1 - d) for d in range(p))


def test_what_cannot_be_arranged() -> None:
    assert why_not(get("chimera"), Shape(3, 4)) == "both directions share alike: p=3 and M=4 must be even"
    assert "M=7, 8 stages" in (why_not(get("dualpipe-v"), Shape(4, 7, 2)) or "")
    assert "v=2" in (why_not(get("zb-v"), Shape(4, 8, 1)) or "")


@st.composite
def measured(draw: st.DrawFn, chunks: int) -> Shape:
    p, m = draw(P), draw(st.integers(1, 24))
    usual = draw(st.tuples(SECONDS, SECONDS, SECONDS))
    uneven = draw(st.booleans())
    several = [draw(st.tuples(SECONDS, SECONDS, SECONDS)) if uneven else usual for _ in range(p * chunks)]
    return Shape(p, m, chunks, seconds=tuple(several))


def measure(name: str, shape: Shape) -> Times:
    f, b, w = (list(column) for column in zip(*shape.seconds, strict=True))
    whole = [x + y for x, y in zip(b, w, strict=True)]
    rows = [actions(row) for row in get(name).order(shape)]
    return perform(rows, shape, {"F": f, "I": b, "W": w, "B": whole})


@given(measured(1))
def test_greedy_is_never_slower_than_by_hand(shape: Shape) -> None:
    one, two = measure("zb-greedy", shape), measure("zb-greedy-2p", shape)
    assert one.makespan <= measure("zb-h1", shape).makespan
    assert two.makespan <= min(one.makespan, measure("zb-h2", shape).makespan)
    assert max(one.in_flight) <= shape.devices
    assert max(two.in_flight) <= 2 * shape.devices


@given(measured(2))
def test_greedy_vee_is_never_slower_than_by_hand(shape: Shape) -> None:
    times = measure("zb-v-greedy", shape)
    assert times.makespan <= measure("zb-v", shape).makespan
    assert max(times.in_flight) <= 2 * shape.devices


def test_greedy_vee_has_no_bubble_where_the_fixed_order_has() -> None:
    shape = Shape(8, 16, 2, seconds=((7.0, 5.0, 6.0),) * 16)
    shortest = 7 * 7 + 2 * 16 * (7 + 5 + 6)
    assert measure("zb-v", shape).makespan == shortest + 12
    assert measure("zb-v-greedy", shape).makespan == shortest


@given(measured(2), st.sampled_from(["zb-v", "v-half"]))
def test_makespan_by_the_kernel_is_exact(shape: Shape, name: str) -> None:
    assert greedy.ends(shape, np.array(shape.seconds, float), get(name).order(shape)) == measure(name, shape).makespan


@pytest.mark.parametrize("name", ["zb-greedy", "zb-v-greedy"])
def test_greedy_is_the_same_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v = get(name).chunks[0]
    shape = Shape(4, 8, v, seconds=tuple((5.0 + s, 6.0, 4.0) for s in range(4 * v)))
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 0)
    fast = Program(get(name).order(shape))
    monkeypatch.setattr(compiled, "WORTH_COMPILING", 1 << 60)
    with monkeypatch.context() as context:
        context.delitem(sys.modules, "numba", raising=False)
        assert Program(get(name).order(shape)) == fast


TORCH = ("gpipe", "interleaved", "looped-bfs", "zb-interleaved", "zb-v", "dualpipe-v")


@given(st.sampled_from(TORCH), st.integers(1, 6), st.integers(1, 20), V)
def test_torch_arranges_the_same(name: str, p: int, m: int, v: int) -> None:
    """Not torch's 1F1B, which is wrong on the last rank; of its interleaved 1F1B only real interleaving."""
    torch_schedules = pytest.importorskip("tests.torch_schedules")
    shape = possible(name, Shape(p, m, v))
    assume(name != "interleaved" or v > 1)
    ours = [[str(action) for action in row] for row in Program(get(name).order(shape)).rows]
    assert ours == torch_schedules.torch_orders(name, p, v, m)
