"""In which order a search opens the points of its space: by the least score that any plan at them can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.search.bounds import Bounds
from planner.search.space import Block, Candidate

Floats = npt.NDArray[np.float64]

TooLarge = list[tuple[float, int, int]]
"""Points of which no plan fits: how much they lack at least, their block and which of its M, the least last."""


class Order(NamedTuple):
    """Points by the least score that they can have: which block they are in, and which of its M they have."""

    scores: Floats
    block: npt.NDArray[np.int32]
    m: npt.NDArray[np.int32]


def ordered(
    blocks: Sequence[Block],
    bounds: Callable[[Candidate], Bounds],
    score: Callable[[Block, Floats], Floats],
    *,
    on_host: bool,
    stale: bool,
) -> tuple[Order, TooLarge]:
    """Order the points of all blocks, and tell which are too large; of overlapping steps only if they may be `stale`.

    `bounds` gives those of a point's length and devices, `score` is what seconds come to that no plan of a block can
    beat. `on_host`: some plans keep the optimizer's state on their hosts.
    """
    scores, where, which = [np.zeros(0)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    large: TooLarge = []
    for number, block in enumerate(blocks):
        if block.point.asynchronous and not stale:
            continue
        own = bounds(block.point)
        lack = min(own.lack(block, agreed, on_host=on_host) for agreed in block.agreed)
        if lack > 1:
            large += [(lack, number, m) for m in range(len(block.ms))]
            continue
        scores.append(score(block, own.of(block)))
        where.append(np.full(len(block.ms), number, np.int32))
        which.append(np.arange(len(block.ms), dtype=np.int32))
    every = np.concatenate(scores)
    order = np.argsort(every, kind="stable")
    return Order(every[order], np.concatenate(where)[order], np.concatenate(which)[order]), sorted(large, reverse=True)
