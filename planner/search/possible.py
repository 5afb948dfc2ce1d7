"""Why strategies give no plan: one reason for all that share it, and the nearest question that has an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from planner.basis.errors import PlanError
from planner.placement.question import Question
from planner.placement.strategies import Strategy

TRIALS = 24
"""Other numbers of micro-batches, or of devices, that are tried."""


NUMBERS = 2**16
"""Up to so many micro-batches are thought of."""


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """Strategies that give no plan here, why, and what would make the first of them possible ("": nothing found)."""

    strategies: tuple[str, ...]
    why: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}" if self.fix else self.reason

    @property
    def reason(self) -> str:
        """Who gives no plan, and why."""
        count = len(self.strategies)
        named = ", ".join(self.strategies) if count <= 4 else f"{', '.join(self.strategies[:3])} and {count - 3} more"
        return f"{f'{count} strategies: ' if count > 1 else ''}{named}: {self.why}"


def reason(error: PlanError) -> str:
    """Return an error's reason without the name of what it happened to."""
    return error.why if error.what.endswith("cannot be arranged") else f"{error.what}: {error.why}"


def grouped(found: Iterable[tuple[str, str]]) -> list[tuple[tuple[str, ...], str]]:
    """Put names with the same reason together, in the order in which they come.

    >>> grouped([("a", "too small"), ("b", "no link"), ("c", "too small")])
    [(('a', 'c'), 'too small'), (('b',), 'no link')]
    """
    by_reason: dict[str, dict[str, None]] = {}
    for name, why in found:
        by_reason.setdefault(why, {})[name] = None
    return [(tuple(names), why) for why, names in by_reason.items()]


def rejections(question: Question, failed: Sequence[tuple[Strategy, PlanError]]) -> tuple[Rejected, ...]:
    """Return one entry per reason, each with what makes its first strategy possible."""
    entries = {entry.name: (entry, error) for entry, error in reversed(failed)}
    found = []
    for names, why in grouped((entry.name, reason(error)) for entry, error in failed):
        entry, error = entries[names[0]]
        found.append(Rejected(strategies=names, why=why, fix=remedy(question, entry) or _said(error)))
    return tuple(found)


def _said(error: PlanError) -> str:
    """What the error itself says how to mend it, where that is no command: numbers have been tried already."""
    return "" if error.fix.startswith("plan ") else error.fix


def remedy(question: Question, entry: Strategy) -> str:
    """Return the nearest number of micro-batches, or else of replicas, tensor ways or devices, that gives a plan."""
    if _possible(question, entry):
        return ""  # it is something else that cannot be
    most = min(question.batch // question.profile.least, NUMBERS)
    divisors = [m for m in range(1, most + 1) if question.batch % m == 0 and m != question.m]
    for m in sorted(divisors, key=lambda m: (abs(m - question.m), m))[:TRIALS]:
        if _possible(question._replace(m=m), entry):
            return f"--m {m} makes it possible"
    for replicas in _near(question.replicas, question.k):
        if _possible(question._replace(replicas=replicas), entry):
            return f"--replicas {replicas} makes it possible"
    for tensor in _near(question.tensor, question.k):
        if _possible(question._replace(tensor=tensor), entry):
            return f"--tensor {tensor} makes it possible"
    cluster = question.cluster
    count = max(cluster.hosts[0].cores, question.k) if cluster.elastic else len(cluster.devices)
    # One device is no answer to how several could be used.
    others = sorted((k for k in range(2, count + 1) if k != question.k), key=lambda k: (abs(k - question.k), k))
    for k in others[:TRIALS]:
        if _possible(question._replace(k=k), entry):
            return f"--k {k} makes it possible"
    return ""


def _near(asked: int, most: int) -> list[int]:
    """Other numbers up to the most, the nearest first; none where nothing was asked."""
    others = (value for value in range(1, most + 1) if value != asked and asked > 1)
    return sorted(others, key=lambda value: (abs(value - asked), value))[:TRIALS]


def _possible(question: Question, entry: Strategy) -> bool:
    try:
        entry.spread(question)
    except PlanError:
        return False
    return True
