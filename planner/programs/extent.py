"""Whether a plan's program fits into the memory of the machine that plans: said before anything is unrolled."""

from __future__ import annotations

import os

from planner.basis.errors import PlanError
from planner.basis.units import size

ACTION_BYTES = 45
"""Bytes per action, at the most, while a program is made, linked, priced and walked: 35 to 41 were measured for gpipe,
1f1b, zb-h1 and interleaved programs of 9 to 26 million actions."""


def free_bytes() -> float:
    """Return how much memory this machine has left; infinite where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            return 1024.0 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def check(actions: int, plan: str, microbatches: int) -> None:
    """Raise `PlanError` (exit 2) when so many actions of a plan's program would not fit into memory."""
    needed, free = float(actions * ACTION_BYTES), free_bytes()
    if needed <= free:
        return
    fits = int(microbatches * free / needed)
    raise PlanError(
        what=f"the program of {plan} is too large for this machine",
        where=f"M={microbatches}: {actions:,} actions have to be in memory at once",
        why=f"they need about {size(needed)}, and {size(free)} are free",
        fix=f"--m {1 << max(0, fits.bit_length() - 1)} or fewer, or a machine with more memory",
    )
