"""From a plan to a program: small passes over rows of actions. Authors of a schedule never write communication."""

from __future__ import annotations

import numpy as np

from planner.orders import codes, schedules, synchronisation
from planner.orders.codes import Codes, Order
from planner.orders.operations import OPTIMIZER, REDUCTIONS, UNSHARD_BACKWARD, UNSHARD_FORWARD
from planner.orders.schedules import Shape
from planner.programs import extent
from planner.programs.messages import messages
from planner.programs.program import Program
from planner.programs.proof import InTurn, prove
from planner.programs.savings import offload, recompute
from planner.programs.updates import (
    advance,
    frame,
    gather,
    load,
    loads,
    norm,
    optimize,
    reduce_beside,
    send_first,
    tie,
)
from planner.values.plan import Plan, actions, asynchronous, windows

ONCE = 1 << 32
"""Between two updates there are all micro-batches of a step."""


def lower(plan: Plan, *, in_turn: InTurn = "per pair") -> Program:
    """Unroll a plan into what every device does in one step, and prove it.

    A plan without flush is unrolled over `windows(plan)` steps. `in_turn` says which messages the backend does in the
    order in which they are posted. Raises `PlanError` when the schedule cannot arrange
    the plan's pipeline, or when the result would not be a step that ends.
    """
    program = unroll(plan)
    backward = schedules.get(plan.schedule).trains
    prove(program, plan.microbatches * windows(plan), backward=backward, in_turn=in_turn)
    return program


def unroll(plan: Plan, *, replicas: int | None = None, steps: int = 0) -> Program:
    """Lower a plan without the proof: for a search, whose interpreter finds a wait without end by itself.

    Only the first `replicas` of the pipeline are unrolled, where they are all alike; all by default. A plan without
    flush is unrolled over so many `steps`, `windows(plan)` by default. Raises
    `PlanError` (exit 2) where that is more than fits into this machine's memory.
    """
    steps = steps or windows(plan)
    every = 1 if plan.uneven or not replicas else plan.replicas // replicas
    extent.check(actions(plan) // every, str(plan), plan.microbatches)
    schedule, agreed = schedules.get(plan.schedule), synchronisation.get(plan.synchronisation)
    share = _between_updates(plan)
    rows = messages(compute_order(plan, replicas, steps), plan.edges, taking_turns(plan))
    agreeing = _agreeing(plan)[: len(rows)]
    if schedule.trains:
        rows = recompute(rows, _forgetful(plan))
        if any(agreeing):
            rows = tuple(
                send_first(agreed.add(row, share)) if several else row
                for several, row in zip(agreeing, rows, strict=True)
            )
            if _beside(plan):
                rows = tuple(
                    reduce_beside(row) if several else row for several, row in zip(agreeing, rows, strict=True)
                )
            rows = tuple(advance(row, UNSHARD_FORWARD, UNSHARD_BACKWARD) for row in rows)
    if plan.offload and schedule.trains:
        rows = tuple(offload(row) for row in rows)
    if schedule.trains and plan.tied:
        rows = tuple(tie(row, plan.tied) for row in rows)
    updates = schedule.trains and not agreed.server
    if updates and plan.norm:
        rows = tuple(
            norm(row, held, agreeing=plan.agrees_on_norm) for row, held in zip(rows, plan.stages_of, strict=False)
        )
    gathers = [agreed.gathers and several for several in agreeing]
    if updates and share < ONCE:
        rows = tuple(optimize(row, share) for row in rows)
        if plan.uneven:
            turns = plan.microbatches * steps
            rows = tuple(_whole_turns(plan, row, turns, *held) for row, held in zip(rows, plan.stages_of, strict=True))
        rows = tuple(gather(row) if gathered else row for gathered, row in zip(gathers, rows, strict=True))
    last = (OPTIMIZER,) if updates and share >= ONCE else ()
    roles = plan.roles[: len(rows)]
    behind = [(*last, UNSHARD_FORWARD) if last and gathered else last for gathered in gathers]
    heads = loads(roles, plan.edges)
    if steps > 1 or asynchronous(plan):
        own = plan.microbatches // plan.pipelines
        rows = tuple(load(row, stages, own, steps) for row, stages in zip(rows, heads, strict=True))
        heads = [()] * len(rows)
    return Program(frame(rows, roles, heads, behind), plan.edges, roles)


def _beside(plan: Plan) -> bool:
    """Whether replicas reduce each micro-batch's gradients beside computing."""
    served = synchronisation.get(plan.synchronisation).server
    return schedules.get(plan.schedule).updates == "microbatch" and not served


def taking_turns(plan: Plan) -> tuple[int, ...]:
    """Return each stage's replicas where they take micro-batches in turn and reduce them beside computing, else none.

    They then wait for each other's backwards, which the order of messages has to know (`messages`). Replicas of whole
    pipelines go in step.
    """
    return plan.turns if plan.uneven and _beside(plan) else ()


def _whole_turns(plan: Plan, row: Codes, microbatches: int, stage: int) -> Codes:
    """Leave out the reductions behind the last turn that all of a stage's replicas take: some would wait for ever.

    Replicas take micro-batches in turn (1F1B-RR), and how many are unrolled need not be a multiple of theirs. The
    updates behind these reductions stay, and use the gradients up.
    """
    turns = microbatches // len(plan.holders[stage])
    return np.delete(row, np.flatnonzero(codes.has(row, *REDUCTIONS))[turns:])


def compute_order(plan: Plan, pipelines: int | None = None, steps: int = 0) -> Order:
    """Return the computes of every device: the schedule's, once for each of `pipelines` replicas (default: all).

    A schedule without a flush goes on over several `steps`. Steps that end are put behind each other: where nobody
    waits for other replicas, each of them still flushes its own pipeline.
    Raises `PlanError` (exit 2) when the schedule cannot arrange them.
    """
    replicas = plan.turns if plan.uneven else ()
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    shape = Shape(plan.depth, share, plan.chunks, replicas, plan.stage_seconds)
    order = schedules.arrange(plan.schedule, shape)
    steps = steps or windows(plan)
    unrolled = share * steps
    if unrolled > share and schedules.get(plan.schedule).asynchronous:
        order = schedules.get(plan.schedule).order(shape._replace(microbatches=unrolled))
    elif unrolled > share:
        order = tuple(codes.join(*(row + share * step for step in range(steps))) for row in order)
    if plan.uneven:
        return order
    return tuple(row + unrolled * replica for replica in range(pipelines or plan.replicas) for row in order)


def _between_updates(plan: Plan) -> int:
    """How many of its micro-batches a device takes between two updates of its parameters."""
    if schedules.get(plan.schedule).updates == "microbatch":
        return 1
    return -(-plan.microbatches // plan.replicas) if asynchronous(plan) else ONCE


def _agreeing(plan: Plan) -> list[bool]:
    """Of every row, whether its stages have other holders to agree with on their parameters, or servers."""
    served = bool(synchronisation.get(plan.synchronisation).server)
    return [served or any(len(plan.holders[s]) > 1 for s in held) for held in plan.stages_of]


def _forgetful(plan: Plan) -> Codes:
    """Stages that recompute anything."""
    if not plan.recomputes:
        return np.zeros(0, np.int64)
    return np.array([s for s in range(len(plan.stages)) if plan.checkpoints(s)], np.int64)


def swaps(plan: Plan) -> bool:
    """Whether any micro-batch stays away for long enough that `offload` would move it."""
    rows = recompute(compute_order(plan, None if plan.uneven else 1), _forgetful(plan))
    return any(len(offload(row)) > len(row) for row in rows)
