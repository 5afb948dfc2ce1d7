"""List scheduling of split backwards: every device does, whenever it is free, what the rules below find best.

The rules are those of Qi et al. (arXiv 2401.10241, section 3.1) with the choices that the paper searches over as
`Rules`; `best` also tries orders made by hand, and their F and I with W placed where the seconds want them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders.codes import STAGE, Codes, Order, code, has, microbatches, ops, stages
from planner.orders.operations import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, NUMBER
from planner.orders.schedules.registry import Shape, get

Seconds = npt.NDArray[np.float64]

_CODES = np.array([code(op, 0) for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)])


class Rules(NamedTuple):
    """How a device chooses.

    Stage s of S may be `1 + ahead (S - 1 - s)` forwards before its backwards. A W is started if at least `gap` of it
    fits before the next F or I that is known to come. Where F and I could both start, `forward_first` takes F. Of a
    device's stages the one nearest to the loss goes first, and one activation is kept free for the last of them, so
    that a folded pipeline never fills up with micro-batches that cannot go on.
    """

    ahead: float
    gap: float
    forward_first: bool


_BY_GUIDE = tuple(Rules(0.0, gap, False) for gap in (0.0, 0.25, 0.5))


def best(name: str, shape: Shape, limit: int, rules: Iterable[Rules], others: Sequence[Order]) -> Order:
    """Return the order with the shortest makespan: one of `others`, one of those with W placed anew, or by the rules.

    `name` is the schedule whose stages' homes count, `limit` how many activations of a stage a device may hold. Stages
    are equal unless the shape has seconds. The first of equally good orders is taken, and the search ends when no
    order can be better.
    """
    seconds = np.array(shape.seconds or [(1.0, 1.0, 1.0)] * shape.stages, np.float64)
    homes = np.array([get(name).homes(s, shape.devices)[0] for s in range(shape.stages)])
    bound = least(shape, seconds, homes) * (1 + 1e-9)

    def made() -> Iterator[tuple[Order, float]]:
        yield from ((order, ends(shape, seconds, order)) for order in others)
        yield from (greedy(shape, seconds, homes, limit, rule, order) for order in others for rule in _BY_GUIDE)
        yield from (greedy(shape, seconds, homes, limit, rule) for rule in rules)

    found: Order = ()
    shortest = np.inf
    for order, makespan in made():
        if makespan < shortest:
            found, shortest = order, makespan
        if shortest <= bound:
            break
    return found


def least(shape: Shape, seconds: Seconds, homes: npt.NDArray[np.int64]) -> float:
    """Return a lower bound of the makespan.

    A device works behind the forwards that lead to its stage nearest to the input; and one micro-batch goes all the
    way.
    """
    before = np.concatenate([[0.0], np.cumsum(seconds[:, 0])])
    work = np.bincount(homes, shape.microbatches * seconds.sum(axis=1), shape.devices)
    first = np.array([np.flatnonzero(homes == d)[0] for d in range(shape.devices)])
    return float(max(np.max(before[first] + work), seconds[:, :2].sum() + seconds[0, 2]))


def greedy(
    shape: Shape,
    seconds: Seconds,
    homes: npt.NDArray[np.int64],
    limit: float,
    rules: Rules,
    guide: Order = (),
    share: float = 1.0,
) -> tuple[Order, float]:
    """Return the order that the rules make, and its makespan.

    With a guide, F and I keep its order, and only W are placed anew. `share` is what W needs of an activation: the rest
    is free behind I, so that more of them can wait within the `limit`.
    """
    p, v, m = shape.devices, shape.chunks, shape.microbatches
    mine = np.argsort(homes, kind="stable")  # the stages of device 0, those of device 1, ...
    behind = np.arange(shape.stages)[::-1]
    ahead = 1 + np.minimum(np.round(rules.ahead * behind), m).astype(np.int64)
    follow = np.concatenate([_follow(row, shape) for row in guide]) if guide else np.zeros(0, np.int64)
    f, b, w = (np.ascontiguousarray(column) for column in seconds.T)
    known = _Known(mine, homes, f, b, w, ahead, follow)
    ends = np.full(2 * shape.stages * m, np.inf)
    found = _Found(ends, np.zeros(p), np.zeros(p), np.zeros(3 * shape.stages * m, np.int64), np.zeros(1))
    done = _choose(3 * shape.stages * m * (p + v), p, v, m, float(limit), rules, float(share), known, found)
    rows, result = found.rows, found.result
    if done < len(rows):
        return (), np.inf
    op, stage, microbatch = rows // (shape.stages * m), rows // m % shape.stages, rows % m
    return tuple((_CODES[op] + (stage << STAGE) + microbatch + 1).reshape(p, -1)), float(result[0])


def _follow(row: Codes, shape: Shape) -> Codes:
    row = row[~has(row, BACKWARD_WEIGHT)]
    return np.where(has(row, FORWARD), stages(row), shape.stages + stages(row))


class _Known(NamedTuple):
    """What a list schedule goes by.

    `mine` are the stages of device 0, those of device 1, ...; of every stage its device, the seconds of F, I and W, and
    how many forwards it may be ahead; `follow` is what every device does in a guide's order (F: the stage, I: that
    behind all stages), empty without one.
    """

    mine: Codes
    homes: Codes
    forward: Seconds
    input: Seconds
    weight: Seconds
    ahead: Codes
    follow: Codes


class _Found(NamedTuple):
    """What a list schedule writes.

    `end` of every F and I; of every device when it looks for work again and until when it has any; the order; and the
    makespan.
    """

    end: Seconds
    wake: Seconds
    clock: Seconds
    rows: Codes
    result: Seconds


@kernel
def _choose(p: int, v: int, m: int, limit: float, rules: Rules, share: float, known: _Known, found: _Found) -> int:
    mine, homes, f, b, w, ahead, follow = known
    end, wake, clock, rows, result = found
    gap, forward_first, guided = rules.gap, rules.forward_first, len(follow) > 0
    never = np.inf
    stages = p * v
    at = [0] * p
    held = [0.0] * p
    forwards = [0] * stages
    backwards = [0] * stages
    weights = [0] * stages
    step = [0] * p
    done = 0
    while done < 3 * stages * m:
        d = 0
        for other in range(1, p):
            if wake[other] < wake[d]:
                d = other
        now = wake[d]
        if now == never:
            break
        taken_f, taken_i, taken_w, soon, left = -1, -1, -1, never, 0
        only = follow[d * 2 * v * m + step[d]] if guided and step[d] < 2 * v * m else -1
        for k in range(v - 1, -1, -1):
            s = mine[d * v + k]
            i = forwards[s]
            room = limit - held[d] - (1 if k < v - 1 and not guided else 0)
            if i < m:
                left += 1
                if room > 1 - 1e-6 and (only == s if guided else i - backwards[s] < ahead[s]):
                    ready = end[(s - 1) * m + i] if s > 0 else 0.0
                    if ready <= now:
                        if taken_f < 0:
                            taken_f = s
                    elif ready < soon:
                        soon = ready
            i = backwards[s]
            if i < m:
                left += 1
                if i < forwards[s] and (only == stages + s or not guided):
                    ready = end[(stages + s + 1) * m + i] if s < stages - 1 else 0.0
                    if ready <= now:
                        if taken_i < 0:
                            taken_i = s
                    elif ready < soon:
                        soon = ready
            if weights[s] < backwards[s] and taken_w < 0:
                taken_w = s
        op = -1
        if taken_f >= 0 and (taken_i < 0 or forward_first):
            op, s = 0, taken_f
        elif taken_i >= 0:
            op, s = 1, taken_i
        elif taken_w >= 0 and (left == 0 or soon - now >= gap * w[taken_w]):
            op, s = 2, taken_w
        if op < 0:
            wake[d] = soon
            continue
        if op == 0:
            i, seconds = forwards[s], f[s]
            forwards[s] += 1
            held[d] += 1.0
            next_stage = s + 1
        elif op == 1:
            i, seconds = backwards[s], b[s]
            backwards[s] += 1
            held[d] -= 1.0 - share
            next_stage = s - 1
        else:
            i, seconds = weights[s], w[s]
            weights[s] += 1
            held[d] -= share
            next_stage = -1
        clock[d] = now + seconds
        wake[d] = clock[d]
        rows[d * 3 * v * m + at[d]] = (op * stages + s) * m + i
        at[d] += 1
        done += 1
        if op < 2:
            step[d] += 1
            end[(op * stages + s) * m + i] = clock[d]
            if 0 <= next_stage < stages:
                waiting = homes[next_stage]
                if waiting != d and wake[waiting] > clock[d]:
                    wake[waiting] = max(clock[waiting], clock[d])
    for d in range(p):
        result[0] = max(result[0], clock[d])
    return done


def ends(shape: Shape, seconds: Seconds, order: Order) -> float:
    """Return the makespan of an order of F, I, W and whole B, if computes alone cost time."""
    row = np.concatenate([*order, np.empty(0, np.int64)])
    starts = np.concatenate([[0], np.cumsum([len(r) for r in order])])
    result = np.zeros(1)
    _perform(
        *(2 * len(row), shape.devices, shape.stages, shape.microbatches, ops(row)),
        *(stages(row), microbatches(row), starts, seconds.reshape(-1)),
        *(np.full(2 * shape.stages * shape.microbatches, -1.0), result),
    )
    return float(result[0])


_F, _I, _W = (NUMBER[op] for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT))


@kernel
def _perform(
    p: int, stages: int, m: int, ops: Codes, stage: Codes, microbatch: Codes, starts: Codes, seconds: Seconds,
    end: Seconds, result: Seconds,
) -> int:  # fmt: skip
    at = [starts[d] for d in range(p)]
    clock = [0.0] * p
    done, moved = 0, True
    while moved:
        moved = False
        for d in range(p):
            while at[d] < starts[d + 1]:
                op, s, i = ops[at[d]], stage[at[d]], microbatch[at[d]]
                ready = 0.0
                if op == _F:
                    if s > 0:
                        ready = end[(s - 1) * m + i]
                elif op != _W and s < stages - 1:
                    ready = end[(stages + s + 1) * m + i]
                if ready < 0.0:
                    break
                took = seconds[3 * s] if op == _F else seconds[3 * s + 1] if op == _I else seconds[3 * s + 2]
                if op != _F and op != _I and op != _W:
                    took += seconds[3 * s + 1]
                clock[d] = max(clock[d], ready) + took
                if op == _F:
                    end[s * m + i] = clock[d]
                elif op != _W:
                    end[(stages + s) * m + i] = clock[d]
                at[d] += 1
                done += 1
                moved = True
    for d in range(p):
        result[0] = max(result[0], clock[d])
    return done
