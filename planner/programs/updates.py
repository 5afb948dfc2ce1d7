"""Passes that add what stands around computes and messages: updates, what replicas and shards need, a frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planner.basis.compiled import kernel
from planner.orders import codes, synchronisation
from planner.orders.codes import OP, Codes, Order, cut
from planner.orders.edges import Edges
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_WEIGHT,
    FORWARD,
    LOAD,
    NORM_GRAD,
    NUMBER,
    OPS,
    OPTIMIZER,
    PUSH,
    REDUCE_ASYNC,
    REDUCE_GRAD,
    REDUCE_NORM,
    REDUCE_TIED,
    SEND_BACKWARD,
    TABLE,
    UNSHARD_FORWARD,
)
from planner.values.plan import RowRole


def advance(row: Codes, *wanted: str) -> Codes:
    """Post the operations `wanted` one compute earlier, so that they overlap it; those of a kind keep their order."""
    row = row.copy()
    early = np.array([op in wanted for op in OPS], np.int8)
    _advance(len(row), row, early, TABLE.busy)
    return row


@kernel
def _advance(row, early, busy):  # type: ignore[no-untyped-def]
    for i in range(len(row)):
        action = row[i]
        op = action >> OP
        if not early[op]:
            continue
        at = i
        computes = 0
        while at > 0 and computes < 1 and row[at - 1] >> OP != op:
            computes += busy[row[at - 1] >> OP]
            row[at] = row[at - 1]
            at -= 1
        row[at] = action
    return 0


def send_first(row: Codes) -> Codes:
    """Send a gradient on before replicas agree: the stage before is waiting for it, as torch's lowering has it too.

    Without a flush it may also have what the other replicas are waiting for.
    """
    row = row.copy()
    for op in (REDUCE_GRAD, PUSH):
        _send_first(len(row), row, NUMBER[op], NUMBER[SEND_BACKWARD], TABLE.busy)
    return row


@kernel
def _send_first(row, held, send, busy):  # type: ignore[no-untyped-def]
    """Move every action `held` up behind the last `send` that stands between it and the next compute."""
    count = len(row)
    for i in range(count):
        if row[i] >> OP == held:
            action = row[i]
            last = i
            j = i + 1
            while j < count and not busy[row[j] >> OP]:
                if row[j] >> OP == send:
                    last = j
                j += 1
            for k in range(i, last):
                row[k] = row[k + 1]
            row[last] = action
    return 0


def reduce_beside(row: Codes) -> Codes:
    """Reduce each backward's gradients beside what the device computes next, instead of waiting for that."""
    row = row[~codes.has(row, REDUCE_GRAD)]
    return codes.insert(row, codes.has(row, BACKWARD, BACKWARD_WEIGHT), REDUCE_ASYNC, behind=True)


def optimize(row: Codes, share: int) -> Codes:
    """Update every stage's parameters as often as an asynchronous plan does: every `share` micro-batches.

    Of gradients that are reduced beside computing (of a row with one stage) each update stands behind the next
    backward: replicas that take micro-batches in turn come to a reduction one after the other, and with all of a turn
    to meet they need not wait for each other. Nothing that others wait for stands behind it.

    >>> from planner.orders.action import actions
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(*actions(optimize(reduce_beside(arrange("1f1b", Shape(2, 3))[1]), 1)))
    1F0 1B0 1REDUCE_ASYNC0 1F1 1B1 1REDUCE_ASYNC1 1OPTIMIZER0 1F2 1B2 1REDUCE_ASYNC2 1OPTIMIZER1 1OPTIMIZER2
    """
    beside = np.flatnonzero(codes.has(row, REDUCE_ASYNC))
    if len(beside):
        busy = np.flatnonzero(TABLE.busy[codes.ops(row)])
        before = np.append(busy, len(row))[np.searchsorted(busy, beside)]
        return np.insert(row, np.append(before[1:], before[-1]), codes.with_op(row[beside], OPTIMIZER))
    behind = codes.has(row, REDUCE_GRAD)
    if not behind.any():
        behind = synchronisation.last_backward(row, share)
    at = np.flatnonzero(behind)
    following = row[np.minimum(at + 1, len(row) - 1)]
    at = at + codes.has(following, SEND_BACKWARD)  # the neighbour is waiting for the gradient, not for the update
    return np.insert(row, at + 1, codes.with_op(row[behind], OPTIMIZER))


