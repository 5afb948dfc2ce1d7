"""The fast interpreter: a program's times where nothing is shared, as the longest path through its actions.

It means what `planner.simulate.contention` does, to the last digit where no link and no core has two users; where
something is shared, sharing only ever makes a step longer, so this is a lower bound. Search stands on both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.basis.compiled import kernel
from planner.costs.priced import Costs, Prices
from planner.orders import codes
from planner.orders.codes import OP, PORT, PORTS, STAGE, STAGES
from planner.orders.operations import OPS, PUSH
from planner.programs.waits import Linked, Numbers, waits_for_ever

Floats = npt.NDArray[np.float64]


class Walked(NamedTuple):
    """Seconds at which every action (of `linked.flat`) had what it waited for, and was done."""

    ready: Floats
    end: Floats

    @property
    def step_s(self) -> float:
        """When the last action is done."""
        return float(self.end.max(initial=0.0))


class _Rows(NamedTuple):
    """Of every row: the action it is at, the first that has not posted, its clock, where its prices begin."""

    at: npt.NDArray[np.int64]
    posted: npt.NDArray[np.int64]
    now: Floats
    shift: npt.NDArray[np.int64]


class _Actions(NamedTuple):
    """The program: codes, where rows begin, what is posted to and waited for, as in `Linked`."""

    flat: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    posts: Numbers
    waits: Numbers
    needs: Numbers
    also: Numbers


class _Kinds(NamedTuple):
    """Prices of the kinds of transfers, as in `TransferKind`; `free` is when each lane is free again."""

    seconds: Floats
    lane: npt.NDArray[np.int64]
    busy: Floats
    early: Floats
    free: Floats


class _Transfers(NamedTuple):
    """Of every transfer: its kind, how many parties have not posted, when the last one has."""

    kind: Numbers
    missing: Numbers
    begun: Floats


class Makespan(NamedTuple):
    """Seconds of a step, and when each of its transfers begins."""

    step_s: float
    begun: Floats


def walk(costs: Costs) -> Walked:
    """Return when everything happens. Raises `PlanError` when actions wait for each other for ever."""
    ready, end = np.zeros(len(costs.linked.flat)), np.zeros(len(costs.linked.flat))
    shift = np.zeros(costs.linked.devices, np.int64)
    _run(costs.linked, shift, costs.seconds, costs, ready, end)
    return Walked(ready, end)


def makespan(linked: Linked, prices: Prices) -> Makespan:
    """Return `walk(...).step_s` of a program at its medians, without writing down when everything happens."""
    none = np.zeros(0)
    return _run(linked, prices.shift, prices.by_number, prices, none, none)


class Timed(NamedTuple):
    """Seconds: when each action has what it waits for and is done, its own, and when each transfer begins."""

    ready: Floats
    end: Floats
    seconds: Floats
    begun: Floats


def timed(linked: Linked, prices: Prices) -> Timed:
    """Return when everything of a program happens, at its medians."""
    flat, ready, end = linked.flat, np.zeros(len(linked.flat)), np.zeros(len(linked.flat))
    kind = (codes.ports(flat) * linked.stages + codes.stages(flat)) * len(OPS) + codes.ops(flat)
    seconds = prices.by_number[prices.shift[linked.row] + kind]
    begun = _run(linked, np.zeros(linked.devices, np.int64), seconds, prices, ready, end).begun
    return Timed(ready, end, seconds, begun)


def _run(
    linked: Linked,
    shift: npt.NDArray[np.int64],
    seconds: Floats,
    prices: Costs | Prices,
    ready: Floats,
    end: Floats,
) -> Makespan:
    begins, kinds = linked.offsets[:-1], prices.kinds
    rows = _Rows(begins.copy(), begins.copy(), np.zeros(linked.devices), shift)
    transfers = _Transfers(prices.transfer_kind, linked.parties.copy(), np.zeros(linked.transfers))
    stuck = _walk(
        len(linked.flat),
        _Actions(linked.flat, linked.offsets, linked.posts, linked.waits, linked.needs, linked.also),
        _Kinds(
            taken(prices),
            np.array([kind.lane for kind in kinds], np.int64),
            np.array([kind.busy for kind in kinds]),
            np.array([kind.early for kind in kinds]),
            np.zeros(3 * linked.devices),
        ),
        transfers,
        *(rows, len(OPS), linked.stages * len(OPS), seconds, ready, end),
    )
    if stuck >= 0:
        raise waits_for_ever(linked, rows.at.tolist())
    return Makespan(float(rows.now.max(initial=0.0)), transfers.begun)


def taken(prices: Costs | Prices) -> Floats:
    """Seconds from the begin of each kind of transfer until those who wait go on: a push is applied, too."""
    served = ((kind, prices.applying.get(kind.stage, 0.0) if kind.op == PUSH else 0.0) for kind in prices.kinds)
    return np.array([max(kind.seconds, kind.at_once) + applying for kind, applying in served])


@kernel
def _walk(actions, kinds, transfers, devices, ops, plane, seconds, ready, end):  # type: ignore[no-untyped-def]
    """Let every device go on until it waits for a transfer whose last party has not posted; again until none moves.

    `seconds` are those of every action if `ready` and `end` are to be written, else of every kind of action (see
    `planner.costs.priced.Prices`): writing times costs as much as finding them. Devices are visited there and back,
    because forwards run down the pipeline and backwards up. Returns an action that waits for ever, or -1.
    """
    flat, offsets, posts, waits, needs, also = actions
    price, lane, busy, early, free = kinds
    kind, missing, begun = transfers
    at, posted, now, shift = devices
    several = len(also) > 0
    rows = len(offsets) - 1
    timed = len(end) > 0
    moved = True
    down = True
    while moved:
        moved = False
        for turn in range(rows):
            d = turn if down else rows - 1 - turn
            first = i = at[d]
            clock = now[d]
            stop = offsets[d + 1]
            after = posted[d]
            while i < stop:
                post = posts[i]
                if post >= 0 and i >= after:
                    missing[post] -= 1
                    begun[post] = max(begun[post], clock)
                    after = i + 1
                    if missing[post] == 0 and lane[kind[post]] >= 0:  # in turn with what the device sent this way
                        own = kind[post]
                        start = max(begun[post] - early[own], free[lane[own]])
                        free[lane[own]] = start + busy[own]
                        begun[post] = max(begun[post], start + early[own])
                wait = waits[i]
                if wait >= 0:
                    if missing[wait] > 0:
                        break
                    clock = max(clock, begun[wait] + price[kind[wait]])
                    if several and also[wait] >= 0:
                        other = also[wait]
                        while other >= 0 and missing[other] == 0:
                            clock = max(clock, begun[other] + price[kind[other]])
                            other = also[other]
                        if other >= 0:
                            break
                copy = needs[i]
                if copy >= 0:
                    if missing[copy] > 0:
                        break
                    clock = max(clock, begun[copy] + price[kind[copy]])
                if timed:
                    ready[i] = begun[wait] if wait >= 0 and wait == post else clock
                    clock += seconds[i]
                    end[i] = clock
                else:
                    action = flat[i]
                    own = (action >> PORT & PORTS) * plane + (action >> STAGE & STAGES) * ops + (action >> OP)
                    clock += seconds[shift[d] + own]
                i += 1
            posted[d] = after
            if i > first:
                at[d] = i
                now[d] = clock
                moved = True
        down = not down
    for d in range(rows):
        if at[d] < offsets[d + 1]:
            return at[d]
    return -1
