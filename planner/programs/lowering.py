"""From a plan to a program: small passes over rows of actions. Authors of a schedule never write communication."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.orders import codes, schedules, synchronisation
from planner.orders.codes import (
    BACKWARD,
    BACKWARD_INPUT,
    COMPUTES,
    FETCH,
    FORWARD,
    LOAD,
    MICROBATCH,
    OFFLOAD,
    OP,
    OPTIMIZER,
    PUSH,
    RECOMPUTE,
    RECV_BACKWARD,
    RECV_FORWARD,
    REDUCE_GRAD,
    REDUCE_TIED,
    RELEASE,
    STAGE,
    STAGES,
    UNSHARD_BACKWARD,
    UNSHARD_FORWARD,
    Codes,
    Order,
    cut,
    flatten,
)
from planner.orders.schedules import Shape
from planner.programs.program import Program, prove
from planner.values.plan import Plan, asynchronous, windows

ONCE = 1 << 32
"""Between two updates there are all micro-batches of a step."""


def lower(plan: Plan) -> Program:
    """Unroll a plan into what every device does in one step, and prove it.

    A plan without flush is unrolled over `windows(plan)` steps. Raises `PlanError` when the schedule cannot arrange
    the plan's pipeline, or when the result would not be a step that ends.
    """
    program = unroll(plan)
    prove(
        program,
        len(plan.stages),
        plan.microbatches * windows(plan),
        backward=schedules.get(plan.schedule).trains,
    )
    return program


def unroll(plan: Plan, *, replicas: int | None = None) -> Program:
    """Lower a plan without the proof: for a search, whose interpreter finds a wait without end by itself.

    Only the first `replicas` copies of the pipeline are unrolled, where they are all alike; all by default.
    """
    schedule, way = schedules.get(plan.schedule), synchronisation.get(plan.synchronisation)
    stages = len(plan.stages)
    share = _between_updates(plan)
    rows = messages(compute_order(plan, replicas), stages)
    agreeing = _agreeing(plan)[: len(rows)]
    if schedule.trains:
        rows = recompute(rows, _forgetful(plan))
        if any(agreeing):
            rows = tuple(
                send_first(way.add(row, share)) if agrees else row for agrees, row in zip(agreeing, rows, strict=True)
            )
            rows = prefetch(rows, UNSHARD_FORWARD, UNSHARD_BACKWARD)
            if plan.uneven and share < ONCE:
                rows = tuple(_whole_turns(plan, row, *held) for row, held in zip(rows, plan.stages_of, strict=True))
    if plan.offload and schedule.trains:
        rows = tuple(offload(row) for row in rows)
    if schedule.trains and plan.tied:
        rows = tuple(tie(row, plan.tied) for row in rows)
    updates = schedule.trains and not way.server
    gathers = [way.gathers and agrees for agrees in agreeing]
    if updates and share < ONCE:
        rows = tuple(optimize(row, share) for row in rows)
        rows = tuple(gather(row) if gathered else row for gathered, row in zip(gathers, rows, strict=True))
    last = (OPTIMIZER,) if updates and share >= ONCE else ()
    return Program(frame(rows, stages, [(*last, UNSHARD_FORWARD) if last and g else last for g in gathers]))


def _whole_turns(plan: Plan, row: Codes, stage: int) -> Codes:
    """Leave out the reductions behind the last turn that all of a stage's replicas take: some would wait for ever.

    Replicas take micro-batches in turn (1F1B-RR), and how many are unrolled need not be a multiple of theirs.
    """
    replicas = len(plan.holders[stage])
    whole = plan.microbatches * windows(plan) // replicas * replicas
    return row[~(codes.has(row, REDUCE_GRAD) & (codes.microbatches(row) >= whole))]


def compute_order(plan: Plan, copies: int | None = None) -> Order:
    """Return the computes of every device: the schedule's, once for each replica of the pipeline.

    A schedule without a flush goes on over several steps. Steps that end are put behind each other: where nobody waits
    for other replicas, each of them still flushes its own pipeline.
    Raises `PlanError` (exit 2) when the schedule cannot arrange them.
    """
    replicas = () if not plan.uneven else tuple(len(s.devices) // plan.tensor for s in plan.stages)
    share = plan.microbatches if plan.uneven else plan.microbatches // plan.replicas
    shape = Shape(plan.depth, share, plan.chunks, replicas, plan.stage_seconds)
    order = schedules.arrange(plan.schedule, shape)
    unrolled = share * windows(plan)
    if unrolled > share and schedules.get(plan.schedule).asynchronous:
        order = schedules.get(plan.schedule).order(shape._replace(microbatches=unrolled))
    elif unrolled > share:
        order = tuple(codes.join(*(row + share * window for window in range(windows(plan)))) for row in order)
    if plan.uneven:
        return order
    return tuple(row + unrolled * replica for replica in range(copies or plan.replicas) for row in order)


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


def communicate(rows: Order, stages: int) -> Order:
    """Add sends after, and receives before, the computes that need them.

    The rows are played in rounds, one compute per device and round. A send stands right behind the compute that makes
    the tensor; its receive is posted on the other device in the same round. So both ends of every pair of devices see
    the pair's messages, of both directions, in one and the same order, which is what NCCL demands and gloo allows.

    >>> from planner.orders.action import grid
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(grid(communicate(arrange("gpipe", Shape(2, 1)), 2)))
    0F0      0SEND_F0 0RECV_B0 0B0
    1RECV_F0 1F0      1B0      1SEND_B0
    """
    if stages == 1:
        return rows
    return _play(rows, stages)[0]


def messages(rows: Order, stages: int) -> Order:
    """Add messages and post their receives early: `communicate` and `prefetch`, without a copy in between."""
    if stages == 1:
        return rows
    rows, home = _play(rows, stages)
    flat, offsets = flatten(rows)
    _prefetch(len(flat), flat, offsets, len(home) // stages, home, _early(RECV_FORWARD, RECV_BACKWARD))
    return cut(flat, offsets)


def _play(rows: Order, stages: int) -> tuple[Order, Codes]:
    """Return the rows with their messages, and the device of every stage's every micro-batch."""
    flat, offsets = flatten(rows)
    last = codes.extent(flat).microbatches
    home = _homes(flat, offsets, stages, last)
    starts = np.zeros(len(offsets), np.int64)
    _count(len(flat), flat, offsets, stages, last, home, starts)
    np.cumsum(starts, out=starts)
    out, ends = np.empty(starts[-1], np.int64), starts[:-1].copy()
    made, ready = np.zeros(2 * stages * last, np.int8), np.zeros(len(rows), np.int8)
    _communicate(len(flat), flat, offsets, stages, last, home, made, offsets[:-1].copy(), ready, out, ends)
    return tuple(out[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=False)), home