def tie(row: Codes, tied: tuple[tuple[int, ...], ...]) -> Codes:
    """Add up the gradients of parameters that several stages share, when all of them have theirs.

    Each replica of the pipeline adds up its own stages'. Behind the reductions over replicas, that is right: the sum
    over stages of averages over replicas is the average of the replicas' sums. So replicas reduce a stage's gradients
    as soon as it has them, behind its backward, instead of when the last of the stages has them; Megatron-LM, too,
    reduces over replicas first (`finalize_model_grads`).

    Where stages have different numbers of replicas there are no pipelines of their own: all rows join in one reduction.
    Each brings its stage's average divided by the number of the stage's replicas, so that the sum has every stage once.
    """
    held = set(codes.stages(row[codes.has(row, FORWARD)]).tolist())
    mine = [codes.code(REDUCE_TIED, group[0]) for group in tied if held & set(group)]
    return codes.join(row, np.array(mine, np.int64))


def norm(row: Codes, stages: Sequence[int], *, agreeing: bool) -> Codes:
    """Take the norm of the gradients of a row's stages, and if `agreeing` make all rows' into one, before the updates.

    >>> from planner.orders.action import actions
    >>> print(*actions(norm(codes.join(), (0, 2), agreeing=True)))
    0NORM_GRAD 2NORM_GRAD 0REDUCE_NORM
    """
    own = [codes.code(NORM_GRAD, stage) for stage in stages]
    return codes.join(row, np.array([*own, *([codes.code(REDUCE_NORM, 0)] if agreeing else ())], np.int64))


def gather(row: Codes) -> Codes:
    """Gather updated shards behind the optimizer, for the stage's next forward, which waits for them.

    Of several updates in front of one forward, the last one's; behind the last forward nobody needs them. A reduction
    that goes on beside computing begins behind the gather, which a forward waits for.
    """
    updates, forwards = (np.flatnonzero(codes.has(row, op)) for op in (OPTIMIZER, FORWARD))
    at, added = [updates[:0]], [row[:0]]
    for stage in np.unique(codes.stages(row[updates])):
        own, following = (where[codes.stages(row[where]) == stage] for where in (updates, forwards))
        turn = np.searchsorted(following, own)
        used = (turn < len(following)) & np.append(turn[1:] != turn[:-1], True)
        at.append(own[used] + 1)
        added.append(codes.with_op(row[following[turn[used]]], UNSHARD_FORWARD))
    row = np.insert(row, np.concatenate(at), np.concatenate(added))
    _send_first(len(row), row, NUMBER[REDUCE_ASYNC], NUMBER[UNSHARD_FORWARD], TABLE.busy)
    return row


def loads(roles: Sequence[RowRole], edges: Edges) -> list[tuple[int, ...]]:
    """Return the stages of every row that load a part of the batch.

    It is produced where it is used: inputs where no edge reaches a stage, targets where none leaves it.
    """
    table = edges.table
    own = (np.diff(table.leaves) == 0) | (np.diff(table.reaches) == 0)
    return [tuple(s for s in role.stages if own[s]) for role in roles]


def load(row: Codes, stages: Sequence[int], share: int, steps: int) -> Codes:
    """Load the batch of each of several steps before its first forward; `share` are a pipeline's micro-batches of one.

    >>> from planner.orders.action import actions
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(*actions(load(arrange("1f1b", Shape(2, 4))[0], (0,), 2, 2)))
    0LOAD0 0F0 0F1 0B0 0LOAD2 0F2 0B1 0F3 0B2 0B3
    """
    forward = np.flatnonzero(codes.has(row, FORWARD) & np.isin(codes.stages(row), stages))
    step = codes.microbatches(row[forward]) % (share * steps) // share
    first = np.unique(codes.stages(row[forward]) << codes.STAGE | step, return_index=True)[1]
    at = np.sort(forward[first])
    return np.insert(row, at, codes.with_op(row[at], LOAD))


def frame(
    rows: Order, roles: Sequence[RowRole], loading: Sequence[tuple[int, ...]], behind: Sequence[tuple[str, ...]]
) -> Order:
    """Begin and end the step: with the stages of every row that are `loading` its batch.

    At the end every stage of a row does what is `behind` it: the update of its parameters, the gather of the updated
    shards.
    """
    heads = [[codes.code(LOAD, s) for s in own] for own in loading]
    tails = [[codes.code(op, s) for s in role.stages for op in last] for role, last in zip(roles, behind, strict=True)]
    lengths = [len(head) + len(row) + len(tail) for head, row, tail in zip(heads, rows, tails, strict=True)]
    framed = cut(np.empty(sum(lengths), np.int64), np.cumsum([0, *lengths]))
    for whole, head, row, tail in zip(framed, heads, rows, tails, strict=True):
        whole[: len(head)] = head
        whole[len(head) : len(head) + len(row)] = row
        whole[len(head) + len(row) :] = tail
    return framed
