"""How long a search may take, said before it starts."""

from __future__ import annotations

import time
from typing import NamedTuple

from planner.basis.errors import PlanError
from planner.basis.units import seconds
from planner.costs.placed import Placed
from planner.search.search import Search
from planner.search.space import Candidate, make
from planner.simulate.evaluate import evaluate

LOOKED_AT = 300
"""Candidates that a proof takes, about: 216 and 322 on 1,024 devices in benchmarks/how_fast_is_the_simulation."""
LONG_S = 10.0
"""Searches that may take longer are spoken of before they start."""
POINTS = 20_000
"""Spaces of fewer candidates are searched in seconds."""


class Outlook(NamedTuple):
    """Candidates, the rows and micro-batches of their longest program, and seconds to look at one of them, measured."""

    points: int
    rows: int
    microbatches: int
    each_s: float

    @property
    def long(self) -> bool:
        """Whether this is worth saying."""
        return self.each_s * LOOKED_AT > LONG_S

    def __str__(self) -> str:
        return (
            f"{self.points:,} candidates, whose programs have up to {self.rows:,} rows with {self.microbatches:,} "
            f"micro-batches per replica; one takes {seconds(self.each_s)}, and a proof looks at hundreds: about "
            f"{seconds(self.each_s * LOOKED_AT)}. It can be stopped, and --seconds limits it; the same command goes on"
        )


def outlook(search: Search) -> Outlook | None:
    """Look at the most promising points to see what one takes; None where the space is small, or nothing can be made.

    The first of them is not counted: it compiles what the others use.
    """
    if search.tally.points < POINTS:
        return None
    points = (block.point._replace(m=max(block.ms)) for block in search.blocks)
    rows, microbatches = max((one.depth, one.m // one.replica_count) for one in points)
    taken = []
    for number, m in zip(search.order.block[:TRIED].tolist(), search.order.m[:TRIED].tolist(), strict=True):
        block = search.blocks[number]
        candidate = next(block.at(block.ms[m], ((),)))
        begin = time.perf_counter()
        if _looked(search, candidate):
            taken.append(time.perf_counter() - begin)
        if len(taken) > 2:
            break
    return Outlook(search.tally.points, rows, microbatches, min(taken[1:])) if len(taken) > 1 else None


TRIED = 8
"""Points that are tried at most: some are no plans."""


def _looked(search: Search, candidate: Candidate) -> bool:
    """Make a candidate's plan and evaluate it; return whether there is one."""
    try:
        profile = search.profile_of(candidate)
        evaluate(Placed(profile, make(candidate, profile, search.cluster), search.cluster))
    except PlanError:
        return False
    return True
