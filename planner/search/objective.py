"""What the best plan is best at. The registry is the only list; of every score less is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from planner.basis.errors import PlanError, unknown
from planner.basis.units import rate, seconds, size
from planner.values.cluster import Cluster


class Reckoned(NamedTuple):
    """What an objective may look at: step seconds (or a lower bound), peak bytes of the worst device (or 0), K."""

    step_s: float
    peak_bytes: float
    k: int
    batch: int


Score = Callable[[Reckoned, Cluster, int], float]


class Objective(NamedTuple):
    """A registered objective: its score, from what was reckoned, the cluster and an epoch's samples; and its words."""

    name: str
    score: Score
    words: Callable[[float], str]


_REGISTRY: dict[str, Objective] = {}


def objective(name: str, words: Callable[[float], str]) -> Callable[[Score], Score]:
    """Register a score that does not fall when step time, peak or K rise."""

    def register(score: Score) -> Score:
        _REGISTRY[name] = Objective(name, score, words)
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


@objective("throughput", lambda score: rate(1 / score))
def throughput(of: Reckoned, cluster: Cluster, epoch: int) -> float:
    """Seconds per sample."""
    return of.step_s / of.batch


@objective("epoch", lambda score: f"{seconds(score)} per epoch")
def epoch_time(of: Reckoned, cluster: Cluster, epoch: int) -> float:
    """Seconds per epoch of so many samples; the last step of an epoch is a whole one."""
    return of.step_s * -(-epoch // of.batch)


@objective("memory", lambda score: f"{size(score)} on the worst device")
def memory(of: Reckoned, cluster: Cluster, epoch: int) -> float:
    """Peak bytes of the worst device; between equals the quicker one, by less than a byte."""
    return of.peak_bytes + of.step_s / (1e6 + of.step_s)


@objective("cost", lambda score: f"{score:.3g} per million samples")
def cost(of: Reckoned, cluster: Cluster, epoch: int) -> float:
    """Price of a million samples, from the devices' price per hour.

    Raises `PlanError` (exit 2) where the cluster states none.
    """
    price = sum(device.price_per_hour for device in cluster.take(of.k).devices)
    if price <= 0:
        raise PlanError(
            what="the cluster's devices have no price",
            where=f"cluster '{cluster.name}'",
            why="the objective cost needs price_per_hour",
            fix="add price_per_hour to the [[devices]] of the cluster file, or choose --objective throughput",
        )
    return price / 3600 * of.step_s / of.batch * 1e6
