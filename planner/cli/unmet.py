"""Why a deadline or a budget cannot be met: what the quickest plan, or the cheapest one in time, needs instead."""

from __future__ import annotations

from planner.basis.errors import NOTHING_FITS, PlanError
from planner.search.answer import Found
from planner.search.cost import HOUR_S, Terms
from planner.search.search import Search

SECONDS = 30.0
"""So long it is searched for what could be met instead."""


def unmet(search: Search) -> PlanError | None:
    """Return the error of a search that found nothing as no plan meets its terms; None where it is not for them.

    The quickest plan is searched for, then the cheapest that is done in time; a search that takes too long says what
    the best plan needs that it has found.
    """
    terms = search.terms
    if terms.deadline_s is None and terms.budget is None:
        return None
    quickest, proven = _best(search, "epoch", terms._replace(deadline_s=None, budget=None))
    if quickest is None:
        return None
    needed = terms.seconds(quickest.step_s, quickest.units)
    if terms.deadline_s is not None and not terms._replace(budget=None).met(quickest.step_s, quickest.units, 0.0):
        least = f"the quickest plan{'' if proven else ' found'}, {quickest.label}, needs at least"
        return _missed(
            search,
            what="no plan meets the deadline",
            why=f"{least} {needed / HOUR_S:.3g} hours, and the deadline is {terms.deadline_s / HOUR_S:.3g} hours",
            fix=f"give at least --deadline {_up(needed / HOUR_S)}, or a cluster with more or faster devices",
            details={"needed_hours": needed / HOUR_S, "deadline_hours": terms.deadline_s / HOUR_S},
        )
    if terms.budget is None:
        return None
    cheapest, proven = _best(search, "cost", terms._replace(budget=None))
    if cheapest is None:
        return None
    cost = terms.money(cheapest.step_s, cheapest.units, cheapest.price_per_hour)
    least = f"the cheapest plan{'' if proven else ' found'}{'' if terms.deadline_s is None else ' that is in time'}"
    return _missed(
        search,
        what="no plan is within the budget",
        why=f"{least}, {cheapest.label}, costs at least {cost:.3g}, and the budget is {terms.budget:.3g}",
        fix=f"give at least --budget {_up(cost)}, or lower prices (--price, --host-price)",
        details={"needed_cost": cost, "budget": terms.budget},
    )


def _missed(search: Search, *, what: str, why: str, fix: str, details: dict[str, float]) -> PlanError:
    """The error of terms that no plan meets."""
    where = f"cluster '{search.cluster.name}', {search.terms.units:,} {search.space.unit}s"
    return PlanError(what=what, where=where, why=why, fix=fix, code=NOTHING_FITS, details=details)


def _best(search: Search, objective: str, terms: Terms) -> tuple[Found | None, bool]:
    """Search the same space with other terms: the plan of the least score, and whether nothing can be better."""
    leaders = (answer := search.like(objective=objective, terms=terms).run(seconds=SECONDS)).leaders
    return min(leaders, key=lambda found: found.score, default=None), answer.complete


def _up(value: float) -> str:
    """A number with three digits that is not below the value.

    >>> _up(0.239123), _up(1234.5)
    ('0.24', '1240')
    """
    for more in (0.0, 0.005, 0.01):
        text = f"{value * (1 + more):.3g}"
        if float(text) >= value:
            break
    return f"{float(text):.10g}"
