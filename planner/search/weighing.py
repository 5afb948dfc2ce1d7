"""What plans at a point take at least if they fit, however they are cut: time and memory weighed against each other.

A step is at least as long as each row's computing and each row's copies, and a plan fits if no row is overfull. All
these add up over layers. So with any weights of the rows' seconds and bytes, a layer costs at least its cheapest place
(a stage, recomputed there or not where layers are chosen), and the sum of these is a bound: the dual of the linear
programme of how much of each layer is on which stage. The weights are those that are the best for a model of equal
layers, from the last row to the first, as what leads to a row's first micro-batch is on the rows before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROUNDS = 4
"""Times that weights are improved: which limit is the tighter one on a row depends on the step time."""


class Work(NamedTuple):
    """Kinds of layers: the `number` of each, and their seconds per step, bytes and copies where a stage has them.

    `seconds` of all micro-batches and the update, `again` of repeating all forwards, `leading` of what comes before a
    later stage's first compute and behind its last; `static` is the share of a device's memory that is always there,
    `kept` that of one micro-batch, `swapped` the seconds of copying that of one to the host. `through` are the seconds
    that copying one there and back keeps all hosts' memories, and `hosted` those that updates there do, both of all
    replicas. Each row is as much as `quicker` seconds quicker than its layers.
    """

    number: Floats
    seconds: Floats
    again: Floats
    leading: Floats
    static: Floats
    kept: Floats
    swapped: Floats
    through: Floats
    hosted: Floats
    quicker: float


class Rows(NamedTuple):
    """Stages and rows, as arrays (stages, rows): the part of its micro-batches that a stage has on a row.

    `here` is 1 where a stage is, `many` how many micro-batches it has there when the row has most, `swaps` how many go
    to the host and back. `chained`: row s has stage s only, and begins behind the stages before; else each row begins
    after `led` seconds.
    """

    part: Floats
    here: Floats
    many: Floats
    swaps: Floats
    chained: bool
    led: Floats


def least_seconds(work: Work, rows: Rows, *, chosen: bool, begin: float) -> float:
    """Return seconds that no plan of this work can beat that fits, infinite where none fits; `begin` is such a bound.

    `chosen`: each layer may be recomputed, or not.
    """
    found = begin
    for _ in range(ROUNDS):
        better = _bound(work, rows, _weights(work, rows, found, chosen=chosen), chosen=chosen)
        if better <= found * (1 + 1e-6):
            break
        found = better
        if found == np.inf:
            break
    crowded = (_bound(work, rows, weights, chosen=chosen) for weights in _crowded(work, rows))
    return float(max(found, *crowded, 0.0))


class _Weights(NamedTuple):
    """Of each row: of its computing, of its copies, of its memory; and one of what the hosts' memories carry."""

    seconds: Floats
    copies: Floats
    memory: Floats
    hosts: float = 0.0


def _weights(work: Work, rows: Rows, step_s: float, *, chosen: bool) -> _Weights:
    """Return weights with which a mean layer costs the same everywhere, the tightest for a step of so many seconds."""
    total = work.number.sum()

    def mean(values: Floats) -> float:
        return float((values * work.number).sum() / total)

    own, again, leading, static, kept, swapped = map(mean, work[1:7])
    depth = rows.here.shape[1]
    either = rows.part.max(axis=0) == 1  # its layers are where they are kept least; else every layer is on two rows
    many, swaps = (
        np.where(either, np.where(rows.here > 0, each, np.inf).min(axis=0), each.sum(axis=0) / rows.here.sum(axis=0))
        for each in (rows.many, rows.swaps)
    )
    part = rows.part.max(axis=0)
    found = np.zeros((3, depth))
    behind = 0.0
    for row in reversed(range(depth)):
        price = max(0.0, 1 - leading * behind) if rows.chained else 1.0
        filled, freed = static + many[row] * kept, many[row] * kept
        options = [(price / (part[row] * own), 0.0, 0.0)] if own > 0 else []
        if swaps[row] * swapped > 0:
            options.append((0.0, price / (swaps[row] * swapped), 0.0))
        alone = static if chosen else filled
        if alone > 0:
            options.append((0.0, 0.0, price / alone))
        if chosen and freed > 0 and again > 0:
            weight = price / (part[row] * (own + again * filled / freed))
            options.append((weight, 0.0, weight * part[row] * again / freed))
        if options:
            found[:, row] = min(options, key=lambda one: (one[0] + one[1]) * step_s + one[2])
        behind += found[0, row]
    return _Weights(*found)


def _crowded(work: Work, rows: Rows) -> Iterator[_Weights]:
    """Yield weights for which the hosts' memories carry so much that they decide, beside the rows with few copies."""
    own, through, hosted = (float((each * work.number).sum()) for each in (work.seconds, work.through, work.hosted))
    none = np.zeros(rows.here.shape[1])
    if hosted > 0:
        yield _Weights(none, none, none, 1.0)
    many = (rows.swaps * rows.part).sum(axis=0) / (rows.part * rows.here).sum(axis=0)
    if own <= 0 or through <= 0:
        return
    for most in np.unique(many[many > 0]):
        weight = 1 / (most * through + hosted)
        seconds = np.maximum(0.0, 1 - weight * (many * through + hosted)) / own
        yield _Weights(seconds, none, none, weight)


def _bound(work: Work, rows: Rows, weights: _Weights, *, chosen: bool) -> float:
    """Return the bound that follows from any weights, as the module's text says."""
    own, memory = rows.part @ weights.seconds, rows.here @ weights.memory
    price = np.outer(work.seconds, own) + np.outer(work.static, memory)
    if rows.swaps.any():
        price += np.outer(work.swapped, rows.swaps @ weights.copies)
        price += weights.hosts * np.outer(work.through, rows.swaps.sum(axis=1))
    price += weights.hosts * work.hosted[:, None]
    kept = np.outer(work.kept, rows.many @ weights.memory)
    price += np.minimum(kept, np.outer(work.again, own)) if chosen else kept
    total = float(weights.seconds.sum() + weights.copies.sum()) + weights.hosts
    slack = work.quicker * float(weights.seconds.max(initial=0.0))
    if rows.chained:
        behind = np.concatenate((np.cumsum(weights.seconds[::-1])[::-1][1:], [0.0]))
        price += np.outer(work.leading, behind)
        led = -work.quicker * float(weights.seconds.sum())
    else:
        led = float((weights.seconds * rows.led).sum())
    needed = float((price.min(axis=1) * work.number).sum()) + led - slack - float(weights.memory.sum())
    if total <= 0:
        return float("inf") if needed > 1e-9 * float(weights.memory.sum()) else 0.0
    return needed / total
