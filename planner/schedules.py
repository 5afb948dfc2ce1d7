"""The schedules: in which order the devices of a pipeline compute. The registry is the only list of them.

A schedule returns compute actions only; what has to be sent, recomputed or reduced is added by `planner.lowering`.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.errors import unknown
from planner.program import BACKWARD, FORWARD, Action, Order, Row

Schedule = Callable[[int, int], Order]
_REGISTRY: dict[str, Schedule] = {}


def schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Register `(stages, microbatches) -> Order` under `name`."""

    def register(function: Schedule) -> Schedule:
        _REGISTRY[name] = function
        return function

    return register


def names() -> tuple[str, ...]:
    """List the registered schedules."""
    return tuple(_REGISTRY)


def get(name: str) -> Schedule:
    """Return a schedule. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("schedule", name, names(), where="plan.schedule", fix="choose one of the known schedules")
    return _REGISTRY[name]


@schedule("naive")
def naive(stages: int, microbatches: int) -> Order:
    """One micro-batch at a time goes forward and back: one device works, the others wait.

    >>> from planner.program import grid
    >>> print(grid(naive(2, 2)))
    0F0 0B0 0F1 0B1
    1F0 1B0 1F1 1B1
    """
    return tuple(
        tuple(Action(s, op, m) for m in range(microbatches) for op in (FORWARD, BACKWARD)) for s in range(stages)
    )


@schedule("gpipe")
def gpipe(stages: int, microbatches: int) -> Order:
    """All forwards, then all backwards; every stage holds M activations (Huang et al., arXiv 1811.06965).

    >>> from planner.program import grid
    >>> print(grid(gpipe(2, 3)))
    0F0 0F1 0F2 0B0 0B1 0B2
    1F0 1F1 1F2 1B0 1B1 1B2
    """
    return tuple(
        tuple(Action(s, op, m) for op in (FORWARD, BACKWARD) for m in range(microbatches)) for s in range(stages)
    )


@schedule("1f1b")
def one_forward_one_backward(stages: int, microbatches: int) -> Order:
    """Warm up, then alternate; stage s holds at most `stages - s` activations (PipeDream-Flush, arXiv 2006.09503).

    >>> from planner.program import grid
    >>> print(grid(one_forward_one_backward(2, 3)))
    0F0 0F1 0B0 0F2 0B1 0B2
    1F0 1B0 1F1 1B1 1F2 1B2
    """

    def row(s: int) -> Row:
        warm_up = min(microbatches, stages - s)
        actions = [Action(s, FORWARD, m) for m in range(warm_up)]
        for m in range(microbatches):
            actions.append(Action(s, BACKWARD, m))
            if m + warm_up < microbatches:
                actions.append(Action(s, FORWARD, m + warm_up))
        return tuple(actions)

    return tuple(row(s) for s in range(stages))