def _homes(flat: Codes, offsets: Codes, stages: int, last: int) -> Codes:
    """Device of every stage's every micro-batch, -1 where there is none."""
    home = np.full(stages * last, -1, np.int64)
    _find_homes(len(flat), flat, offsets, last, home)
    return home


@kernel
def _find_homes(flat, offsets, last, home):  # type: ignore[no-untyped-def]
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            if flat[i] >> OP == 0:
                home[(flat[i] >> STAGE & STAGES) * last + (flat[i] & MICROBATCH) - 1] = d
    return 0


@kernel
def _count(flat, offsets, stages, last, home, lengths):  # type: ignore[no-untyped-def]
    """Count, one place further, what every row will hold."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            lengths[d + 1] += 1
            op = flat[i] >> OP
            at = (flat[i] >> STAGE & STAGES) * last + (flat[i] & MICROBATCH) - 1
            target = -1
            if op == 0 and at < (stages - 1) * last:
                target = home[at + last]
            if 1 <= op <= 2 and at >= last:
                target = home[at - last]
            if target >= 0 and target != d:
                lengths[d + 1] += 1
                lengths[target + 1] += 1
    return 0


@kernel
def _communicate(flat, offsets, stages, last, home, made, at, ready, out, ends):  # type: ignore[no-untyped-def]
    """Play the rows in rounds; `made` marks outputs (forward, then gradients), `home` the device of a micro-batch."""
    rows = len(offsets) - 1
    moved = True
    while moved:
        moved = False
        for d in range(rows):
            ready[d] = 0
            if at[d] < offsets[d + 1]:
                op = flat[at[d]] >> OP
                stage = flat[at[d]] >> STAGE & STAGES
                m = (flat[at[d]] & MICROBATCH) - 1
                ready[d] = 1
                if op == 0 and stage > 0 and not made[(stage - 1) * last + m]:
                    ready[d] = 0
                if 1 <= op <= 2 and stage < stages - 1 and not made[(stages + stage + 1) * last + m]:
                    ready[d] = 0
        for d in range(rows):
            if ready[d]:
                moved = True
                out[ends[d]] = flat[at[d]]
                ends[d] += 1
        for d in range(rows):
            if ready[d]:
                action = flat[at[d]]
                at[d] += 1
                op = action >> OP
                stage = action >> STAGE & STAGES
                m = (action & MICROBATCH) - 1
                target = -1
                send = receive = 0
                if op == 0:
                    made[stage * last + m] = 1
                    if stage < stages - 1:
                        target = home[(stage + 1) * last + m]
                        send = 5 << OP | stage << STAGE | (m + 1)
                        receive = 6 << OP | (stage + 1) << STAGE | (m + 1)
                if 1 <= op <= 2:
                    made[(stages + stage) * last + m] = 1
                    if stage > 0:
                        target = home[(stage - 1) * last + m]
                        send = 7 << OP | stage << STAGE | (m + 1)
                        receive = 8 << OP | (stage - 1) << STAGE | (m + 1)
                if target >= 0 and target != d:
                    out[ends[d]] = send
                    ends[d] += 1
                    out[ends[target]] = receive
                    ends[target] += 1
    for d in range(rows):  # what waits for ever is left as it is: the proof shows the cell
        while at[d] < offsets[d + 1]:
            out[ends[d]] = flat[at[d]]
            ends[d] += 1
            at[d] += 1
    return 0


def prefetch(rows: Order, *wanted: str) -> Order:
    """Post receives or gathers (the operations `wanted`) one compute earlier, so that they overlap that compute.

    A receive never passes another message with the same device, so both ends keep the pair's order; the price is the
    buffer of one more message.

    >>> from planner.orders.action import grid
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(grid(prefetch(communicate(arrange("gpipe", Shape(2, 2)), 2), "RECV_F", "RECV_B")))
    0F0      0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1
    1RECV_F0 1RECV_F1 1F0 1F1      1B0      1SEND_B0 1B1 1SEND_B1
    """
    flat, offsets = flatten(rows)
    early = _early(*wanted)
    present, stages, last = codes.extent(flat)
    if not present[early > 0].any():
        return rows
    if any(np.shares_memory(flat, row) for row in rows[:1]):
        flat = flat.copy()
    _prefetch(len(flat), flat, offsets, last, _homes(flat, offsets, stages, last), early)
    return cut(flat, offsets)


def _early(*wanted: str) -> npt.NDArray[np.int8]:
    return np.array([op in wanted for op in codes.OPS], np.int8)


@kernel
def _prefetch(flat, offsets, last, home, early):  # type: ignore[no-untyped-def]
    """Move `early` operations in place, over at most one compute; 5 to 8 are messages, 6 and 8 receives."""
    rows = len(offsets) - 1
    for d in range(rows):
        for i in range(offsets[d], offsets[d + 1]):
            action = flat[i]
            op = action >> OP
            if not early[op]:
                continue
            stage = action >> STAGE & STAGES
            m = (action & MICROBATCH) - 1
            peer = -2
            if op == 6:
                peer = home[(stage - 1) * last + m]
            if op == 8:
                peer = home[(stage + 1) * last + m]
            at = i
            computes = 0
            while at > offsets[d] and computes < 1:
                before = flat[at - 1]
                kind = before >> OP
                there = before >> STAGE & STAGES
                other = (before & MICROBATCH) - 1
                if kind == op and peer == -2:
                    break
                if 5 <= kind <= 8:
                    partner = home[(there + (1 if kind == 5 or kind == 8 else -1)) * last + other]
                    if partner == peer:
                        break
                elif kind < 5:
                    computes += 1
                flat[at] = before
                at -= 1
            flat[at] = action
    return 0


def recompute(rows: Order, stages: Codes) -> Order:
    """Repeat a micro-batch's forward right before its backward, on the given stages."""
    if not len(stages):
        return rows
    return tuple(
        codes.insert(
            row,
            codes.has(row, BACKWARD, BACKWARD_INPUT) & np.isin(codes.stages(row), stages),
            RECOMPUTE,
            behind=False,
        )
        for row in rows
    )


