"""Schedules with two stages per device, folded: device d of p holds stages d and 2p - 1 - d.

The last stage is where the first is, so a micro-batch's backward starts where its forward started. Bubbles are given
for equal stages whose actions take F, B (for the input gradient) and W seconds; activations are those of one stage.
"""

from __future__ import annotations

from planner.orders.codes import Codes, Order, join, microbatches, run, weave, with_op
from planner.orders.operations import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from planner.orders.schedules.greedy import best
from planner.orders.schedules.registry import Shape, schedule
from planner.orders.schedules.zero_bubble import RULES


@schedule("zb-v", placement="vee", chunks=(2, 2), splits=True)
def zero_bubble_vee(shape: Shape) -> Order:
    """No bubble between a device's first and last action, if F = B = W (Qi et al., arXiv 2401.10241, section 6).

    That needs M >= 2p - 1. The makespan is then longer than the work by the first forwards, `(p - 1) F`, and every
    device holds 2p activations: those of 1F1B's first. The order is fixed, whatever F, B and W are, and torch's.

    >>> from planner.orders.action import grid
    >>> print(grid(zero_bubble_vee(Shape(2, 3, 2))))
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    p = shape.devices
    n = max(shape.microbatches, 2 * p - 1)

    def row(d: int) -> Codes:
        near, far = d, 2 * p - 1 - d
        f0, i0, w0 = (run(op, near, n) for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT))
        f1, i1, w1 = (run(op, far, n) for op in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT))
        ahead, steady = 2 * (p - d) - 1, 2 * p - d - 1  # forwards of the near stage before the far one's, before I
        both = n - steady
        return join(
            f0[:ahead],
            weave(f1[:d], f0[ahead:steady]),
            weave(f1[d:p], i1[: p - d], w1[: p - d]),
            weave(f0[steady:], *_turn(0, both, i0, w0, f1[p:], i1[p - d :], w1[p - d :])),
            weave(*_turn(both, n - p, i0, w0, f1[p:], i1[p - d :], w1[p - d :])),
            weave(i0[n - p : n - p + d], i1[n - d :]),
            weave(i0[n - p + d :], w0[n - p : n - d]),
            w1[n - d :],
            w0[n - d :],
        )

    rows = (row(d) for d in range(p))
    return tuple(full[microbatches(full) < shape.microbatches] for full in rows)


def _twice(shape: Shape) -> int:
    return 2 * shape.devices


@schedule("zb-v-greedy", placement="vee", chunks=(2, 2), splits=True, limit=_twice)
def zero_bubble_vee_greedy(shape: Shape) -> Order:
    """The best of ZB-V, ZB-V with W placed anew, and list scheduling for measured seconds (arXiv 2401.10241, 3 and 6).

    Every device holds at most 2p activations, as in ZB-V, and it is never slower. No bubble can be expected to vanish
    unless W + 2B >= 2F and W + 2F >= 2B (arXiv 2405.15362).

    >>> from planner.orders.action import grid
    >>> print(grid(zero_bubble_vee_greedy(Shape(1, 2, 2, seconds=((1, 1, 2), (1, 1, 2))))))
    0F0 1F0 1I0 1W0 0F1 0I0 0W0 1F1 1I1 1W1 0I1 0W1
    """
    return best("zb-v-greedy", shape, _twice(shape), RULES, [zero_bubble_vee(shape)])


def _turn(first: int, last: int, *parts: Codes) -> tuple[Codes, ...]:
    return tuple(part[first:last] for part in parts)


def _too_few(shape: Shape) -> str | None:
    if shape.microbatches < shape.stages:
        return f"it needs at least one micro-batch per stage: M={shape.microbatches}, {shape.stages} stages"
    return None


@schedule("dualpipe-v", placement="vee", chunks=(2, 2), splits=True, impossible=_too_few)
def dualpipe_vee(shape: Shape) -> Order:
    """DualPipe folded at its middle, so that parameters are kept once (DeepSeek-V3, arXiv 2412.19437; DualPipe's code).

    In the middle a forward of one stage and a backward of the other are neighbours, which an executor may overlap.
    Most backwards are whole; a few are split where there is a bubble to fill. Makespan bubble
    `(p - 1) (FB + B + W - 3W)`, FB being the time of an overlapped forward and backward; `(p - 1) F` if F = B = W and
    one is done behind the other. Every device holds 2p + 1 activations. Needs M >= 2p. The order is torch's.

    >>> from planner.orders.action import grid
    >>> print(grid(dualpipe_vee(Shape(2, 4, 2))))
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """
    p, m = shape.devices, shape.microbatches

    def row(d: int) -> Codes:
        near, far = d, 2 * p - 1 - d
        rest = p - 1 - d
        f0, f1, b0, b1 = (run(op, s, m) for op in (FORWARD, BACKWARD) for s in (near, far))
        steady = m - 2 * p + d + 1
        done = m - d - 1 - rest  # whole backwards of the near stage before the tail
        tail = weave(b1[m - d - 1 :], b0[done : done + d + 1])
        split = with_op(join(tail[d + 1 :], b0[done + d + 1 :]), BACKWARD_INPUT)
        weights = with_op(split, BACKWARD_WEIGHT)
        return join(
            f0[: 2 * rest],
            weave(f0[2 * rest : 2 * p - d - 1], f1[: d + 1]),
            weave(*(with_op(b1[:rest], op) for op in (BACKWARD_INPUT, BACKWARD_WEIGHT)), f1[d + 1 : p]),
            weave(f0[2 * p - d - 1 :], b1[rest : rest + steady], f1[p : p + steady], b0[:steady]),
            weave(b1[rest + steady : m - d - 1], f1[p + steady :], b0[steady:done]),
            tail[: d + 1],
            split[: d + 1],
            weave(weights[:rest], split[d + 1 :]),
            weights[rest:],
        )

    return tuple(row(d) for d in range(p))
