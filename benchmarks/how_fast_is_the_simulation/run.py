"""How fast is the simulation? Seconds per plan at K=8, M=32: one SimPy pass, and a whole prediction.

    .venv/bin/python benchmarks/how_fast_is_the_simulation/run.py PROFILE.json

PROFILE.json is what `plan profile` saved; the plans are those of `plan simulate --k 8 --m 32`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from planner.costs import costs_of
from planner.lowering import lower
from planner.ranking import rank
from planner.simulate import interpret, simulate
from planner.store import Store


def median_s(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of some work."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--m", type=int, default=32)
    options = parser.parse_args()
    profile = Store().load_profile(options.profile)
    ranking = rank(profile, profile.machine, k=options.k, m=options.m, batch=profile.batch, name="benchmark")
    print("| plan | actions | one pass | prediction |\n|---|---|---|---|")
    for plan in (outcome.plan for outcome in ranking.outcomes):
        program = lower(plan)
        costs = costs_of(profile, plan, program, profile.machine)
        one = median_s(lambda: interpret(program, costs, plan.devices))  # noqa: B023 - called at once
        whole = median_s(lambda: simulate(profile, plan, profile.machine))  # noqa: B023
        print(f"| {plan} | {sum(map(len, program.rows))} | {1e3 * one:.1f} ms | {1e3 * whole:.1f} ms |")


if __name__ == "__main__":
    main()
