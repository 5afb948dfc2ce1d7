"""What recomputing frees: which blocks are worth a checkpoint, and whether a plan's fullest device gets any emptier."""

from __future__ import annotations

from planner.basis.errors import PlanError
from planner.basis.memo import memoised
from planner.costs.placed import Placed
from planner.costs.stage_memory import of_stage, stage_memory
from planner.costs.static_memory import static_bytes
from planner.placement.flight import flight
from planner.values.blocks import modules
from planner.values.profile import Profile

NOISE = 0.01
"""What a recompute must free at least, as a share of the fullest device's bytes: a prediction is not truer than that
(benchmarks/does_it_survive_an_audit, memory)."""


def worth_a_checkpoint(profile: Profile, samples: int) -> tuple[range, ...]:
    """Return the model's blocks that free at least as many bytes as they keep, when each is a checkpoint of its own.

    A user wraps a transformer's blocks, not the norm behind them: it would keep its output to free two numbers a token.
    """

    def make() -> tuple[range, ...]:
        found = []
        for block in modules(profile, range(len(profile.layers))):
            of = stage_memory(profile, block, samples, (block,))
            if of.saved - of.kept >= of.kept:
                found.append(block)
        return tuple(found)

    return memoised(profile, ("worth a checkpoint", samples), make)


def check(placed: Placed) -> None:
    """Raise `PlanError` (exit 2) when a plan's recompute frees nothing: its fullest device is as full without."""
    plan = placed.plan
    if not plan.recompute and not plan.recompute_blocks:
        return  # single layers are chosen by what they free
    bare = fullest(placed.with_plan(plan.without_recompute()))
    if fullest(placed) > (1 - NOISE) * bare:
        raise PlanError(
            what="recomputing frees nothing",
            where=f"plan {plan}",
            why="its fullest device keeps little besides what has to stay, or repeats as much as it keeps",
            fix="leave the recompute out",
        )


def fullest(placed: Placed) -> float:
    """Return the share of its memory that the fullest row fills: what is always there, in flight, and in passing."""
    plan = placed.plan
    rows = len(plan.groups) if plan.uneven else plan.depth
    of = [of_stage(placed, stage) for stage in range(len(placed.ranges))]
    static = static_bytes(placed, of, rows).sum(axis=1)
    having = flight(plan)
    filled = []
    for row in range(rows):
        own = [(of[s], *having.of(s)) for s in plan.stages_of[row]]
        again = placed.schedule.splits  # what a half of a backward repeats is there until the other half
        resident = sum(n * one.kept + again * half * (one.saved - one.kept) for one, _, n, half in own)
        passing = max(max(one.forward_peak - one.kept, one.backward_first_peak) for one, *_ in own)
        filled.append((static[row] + resident + passing) / placed.capacities[row])
    return float(max(filled))
