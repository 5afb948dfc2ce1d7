"""From a plan to a program: small passes over rows of actions. Authors of a schedule never write communication."""

from __future__ import annotations

from planner import schedules
from planner.plan import Plan
from planner.program import (
    BACKWARD,
    FORWARD,
    LOAD,
    OPTIMIZER,
    RECEIVES,
    RECOMPUTE,
    REDUCE_GRAD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    Order,
    Program,
    counterpart,
    prove,
)


def lower(plan: Plan) -> Program:
    """Unroll a plan into what every device does in one step, and prove it.

    Raises `PlanError` when the result would not be a step that ends.
    """
    stages = len(plan.stages)
    share = plan.microbatches // plan.replicas
    order = schedules.get(plan.schedule)(stages, share)
    rows = tuple(_shift(row, share * replica) for replica in range(plan.replicas) for row in order)
    rows = prefetch(communicate(rows, stages))
    if plan.recompute:
        rows = recompute(rows)
    if plan.replicas > 1:
        rows = reduce_gradients(rows)
    rows = load(optimize(rows), stages)
    program = Program(rows)
    prove(program, stages, plan.microbatches)
    return program


def _shift(row: tuple[Action, ...], by: int) -> tuple[Action, ...]:
    return tuple(Action(a.stage, a.op, None if a.microbatch is None else a.microbatch + by) for a in row)


def communicate(rows: Order, stages: int) -> Order:
    """Add sends after, and receives before, the computes that need them.

    The rows are played in rounds, one compute per device and round. A send stands right behind the compute that makes
    the tensor; its receive is posted on the other device in the same round. So both ends of every pair of devices see
    the pair's messages, of both directions, in one and the same order, which is what NCCL demands and gloo allows.

    >>> from planner.program import grid
    >>> from planner.schedules import gpipe
    >>> print(grid(communicate(gpipe(2, 1), 2)))
    0F0      0SEND_F0 0RECV_B0 0B0
    1RECV_F0 1F0      1B0      1SEND_B0
    """
    device = {action: d for d, row in enumerate(rows) for action in row}
    lowered: list[list[Action]] = [[] for _ in rows]
    available: set[Action] = set()
    at = [0] * len(rows)
    while any(i < len(row) for i, row in zip(at, rows, strict=True)):
        ready = [
            (d, row[at[d]])
            for d, row in enumerate(rows)
            if at[d] < len(row) and ((source := _source(row[at[d]], stages)) is None or source in available)
        ]
        if not ready:  # left as it is: `prove` shows the cell that waits for ever
            return tuple((*low, *row[i:]) for low, row, i in zip(lowered, rows, at, strict=True))
        for d, action in ready:
            lowered[d].append(action)
            at[d] += 1
        for d, action in ready:
            available.add(action)
            send = _send(action, stages)
            if send is not None:
                receive = counterpart(send)
                target = device[Action(receive.stage, FORWARD, receive.microbatch)]
                if target != d:
                    lowered[d].append(send)
                    lowered[target].append(receive)
    return tuple(tuple(row) for row in lowered)


def prefetch(rows: Order) -> Order:
    """Post every receive one compute earlier, so that a transfer overlaps the compute before the one that needs it.

    A receive never passes another message with the same device, so both ends keep the pair's order; the price is the
    buffer of one more message.

    >>> from planner.program import grid
    >>> from planner.schedules import gpipe
    >>> print(grid(prefetch(communicate(gpipe(2, 2), 2))))
    0F0      0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
    1RECV_F0 1RECV_F1 1F0 1F1      1B0      1SEND_B0 1B1 1SEND_B1
    """
    messages = Program(rows).messages

    def partner(action: Action, d: int) -> int | None:
        message = messages.get(action)
        return None if message is None else message.source + message.target - d

    moved = []
    for d, row in enumerate(rows):
        out: list[Action] = []
        for action in row:
            at = len(out)
            if action.op in RECEIVES:
                computes = 0
                while at and computes < 1 and partner(out[at - 1], d) != partner(action, d):
                    computes += out[at - 1] not in messages
                    at -= 1
            out.insert(at, action)
        moved.append(tuple(out))
    return tuple(moved)


def _source(action: Action, stages: int) -> Action | None:
    """The compute on a neighbouring stage that makes this one's input."""
    if action.op == FORWARD and action.stage > 0:
        return Action(action.stage - 1, FORWARD, action.microbatch)
    if action.op == BACKWARD and action.stage < stages - 1:
        return Action(action.stage + 1, BACKWARD, action.microbatch)
    return None


def _send(action: Action, stages: int) -> Action | None:
    """The send of what `action` makes for a neighbouring stage."""
    if action.op == FORWARD and action.stage < stages - 1:
        return Action(action.stage, SEND_FORWARD, action.microbatch)
    if action.op == BACKWARD and action.stage > 0:
        return Action(action.stage, SEND_BACKWARD, action.microbatch)
    return None


def recompute(rows: Order) -> Order:
    """Repeat each micro-batch's forward right before its backward: between the two only the stage's input is kept."""
    return tuple(
        tuple(
            added
            for action in row
            for added in (
                (Action(action.stage, RECOMPUTE, action.microbatch), action) if action.op == BACKWARD else (action,)
            )
        )
        for row in rows
    )


def reduce_gradients(rows: Order) -> Order:
    """All-reduce a stage's gradients over its replicas behind its last backward."""

    def last(row: tuple[Action, ...], i: int) -> bool:
        return row[i].op == BACKWARD and not any(a.op == BACKWARD and a.stage == row[i].stage for a in row[i + 1 :])

    return tuple(
        tuple(
            added
            for i, action in enumerate(row)
            for added in ((action, Action(action.stage, REDUCE_GRAD)) if last(row, i) else (action,))
        )
        for row in rows
    )


def optimize(rows: Order) -> Order:
    """Update every stage's parameters at the end of the step."""
    return tuple((*row, *(Action(s, OPTIMIZER) for s in sorted({a.stage for a in row}))) for row in rows)


def load(rows: Order, stages: int) -> Order:
    """Produce the step's batch where it is used: inputs at the first stage, targets at the last."""
    return tuple((*(Action(s, LOAD) for s in sorted({a.stage for a in row} & {0, stages - 1})), *row) for row in rows)
