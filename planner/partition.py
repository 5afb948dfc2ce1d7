"""Where to cut the layers into stages. It knows weights only: seconds, or anything else that adds up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def equal(layers: int, stages: int) -> tuple[range, ...]:
    """Cut so that the numbers of layers differ by at most one.

    >>> equal(5, 2)
    (range(0, 2), range(2, 5))
    """
    cuts = [i * layers // stages for i in range(stages + 1)]
    return tuple(range(a, b) for a, b in pairwise(cuts))


def balanced(weights: Sequence[float], stages: int) -> tuple[range, ...]:
    """Cut so that the heaviest stage is as light as any contiguous cut allows, exactly.

    Dynamic programming over (stages, layers), O(stages x layers^2); of equal solutions the one whose earlier stages
    are lightest. Every stage gets at least one layer.

    >>> balanced([1, 1, 1, 5, 1], 2)
    (range(0, 3), range(3, 5))
    """
    layers = len(weights)
    before = [0.0, *accumulate(weights)]
    best = [[float("inf")] * (layers + 1) for _ in range(stages + 1)]
    start = [[0] * (layers + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, layers + 1):
            for cut in range(stage - 1, end):
                heaviest = max(best[stage - 1][cut], before[end] - before[cut])
                if heaviest < best[stage][end]:
                    best[stage][end], start[stage][end] = heaviest, cut
    ranges = []
    end = layers
    for stage in range(stages, 0, -1):
        ranges.append(range(start[stage][end], end))
        end = start[stage][end]
    return tuple(reversed(ranges))
