"""What would be the best if the cluster were another: a search of its own there, and sentences about its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from planner.basis.errors import PlanError
from planner.search.answer import Found
from planner.search.choice import TIE
from planner.search.kinds import decision, settled
from planner.search.search import Search
from planner.search.space import Candidate
from planner.simulate.injection import with_bandwidth, with_memory
from planner.values.cluster import Cluster

CHANGED_S = 1.5
"""Seconds for the search on one changed cluster, beside what the plans take that it begins with."""
FACTORS = (1.5, 2.0, 4.0, 10.0)
"""How much faster or slower links are tried to be."""
LARGER = (2.0, 10.0)
"""How many times the memory is tried."""
BEGUN = 8
"""Plans that are good here with which a search on a changed cluster begins, beside the best."""


class There(NamedTuple):
    """What a search on a changed cluster has found.

    `best` is the simplest of those that are as good as the quickest, None where nothing has been found. `mine` is what
    is the best here, with its score there, None where it is no plan there or does not fit. `ties`: it is as good there
    as the quickest. `same`: `best` does what `mine` does. `looked` counts the plans that were evaluated. `sure` is on
    where nothing that was left out can be better by more than a tie.
    """

    best: Found | None
    mine: Found | None
    ties: bool
    same: bool
    looked: int
    sure: bool


def there(search: Search, best: Found, cluster: Cluster, known: Iterable[Found], *, seconds: float) -> There:
    """Search on another cluster for so many seconds, beginning with what is the best here and what else is `known`."""
    own = search.like(cluster=cluster)
    own.begin_with(Candidate.parse(found.key) for found in (best, *known))
    answer = own.run(seconds=seconds)
    looked = sum(1 for found in own.state.done.values() if found.label)
    if not answer.leaders:
        return There(None, None, False, False, looked, answer.complete)
    chosen, mine = answer.leaders[0], _on(own, best)
    quickest = min(found.score for found in answer.leaders if found.exact == chosen.exact)
    return There(
        best=chosen,
        mine=mine,
        ties=mine is not None and mine.exact and mine.score <= quickest * (1 + TIE),
        same=chosen.key == best.key or (mine is not None and decision(own, chosen) == decision(own, mine)),
        looked=looked,
        sure=answer.complete and chosen.exact,
    )


def _on(own: Search, best: Found) -> Found | None:
    """The plan with its own time on another search's cluster, or None where it is none or does not fit."""
    found = own.state.done.get(best.key)
    if found is None or not found.label or found.lack > 1 or found.late:
        return None
    try:
        return settled(own, found)
    except PlanError:
        return None


def with_other_links(search: Search, best: Found, known: Iterable[Found], *, seconds: float = CHANGED_S) -> list[str]:
    """Say after which change of all links' bandwidth a plan of another strategy is the best, slower ones and faster."""
    first = _good(best, known)
    said = []
    for change, faster in (("slower", False), ("faster", True)):
        changes = [
            (f"With links {factor:g} times {change}", with_bandwidth(search.cluster, factor if faster else 1 / factor))
            for factor in FACTORS
        ]
        said += _first_change(search, best, changes, first, lambda one: one.strategy != best.strategy, seconds)
    return said


def with_more_memory(
    search: Search, best: Found, known: Iterable[Found], larger: Iterable[Found], *, seconds: float = CHANGED_S
) -> list[str]:
    """Say with how much more memory another plan is the best; with what the nearest of the `larger` ones lacks, too."""
    larger = sorted(larger, key=lambda found: found.lack)
    exactly = [-(-found.lack * 1000 // 1) / 1000 for found in larger[:1]]  # as much as is said, and no less
    changes = [
        (
            f"With {factor:g} times the memory" if factor >= 2 else f"With {100 * (factor - 1):.1f} % more memory",
            with_memory(search.cluster, factor),
        )
        for factor in sorted({*exactly, *LARGER})
    ]
    first = [*_good(best, known), *larger[:BEGUN]]
    return _first_change(search, best, changes, first, lambda one: True, seconds)


def _good(best: Found, known: Iterable[Found]) -> list[Found]:
    """The best of each strategy of those that fit, by what is known here."""
    first: dict[str, Found] = {}
    for found in sorted((f for f in known if f.lack <= 1), key=lambda f: (f.score, f.key)):
        if found.key != best.key:
            first.setdefault(found.strategy, found)
    return list(first.values())[:BEGUN]


def _first_change(
    search: Search,
    best: Found,
    changes: Iterable[tuple[str, Cluster]],
    known: list[Found],
    counts: Callable[[Found], bool],
    seconds: float,
) -> list[str]:
    """Say the first change after which the answer is another that `counts`; else what the last change does."""
    if search.tally.points == 1:
        return []
    said, named = "", None
    for change, cluster in changes:
        try:
            found = there(search, best, cluster, known, seconds=seconds)
        except PlanError:
            continue
        if found.best is None:
            if found.sure:
                return [f"{change}, no plan would do what is asked."]
            continue
        if found.same:
            still = "it would still win" if found.sure else f"it would still be the best of {found.looked:,} looked at"
            said, named = f"{change}, {still}: {_figure(search, found)}.", None
            continue
        said, named = f"{change}, {_answer(search, best, found)}.", found.best
        if counts(found.best):
            break
    if named is not None:
        _keep(search, named)
    return [said] if said else []


def _answer(search: Search, best: Found, found: There) -> str:
    """Say which plan is the answer on a changed cluster, and what the one that is the best here has there."""
    chosen, mine = found.best, found.mine
    assert chosen is not None, "there is an answer"
    tie = mine is not None and found.ties
    verb = ("would be chosen" if tie else "would win") if found.sure else "would be the best"
    among = "" if found.sure else f"of {found.looked:,} plans looked at "
    text = f"{among}{chosen.label} {verb}: {_figure(search, found)}"
    if mine is None:
        return f"{text}; {best.label} could not be used"
    if not mine.exact:
        return text
    if tie:
        decider = chosen.merit.decider(mine.merit)
        return f"{text}, as good as {best.label} with {search.scoring.words(mine.score)}, a tie that goes to {decider}"
    return f"{text}, against {search.scoring.words(mine.score)} of {best.label}"


def _figure(search: Search, found: There) -> str:
    """Say the score on a changed cluster: what the best there has at least, where others may be better than it."""
    chosen = found.best
    assert chosen is not None, "there is an answer"
    if found.sure:
        return search.scoring.words(chosen.score)
    bound = "at least" if search.objective.rises == chosen.exact else "at most"
    unshared = "" if chosen.exact else ", what its devices share left out"
    return f"{bound} {search.scoring.words(chosen.score)}{unshared}"


def _keep(search: Search, found: Found) -> None:
    """Evaluate a plan that a sentence names on the search's own cluster, so that it can be asked about, too."""
    if found.key not in search.state.done:
        own = search.like(state=search.state, among=())
        here = own.looked_at(Candidate.parse(found.key))
        if here is not None:
            search.state.done[found.key] = here
