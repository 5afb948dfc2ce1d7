"""Which savings can make no plan quicker, so that one that is quick enough with fewer says enough."""

from __future__ import annotations

from collections.abc import Iterable

from planner.orders import schedules
from planner.placement import savings, strategies
from planner.search.answer import Found
from planner.search.space import Candidate
from planner.values.cluster import Cluster
from planner.values.profile import Profile


def dominated(
    candidate: Candidate,
    known: Iterable[tuple[frozenset[str], Found]],
    slowing: frozenset[str],
    reach: float,
    *,
    stale: bool,
) -> bool:
    """Return whether the same plan with fewer savings (`known`) says enough: it fits, or is too slow already.

    Savings that only add work or waits can make a plan smaller, never quicker. But what is repeated need not be
    swapped; of a plan without flush the steady state is a mean over few steps, which moves by more than some
    savings cost; where memory decided about the cut, one that saves is cut better; and a schedule that orders by
    seconds arranges what it repeats differently.
    """
    if orders_by_seconds(candidate):
        return False
    mine = frozenset(candidate.savings)
    return any(
        less < mine
        and mine - less <= slowing
        and not (
            any(savings.get(name).swaps for name in less) and any(savings.get(name).repeats for name in mine - less)
        )
        and (found.lack <= 1 or found.score >= reach)
        and not (found.stale and stale)
        and not found.squeezed
        for less, found in known
    )


def by_least(savings: tuple[tuple[str, ...], ...]) -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the sets of savings that contain no other of them, each with those tried after it: more than it, once."""
    least = [own for own in savings if not any(set(other) < set(own) for other in savings)]
    first = {own: next(one for one in least if set(one) <= set(own)) for own in savings}
    return {one: tuple(own for own in savings if first[own] == one and own != one) for one in least}


def orders_by_seconds(candidate: Candidate) -> bool:
    """Whether a candidate's schedule orders by seconds: then more work may come out quicker, if by little."""
    return schedules.get(strategies.get(candidate.strategy).schedule).measured


def slowing(profile: Profile, cluster: Cluster) -> frozenset[str]:
    """Return the savings that cannot make any plan quicker here.

    All add actions or waits; only an update on the host could be quicker than the device's own, where some layer's is.
    """
    rate = max((host.memory_bytes_per_s for host in cluster.hosts), default=0.0)
    speed = min((device.speed for device in cluster.devices), default=1.0)
    every = frozenset(savings.names())
    for layer in profile.counted_once().layers:
        moved = 2 * layer.parameter_bytes + layer.gradient_bytes + 2 * layer.optimizer_bytes
        own = max(times.optimizer.median_s for times in layer.times) / speed
        if own > moved / rate:
            return frozenset(name for name in every if not savings.get(name).states_on_host)
    return every
