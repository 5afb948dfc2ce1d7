"""What the best plan is best at. The registry is the only list; of every score less is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.basis.errors import PlanError, unknown
from planner.basis.units import rate, seconds, size
from planner.search.cost import HOUR_S, Amount, Terms, priced
from planner.values.cluster import Cluster


class Reckoned(NamedTuple):
    """What an objective may look at: seconds of a step, peak bytes of the worst device, price per hour of the hosts.

    `units` are what a step trains on: samples, or tokens where lengths are compared. A lower bound of a score has lower
    bounds of them.
    """

    step_s: Amount
    peak_bytes: float
    price_per_hour: float
    units: int


Score = Callable[[Reckoned, Terms], Amount]
Words = Callable[[float, str], str]
"""Says a score; the second argument is the unit that is trained on, as sample."""


class Objective(NamedTuple):
    """A registered objective: its score, from what was reckoned and the terms; its words.

    `priced` objectives need prices; of `timed` ones a plan that takes longer is never better. Where `rises` is on, what
    the words say rises as the score falls.
    """

    name: str
    score: Score
    words: Words
    priced: bool = False
    timed: bool = True
    rises: bool = False


_REGISTRY: dict[str, Objective] = {}


def objective(
    name: str, words: Words, *, priced: bool = False, timed: bool = True, rises: bool = False
) -> Callable[[Score], Score]:
    """Register a score that does not fall when step time, peak or price rise."""

    def register(score: Score) -> Score:
        _REGISTRY[name] = Objective(name, score, words, priced, timed, rises)
        return score

    return register


def names() -> tuple[str, ...]:
    """List the registered objectives."""
    return tuple(_REGISTRY)


def get(name: str) -> Objective:
    """Return an objective. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("objective", name, _REGISTRY, where="--objective", fix="choose one of the known objectives")
    return _REGISTRY[name]


@objective("throughput", lambda score, unit: rate(1 / score, unit), rises=True)
def throughput(of: Reckoned, terms: Terms) -> Amount:
    """Seconds per sample, or per token."""
    return of.step_s / of.units


@objective("epoch", lambda score, unit: f"{seconds(score)} per epoch")
def epoch_time(of: Reckoned, terms: Terms) -> Amount:
    """Seconds per epoch of so many samples, or tokens; the last step of an epoch is a whole one."""
    return terms.seconds(of.step_s, of.units)


@objective("memory", lambda score, unit: f"{size(score)} on the worst device", timed=False)
def memory(of: Reckoned, terms: Terms) -> Amount:
    """Peak bytes of the worst device; between equals the quicker one, by less than a byte."""
    return of.peak_bytes + of.step_s / (1e6 + of.step_s)


@objective("cost", lambda score, unit: f"{score:.3g} per million {unit}s", priced=True)
def cost(of: Reckoned, terms: Terms) -> Amount:
    """Price of a million samples, or tokens; hosts are rented whole."""
    return of.price_per_hour / HOUR_S * of.step_s / of.units * 1e6


def check(chosen: Objective, terms: Terms, cluster: Cluster) -> None:
    """Raise `PlanError` (exit 2) for a question about money on a cluster that states no price."""
    if (chosen.priced or terms.budget is not None) and not priced(cluster):
        raise PlanError(
            what="the cluster's devices and hosts have no price",
            where=f"cluster '{cluster.name}'",
            why=f"{f'the objective {chosen.name}' if chosen.priced else 'a budget'} needs price_per_hour",
            fix="add price_per_hour to the [[hosts]] or [[devices]] of the cluster file, or give --price",
        )
