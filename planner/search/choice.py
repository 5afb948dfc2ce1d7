"""Which of several good plans is the best: what a prediction cannot tell apart is a tie, which the simplest wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from planner.search.simplicity import mechanisms
from planner.values.outcome import Outcome

TIE = 0.02
"""Relative difference of two predictions up to which they are a tie. Two plans of one profile share its costs, so they
differ by the error of the schedule and communication model alone: the replay column of
benchmarks/how_true_is_the_prediction, whose absolute values have a median of 1.7 % and reach 3 %."""

T = TypeVar("T")


class Merit(NamedTuple):
    """What a choice looks at. Of scores less is better; `low` and `high` are those with all durations low, or high.

    `mechanisms` counts what the plan does beyond the simplest one (`planner.search.simplicity`).
    """

    score: float
    low: float
    high: float
    mechanisms: int
    runnable: bool
    peak_bytes: float

    @property
    def simplicity(self) -> tuple[int, bool, float]:
        """What decides a tie, the least first: fewest mechanisms, one that can be run, least memory."""
        return self.mechanisms, not self.runnable, self.peak_bytes

    def decider(self, other: Merit) -> str:
        """Say in what this wins a tie against another, where it does."""
        if self.mechanisms != other.mechanisms:
            return "the simpler plan"
        if self.runnable != other.runnable:
            return "the plan that can be run here"
        return "the plan with less memory" if self.peak_bytes != other.peak_bytes else "the quicker plan"

    def ties(self, best: Merit) -> bool:
        """Whether this is within the uncertainty of a plan with the best score.

        It is where the scores differ by `TIE` at most, or where their order is another when all durations are low, or
        when all are high: the durations of two plans of one profile are low or high together.
        """
        return self.score <= best.score * (1 + TIE) or self.low < best.low or self.high < best.high


def merit(outcome: Outcome, *, runnable: bool) -> Merit:
    """Return what a choice by throughput looks at, in seconds per sample, or per token of it."""
    low, high = (seconds / outcome.plan.units for seconds in outcome.interval_s)
    return Merit(
        score=outcome.step_s / outcome.plan.units,
        low=low,
        high=high,
        mechanisms=len(mechanisms(outcome.plan)),
        runnable=runnable,
        peak_bytes=outcome.peak_bytes,
    )


def choose(rivals: Sequence[tuple[Merit, T]]) -> T:
    """Return the best: the simplest of those that tie with the one of the best score; of equals the better score."""
    least = min((own for own, _ in rivals), key=lambda own: own.score)
    tied = [(own, rival) for own, rival in rivals if own.ties(least)]
    return min(tied, key=lambda pair: (*pair[0].simplicity, pair[0].score))[1]
