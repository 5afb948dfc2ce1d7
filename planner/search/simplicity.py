"""How simple a plan is, and whether two plans are one: what a plan does, whatever it is called."""

from __future__ import annotations

import functools
import hashlib

from planner.orders import schedules, synchronisation
from planner.orders.schedules import Schedule, Shape
from planner.orders.schedules.registry import Updates
from planner.orders.synchronisation import Synchronisation
from planner.placement import savings
from planner.values.plan import Plan

ARRANGED = 64
"""Computes up to which two schedules are compared by their orders; of larger ones the name says it."""


def mechanisms(plan: Plan) -> tuple[str, ...]:
    """Return, in words, what a plan does beyond training on one device with one micro-batch: fewer are simpler."""
    used = [name for name in savings.names() if getattr(plan, name.replace("-", "_"), False)]
    return mechanisms_of(
        schedules.get(plan.schedule),
        synchronisation.get(plan.synchronisation),
        stages=len(plan.stages),
        chunks=plan.chunks,
        tensor=plan.tensor,
        replicas=plan.replicas,
        uneven=plan.uneven,
        share=plan.microbatches // (1 if plan.uneven else plan.replicas),
        used=tuple(used),
    )


def mechanisms_of(
    schedule: Schedule,
    agreed: Synchronisation,
    *,
    stages: int,
    chunks: int,
    tensor: int,
    replicas: int,
    share: int,
    uneven: bool = False,
    used: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Return the mechanisms of a plan of this shape: `share` micro-batches per replica, `used` savings."""
    piped, several = stages > 1, replicas * (schedule.copies if stages > 1 else 1) > 1
    found = {
        "stages": piped,
        "several stages per device": piped and chunks > 1,
        "two copies of every stage": piped and schedule.copies > 1,
        "backward in halves": piped and schedule.splits,
        "ordered by seconds": piped and schedule.measured,
        "no flush": schedule.asynchronous,
        "micro-batches": share > 1,
        "tensors split": tensor > 1,
        "replicas": several,
        "stages with different replicas": uneven,
        "parameter server": bool(agreed.server),
        "nobody waits": agreed.asynchronous,
    }
    sharded = [f"{part} sharded" for part in agreed.shards] if several else []
    return (*(name for name, does in found.items() if does), *sharded, *used)


def identity(plan: Plan) -> tuple[object, ...]:
    """Return what a plan does, equal for two plans that do the same.

    What it is called says nothing. With one stage there is nothing to arrange but micro-batches one after the other;
    schedules that arrange these stages alike are one. Without replicas there is nobody to agree with.
    """
    alone = plan.replicas * schedules.get(plan.schedule).copies == 1
    alone = alone and not synchronisation.get(plan.synchronisation).server
    agreed = () if alone else (plan.synchronisation, plan.servers, plan.bucket_bytes)
    saved = tuple(getattr(plan, name.replace("-", "_"), None) for name in savings.names())
    order = _order(plan.schedule, plan)
    share = plan.microbatches, plan.batch, plan.sequence
    return order, plan.stages, plan.chunks, *share, plan.tensor, plan.threads, agreed, saved


def _order(name: str, plan: Plan) -> str:
    """The first registered schedule that arranges the plan's stages as its own does."""
    schedule = schedules.get(name)
    if schedule.measured or not schedule.trains:
        return name
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    if len(plan.stages) == 1:
        return _first_of_one_stage(schedule.updates)
    if plan.uneven or len(plan.stages) * share > ARRANGED:
        return name
    return _first_alike(name, Shape(plan.depth, share, plan.chunks))


@functools.cache
def _first_of_one_stage(updates: Updates) -> str:
    return next(n for n in schedules.names() if schedules.get(n).updates == updates)


@functools.lru_cache(maxsize=4096)
def _first_alike(name: str, shape: Shape) -> str:
    mine = _digest(name, shape)
    return next(n for n in schedules.names() if n == name or (_alike(n, name, shape) and _digest(n, shape) == mine))


def _alike(one: str, other: str, shape: Shape) -> bool:
    """Whether two schedules keep and place stages alike, so that equal orders are equal plans."""
    a, b = schedules.get(one), schedules.get(other)
    if a.measured or schedules.why_not(a, shape) is not None or (a.placement, a.updates) != (b.placement, b.updates):
        return False
    replicas = shape.replicas or (1,) * shape.stages
    return all(a.versions(s, replicas) == b.versions(s, replicas) for s in range(shape.stages))


@functools.lru_cache(maxsize=4096)
def _digest(name: str, shape: Shape) -> bytes:
    digest = hashlib.sha256()
    for row in schedules.arrange(name, shape):
        digest.update(row.tobytes() + b"|")
    return digest.digest()
