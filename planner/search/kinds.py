"""The best of each kind of what a search has evaluated, each by its own time where that is quick to find."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from planner.search.answer import Found
from planner.search.search import Search
from planner.search.simplicity import identity
from planner.values.plan import actions

QUICK_ACTIONS = 20_000
"""Programs up to so many actions go through SimPy while somebody waits for a sentence or a table."""
LOOKS, LOOKS_S = 12, 10.0
"""So many plans are put through SimPy, and for so long, so that a figure stands in a sentence and not a bound."""


def family(found: Found) -> object:
    """Return what a person decides about: the strategy with its savings, the batch, the length, not M or replicas."""
    return found.family, found.batch, found.sequence


def strategy(found: Found) -> object:
    """Return the strategy alone."""
    return found.strategy


def decision(search: Search, found: Found) -> object:
    """Return what a plan does, equal for two names of one plan: of a plan without a pipeline M is no difference."""
    plan = search.plan(found)
    return identity(msgspec.structs.replace(plan, microbatches=plan.replicas) if len(plan.stages) == 1 else plan)


def settled(search: Search, found: Found) -> Found:
    """Return the same plan with its own time instead of a bound, where that is quick to find."""
    plan = search.plan(found)
    found = msgspec.structs.replace(found, runnable=found.runnable or search.able(plan))
    return found if found.exact or actions(plan) > QUICK_ACTIONS else search.exact(found)


def first_of_each(search: Search, found: Iterable[Found], kind: Callable[[Found], object], most: int) -> list[Found]:
    """Return the best of each kind, best first, at `most` so many.

    What is behind the first of a kind may be better than it once what they share is simulated; so the least bound is
    always replaced by its plan's own time, until the least is no bound, or enough has been simulated.
    """
    waiting = [(f.score, not f.exact, f.key, f) for f in found]
    heapq.heapify(waiting)
    first: dict[object, Found] = {}
    looks, ends = 0, time.monotonic() + LOOKS_S
    while waiting and len(first) < most:
        *_, one = heapq.heappop(waiting)
        if kind(one) in first:
            continue
        if not one.exact and looks < LOOKS and time.monotonic() < ends:
            looks += 1
            exact = settled(search, one)
            if exact.exact:
                heapq.heappush(waiting, (exact.score, False, exact.key, exact))
                continue
        first[kind(one)] = one
    return list(first.values())


def look_at_others(search: Search, most: int, seconds: float) -> None:
    """Find the best plan of as many strategies as are to be shown, the most promising first, within `seconds`.

    A search ends when nothing can be better than the best; what it has then seen of other strategies may be nothing at
    all, and a person wants to know how far behind they are. What is found is kept with the search.
    """
    ends = time.monotonic() + seconds
    _, firsts = np.unique(search.order.block, return_index=True)
    promising = dict.fromkeys(search.blocks[search.order.block[i]].point.strategy for i in np.sort(firsts))
    for name in promising:
        seen = {found.strategy for found in contenders(search)}
        left = ends - time.monotonic()
        if left <= 0 or len(seen) >= most:
            return
        if name not in seen:
            own = search.like(state=search.state, among=(b for b in search.blocks if b.point.strategy == name))
            own.same = search.same  # two names of one plan are one, whichever search has seen it first
            own.run(seconds=left)


def contenders(search: Search) -> list[Found]:
    """Return all that have been evaluated, fit, and may be the best."""
    return [
        f
        for f in search.state.done.values()
        if f.label and f.lack <= 1 and not f.late and (search.stale or not f.stale)
    ]
