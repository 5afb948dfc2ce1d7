"""Time against cost: the quickest plan for every number of hosts that can be rented, without those that others beat."""

from __future__ import annotations

import time
from collections import defaultdict

from planner.search.cost import least_price_per_hour, priced
from planner.search.search import Found, Search, State


def time_against_cost(search: Search, seconds: float = float("inf")) -> tuple[list[Found], bool]:
    """Return the quickest plans that none beats in both time and price, the quickest first; none without prices.

    Hosts are rented whole, so all numbers of devices with one price are one question: its quickest plan costs least.
    Each is searched with what the search has evaluated already, all together for so many seconds; the second value
    says whether that was enough.
    """
    if not priced(search.cluster):
        return [], True
    by_price: dict[float, list[int]] = defaultdict(list)
    for k in search.space.ks:
        by_price[least_price_per_hour(search.cluster, k)].append(k)
    until = time.monotonic() + seconds
    quickest: list[Found] = []
    complete = True
    for ks in by_price.values():
        within = Search(
            search.profile,
            search.cluster,
            search.batch,
            search.space._replace(ks=tuple(ks)),
            terms=search.terms,
            stale=search.stale,
            state=State(question="", done=dict(search.state.done) if search.objective.name == "throughput" else {}),
            able=search.able,
        )
        answer = within.run(seconds=max(0.1, until - time.monotonic()))
        quickest += answer.leaders[:1]
        complete = complete and answer.complete
    front: list[Found] = []
    for one in sorted(quickest, key=lambda f: (f.step_s, f.price_per_hour * f.step_s)):
        if not front or one.price_per_hour * one.step_s < front[-1].price_per_hour * front[-1].step_s:
            front.append(one)
    return front, complete
