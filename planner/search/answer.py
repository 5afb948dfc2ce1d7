"""What a search says: what it has found, what became of the rest, how far it is, and what it saves to go on."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from planner.basis.units import percent
from planner.search.choice import Merit
from planner.search.space import Candidate

LEAST_SAID = 0.0005
"""Shares below that print as nothing."""


class Found(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One evaluated candidate, by its `key`; `label` is its plan's, empty where there is none, and `why` says why.

    `lack` is peak over capacity on the worst device, or on the host named `full`: above 1 it does not fit. `exact` is
    off where sharing has not been simulated, `stale` on where gradients are, `late` where the deadline or the budget is
    not met. `mechanisms` and `runnable` are what decides between plans that are as good. `squeezed`:
    memory decided where it is cut. `outlined`: it is too large by a bound, its score and `lack` are bounds, too.
    `batch` are samples per step, `sequence` tokens per sample where lengths are compared; `units` are what a step
    trains on.
    """

    key: str
    family: str
    label: str = ""
    score: float = float("inf")
    step_s: float = 0.0
    peak_bytes: float = 0.0
    lack: float = 0.0
    full: str = ""
    exact: bool = False
    stale: bool = False
    late: bool = False
    mechanisms: int = 0
    runnable: bool = False
    price_per_hour: float = 0.0
    squeezed: bool = False
    batch: int = 1
    sequence: int = 0
    outlined: bool = False
    why: str = ""

    @property
    def units(self) -> int:
        """What a step trains on: samples, or tokens where lengths are compared."""
        return self.batch * max(1, self.sequence)

    @property
    def unit_s(self) -> float:
        """Seconds per sample, or per token: steps of several batches and lengths are compared by it."""
        return self.step_s / self.units

    @property
    def merit(self) -> Merit:
        """What a choice between this and others looks at."""
        return Merit(self.score, self.score, self.score, self.mechanisms, self.runnable, self.peak_bytes)

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return Candidate.parse(self.key).strategy


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a strategy with its savings: how many points, and why they are not the best.

    Of those evaluated some are `fitting`; too large are the others, and those that are so by a bound.
    `example` is the key of the first candidate that is impossible.
    """

    name: str
    points: int = 0
    evaluated: int = 0
    fitting: int = 0
    slower: int = 0
    too_large: int = 0
    impossible: int = 0
    stale: int = 0
    why: str = ""
    example: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a search has found so far: `leaders` begin with the best, then come the others by score.

    The best is the simplest of those that are as good as the quickest; nothing that was left out is better by more than
    the share `margin` (None where nothing is known). `front` are plans that no other beats in
    both time and memory, `nearest` those that lack least memory, `late` those that would come nearest to the deadline
    or the budget.
    """

    objective: str
    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    leaders: tuple[Found, ...]
    front: tuple[Found, ...]
    nearest: tuple[Found, ...]
    late: tuple[Found, ...]
    families: tuple[Family, ...]
    points: int
    evaluated: int
    simulated: int
    seconds: float
    complete: bool
    margin: float | None = None

    @property
    def certainty(self) -> str:
        """Say what is certain about the candidates that were left out."""
        if self.margin is None:
            return "what was left out may be better"
        much = f"is better by more than {percent(self.margin)}" if self.margin >= LEAST_SAID else "can be better"
        return f"nothing that was left out {much}"


class State(msgspec.Struct, kw_only=True):
    """What a search saves, to be taken up again: `question` identifies it, `done` are its evaluations."""

    question: str
    done: dict[str, Found] = {}


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a search is: points seen of all, evaluations per second, seconds that the rest may take at most."""

    seen: int
    points: int
    per_second: float
    remaining_s: float
    best: str
    score: float


def pareto(found: Iterable[Found]) -> list[Found]:
    """Keep the plans that no other beats in both time per sample, or token, and peak memory."""
    front: list[Found] = []
    for one in sorted(found, key=lambda f: (f.unit_s, f.peak_bytes)):
        if not front or one.peak_bytes < front[-1].peak_bytes:
            front.append(one)
    return front
