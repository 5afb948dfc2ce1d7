"""What stands in a search: which plans are certain, the best of them, and what was left out because of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from planner.search.answer import Found
from planner.search.choice import TIE, choose
from planner.search.space import Candidate

LEADERS = 12
"""Plans that are kept beside the best."""


class Spared(NamedTuple):
    """What was left out though it could be a little better: `opened` where what saves more than it is queued."""

    bound: float
    item: Candidate | Found
    opened: bool


class Standings:
    """What a search has found so far, and what that says about the rest."""

    def __init__(self) -> None:
        self.leaders: list[Found] = []
        """Plans whose scores are certain, the quickest first."""
        self.tied: list[Found] = []
        self.choice: Found | None = None
        """The best so far: the simplest of those that are as good as the quickest."""
        self.hopes: list[Found] = []
        """Plans that fit, whose scores may be bounds."""
        self.nearest: list[Found] = []
        """Plans that do not fit, those that lack least first."""
        self.late: list[Found] = []
        """Plans that do not meet the deadline or the budget."""
        self.spared: list[Spared] = []

    @property
    def best(self) -> float:
        """The best score that is certain so far."""
        return self.leaders[0].score if self.leaders else float("inf")

    @property
    def reach(self) -> float:
        """The score from which on nothing is as good as the best that is certain."""
        return self.best * (1 + TIE)

    @property
    def floor(self) -> float:
        """The score from which on nothing is better than the choice by more than what a prediction can tell."""
        return self.choice.score / (1 + TIE) if self.choice else float("inf")

    def hopeless(self, bound: float, item: Candidate | Found) -> bool:
        """Whether a plan with this bound is neither better than the choice, nor as good and simpler.

        Before a plan is made only its mechanisms are known: one with as many is not looked at for its memory.
        """
        if bound == float("inf") or self.choice is None:
            return bound == float("inf")
        if bound >= self.reach or bound < self.floor:
            return bound >= self.reach
        if isinstance(item, Candidate):
            return item.mechanisms >= self.choice.mechanisms
        return (item.mechanisms, False, item.peak_bytes) >= self.choice.merit.simplicity

    def spare(self, bound: float, item: Candidate | Found, *, opened: bool = True) -> None:
        """Leave out what is hopeless now; it is taken up where another choice makes it worth a look."""
        if bound < self.reach:
            self.spared.append(Spared(bound, item, opened))

    def taken_up(self) -> list[Spared]:
        """Return what was left out and is not hopeless any more, as the choice is another one."""
        waiting, self.spared = self.spared, []
        hopeful = []
        for one in waiting:
            if self.hopeless(one.bound, one.item):
                self.spare(one.bound, one.item, opened=one.opened)
            else:
                hopeful.append(one)
        return hopeful

    def margin(self, frontier: float) -> float | None:
        """By what share something that was left out could be better than the choice, at most; None if unknown.

        `frontier` is the least score of what has not been looked at.
        """
        least = min((frontier, *(one.bound for one in self.spared)))
        return max(0.0, self.choice.score / least - 1) if self.choice and least > 0 else None

    def certain(self, found: Found) -> None:
        """Note a plan that fits, whose score is certain."""
        self.leaders = _least(self.leaders, found, lambda f: (f.score, f.key))
        self.tied = [f for f in (*self.tied, found) if f.score <= self.reach]
        self.choice = choose([(f.merit, f) for f in self.tied]) if self.tied else None

    def hoped(self, found: Found) -> None:
        """Note a plan that fits, whose score may be a bound."""
        self.hopes = _least(self.hopes, found, lambda f: (f.score, f.key))

    def lacking(self, found: Found) -> None:
        """Note a plan that does not fit."""
        self.nearest = _least(self.nearest, found, lambda f: (f.lack, f.score))

    def too_late(self, found: Found) -> None:
        """Note a plan that does not meet the deadline or the budget."""
        self.late = _least(self.late, found, lambda f: (f.unit_s, f.key))

    def ranked(self, done: dict[str, Found]) -> tuple[Found, ...]:
        """Return the choice, then the others by score, as they are known to be; late ones are left out."""
        known = {f.key: done[f.key] for f in (*self.leaders, *self.hopes)}
        ranked = _ranked(found for found in known.values() if not found.late)
        chosen = self.choice
        return tuple(ranked if chosen is None else [chosen, *(f for f in ranked if f.key != chosen.key)])


def _ranked(found: Iterable[Found]) -> list[Found]:
    """Best first; of equals, one whose score is certain before one whose score is a bound."""
    return sorted(found, key=lambda f: (f.score, not f.exact, f.key))[:LEADERS]


def _least(kept: list[Found], new: Found, key: Callable[[Found], tuple[object, ...]]) -> list[Found]:
    return sorted([*kept, new], key=key)[:LEADERS]