def send_first(row: Codes) -> Codes:
    """Send a gradient on before replicas agree: the stage before is waiting for it, as torch's lowering has it too.

    Without a flush it may also have what the other replicas are waiting for.
    """
    row = row.copy()
    for op in (REDUCE_GRAD, PUSH):
        _send_first(len(row), row, codes.NUMBER[op])
    return row


@kernel
def _send_first(row, held):  # type: ignore[no-untyped-def]
    """Move every action `held` up behind the SEND_B (7) that stands between it and the next compute (0 to 4)."""
    count = len(row)
    for i in range(count):
        if row[i] >> OP == held:
            action = row[i]
            j = i + 1
            while j < count and row[j] >> OP >= 5 and row[j] >> OP != 7:
                j += 1
            if j < count and row[j] >> OP == 7:
                for k in range(i, j):
                    row[k] = row[k + 1]
                row[j] = action
    return 0


def offload(row: Codes) -> Codes:
    """Copy a micro-batch's saved activations to the host behind its forward, and back one compute before its backward.

    A copy out runs beside the computes. Its memory is freed at the RELEASE before the second compute behind it, which
    waits for the copy: that bounds what is held, whatever the link's speed. A micro-batch with fewer than four computes
    between its forward and its backward stays.

    >>> from planner.orders.action import actions
    >>> from planner.orders.schedules import Shape, arrange
    >>> print(*actions(offload(arrange("1f1b", Shape(6, 6))[1]))[:12])
    1F0 1OFFLOAD0 1F1 1OFFLOAD1 1RELEASE0 1F2 1OFFLOAD2 1RELEASE1 1F3 1OFFLOAD3 1RELEASE2 1FETCH0
    """
    computing = codes.has(row, *COMPUTES)
    computes, turn = np.flatnonzero(computing), np.cumsum(computing) - 1
    forward = np.flatnonzero(codes.has(row, FORWARD))
    takers = np.flatnonzero(codes.has(row, RECOMPUTE, BACKWARD, BACKWARD_INPUT))
    taken, first = np.unique(codes.with_op(row[takers], FORWARD), return_index=True)
    back = takers[first][np.searchsorted(taken, row[forward])]
    before = turn[back] - computing[back]  # the compute before the one that needs the activations
    stays = before - turn[forward] < 4
    forward, before = forward[~stays], before[~stays]
    at = np.concatenate([forward + 1, computes[turn[forward] + 2], computes[before]])
    return np.insert(row, at, np.concatenate([codes.with_op(row[forward], op) for op in (OFFLOAD, RELEASE, FETCH)]))


