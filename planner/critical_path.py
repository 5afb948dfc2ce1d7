"""The fast interpreter: a program's times where nothing is shared, as the longest path through its actions.

It means what `planner.simulate` does, to the last digit where no link and no core has two users; where something is
shared, sharing only ever makes a step longer, so this is a lower bound. Search stands on both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.compiled import kernel
from planner.costs import Costs
from planner.errors import PlanError

Floats = npt.NDArray[np.float64]


class Walked(NamedTuple):
    """Seconds at which every action (of `linked.flat`) had what it waited for, and was done."""

    ready: Floats
    end: Floats

    @property
    def step_s(self) -> float:
        """When the last action is done."""
        return float(self.end.max(initial=0.0))


def walk(costs: Costs) -> Walked:
    """Return when everything happens. Raises `PlanError` when actions wait for each other for ever."""
    linked = costs.linked
    ready, end = np.zeros(len(linked.flat)), np.zeros(len(linked.flat))
    begun = np.zeros(linked.transfers)
    stuck = _walk(
        len(linked.flat),
        *(linked.offsets, linked.posts, linked.waits, linked.copies, costs.seconds),
        *(costs.transfers, costs.transfer_kind),
        *(linked.parties.copy(), begun, linked.offsets[:-1].copy(), np.zeros(linked.devices), ready, end),
    )
    if stuck >= 0:
        raise PlanError(
            what="the program is not a valid step",
            where=f"device {linked.row[stuck]}",
            why=f"{linked.actions[stuck]} waits for ever",
            fix="correct the schedule that generated it (planner/schedules)",
        )
    return Walked(ready, end)


@kernel
def _walk(offsets, posts, waits, copies, seconds, price, kind, missing, begun, at, now, ready, end):  # type: ignore[no-untyped-def]
    """Let every device go on until it waits for a transfer whose last party has not posted; again until none moves.

    `begun` is when a transfer's last party has posted, `missing` how many parties have not. Devices are visited there
    and back, because forwards run down the pipeline and backwards up. Returns an action that waits for ever, or -1.
    """
    rows = len(offsets) - 1
    moved = True
    down = True
    while moved:
        moved = False
        for turn in range(rows):
            d = turn if down else rows - 1 - turn
            i = at[d]
            stop = offsets[d + 1]
            clock = now[d]
            while i < stop:
                post = posts[i]
                if post >= 0 and end[i] == 0.0:
                    missing[post] -= 1
                    begun[post] = max(begun[post], clock)
                    end[i] = -1.0  # posted
                wait = waits[i]
                if wait >= 0:
                    if missing[wait] > 0:
                        break
                    clock = max(clock, begun[wait] + price[kind[wait]])
                copy = copies[i]
                if copy >= 0:
                    if missing[copy] > 0:
                        break
                    clock = max(clock, begun[copy] + price[kind[copy]])
                ready[i] = begun[wait] if wait >= 0 and wait == post else clock
                clock += seconds[i]
                end[i] = clock
                moved = True
                i += 1
            at[d] = i
            now[d] = clock
        down = not down
    for d in range(rows):
        if at[d] < offsets[d + 1]:
            return at[d]
    return -1
