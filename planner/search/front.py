"""Time against cost: of every size of the hire, the best plan, and which of them no other beats in both."""

from __future__ import annotations

from collections import defaultdict

from planner.search.answer import Found
from planner.search.cost import priced
from planner.search.hiring import hires, rents
from planner.search.search import Search


def cost_front(search: Search, *, seconds: float = float("inf")) -> tuple[tuple[Found, ...], bool]:
    """Return the plans that no other beats in both time and money, the cheapest first, and whether that is proved.

    Hosts are rented whole, so a cluster has few prices: for each, and each hire that has it (`planner.search.hiring`),
    one search finds the plan that is best in time, and proves it unless `seconds` for all of them end first. The terms
    of `search` hold for all. A plan's money is
    `search.terms.money(found.step_s, found.units, found.price_per_hour)`. Without prices there is no front.
    """
    if not priced(search.cluster):
        return (), True
    sizes: dict[tuple[float, str], list[int]] = defaultdict(list)
    for k in search.space.ks:
        for hire in hires(search.cluster, k):
            sizes[rents(search.cluster, k, hire), hire].append(k)
    best: list[Found] = []
    proved = True
    for (_, hire), ks in sizes.items():
        of = search.space._replace(ks=tuple(ks), hires=(hire,))
        own = search.like(space=of, objective="epoch")
        answer = own.run(seconds=seconds / len(sizes))
        best += answer.leaders[:1]
        proved = proved and answer.complete
    best.sort(key=lambda found: (found.price_per_hour * found.score, found.score))
    front: list[Found] = []
    for found in best:
        if not front or found.score < front[-1].score:
            front.append(found)
    return tuple(front), proved