def swaps(plan: Plan) -> bool:
    """Whether any micro-batch stays away for long enough that `offload` would move it."""
    rows = recompute(compute_order(plan, None if plan.uneven else 1), _forgetful(plan))
    return any(len(offload(row)) > len(row) for row in rows)


def optimize(row: Codes, share: int) -> Codes:
    """Update every stage's parameters as often as an asynchronous plan does: every `share` micro-batches."""
    behind = codes.has(row, REDUCE_GRAD)
    if not behind.any():
        behind = synchronisation.last_backward(row, share)
    at = np.flatnonzero(behind)
    following = row[np.minimum(at + 1, len(row) - 1)]
    at = at + codes.has(following, codes.SEND_BACKWARD)  # the neighbour is waiting for the gradient, not for the update
    return np.insert(row, at + 1, codes.with_op(row[behind], OPTIMIZER))


def tie(row: Codes, tied: tuple[tuple[int, ...], ...]) -> Codes:
    """Add up the gradients of parameters that several stages share, when all of them have theirs."""
    held = set(codes.stages(row[codes.has(row, FORWARD)]).tolist())
    mine = [codes.code(REDUCE_TIED, group[0]) for group in tied if held & set(group)]
    return codes.join(row, np.array(mine, np.int64))


def gather(row: Codes) -> Codes:
    """Gather updated shards behind the optimizer, for the stage's next forward, which waits for them.

    Of several updates in front of one forward, the last one's; behind the last forward nobody needs them.
    """
    updates, forwards = (np.flatnonzero(codes.has(row, op)) for op in (OPTIMIZER, FORWARD))
    at, added = [updates[:0]], [row[:0]]
    for stage in np.unique(codes.stages(row[updates])):
        own, following = (where[codes.stages(row[where]) == stage] for where in (updates, forwards))
        turn = np.searchsorted(following, own)
        used = (turn < len(following)) & np.append(turn[1:] != turn[:-1], True)
        at.append(own[used] + 1)
        added.append(codes.with_op(row[following[turn[used]]], UNSHARD_FORWARD))
    return np.insert(row, np.concatenate(at), np.concatenate(added))


def frame(rows: Order, stages: int, behind: Sequence[tuple[str, ...]]) -> Order:
    """Begin and end the step.

    Its batch is produced where it is used: inputs at the first stage, targets at the last. At the end every stage of a
    device does what is `behind` its row: the update of its parameters, and the gather of the updated shards.
    """
    flat, offsets = flatten(rows)
    mine = [np.flatnonzero(held).tolist() for held in codes.held(flat, offsets, stages)]
    heads = [[codes.code(LOAD, s) for s in held if s in (0, stages - 1)] for held in mine]
    tails = [[codes.code(op, s) for s in held for op in last] for held, last in zip(mine, behind, strict=True)]
    lengths = [len(head) + len(row) + len(tail) for head, row, tail in zip(heads, rows, tails, strict=True)]
    framed = cut(np.empty(sum(lengths), np.int64), np.cumsum([0, *lengths]))
    for whole, head, row, tail in zip(framed, heads, rows, tails, strict=True):
        whole[: len(head)] = head
        whole[len(head) : len(head) + len(row)] = row
        whole[len(head) + len(row) :] = tail
    return framed
