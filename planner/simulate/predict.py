"""A prediction: one plan's step on a cluster, its memory curve, and how sure its time is."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.priced import Costs, costs_of
from planner.costs.stage_costs import QUANTILES, Quantile
from planner.programs.lowering import lower
from planner.programs.waits import Linked
from planner.simulate.contention import Failure, Run
from planner.simulate.outline import outline
from planner.simulate.steady import steady_step
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome, rooms
from planner.values.plan import Plan, actions, asynchronous
from planner.values.profile import Profile
from planner.values.trace import Trace

SAMPLES = 3
"""Steps drawn per prediction: a step has dozens of draws, so few steps are enough."""
SEED = 0


ROUNDING, WAITS = 1e-3, 9
"""A step that waits for its batch is played again until it is as near, and so often at most."""

LARGE = 150_000
"""Actions beyond which SimPy would need many seconds for each pass."""


def simulate(
    profile: Profile,
    plan: Plan,
    cluster: Cluster,
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
    failures: tuple[Failure, ...] = (),
) -> Outcome:
    """Predict one step of `plan` on `cluster`: its trace, its memory curve and the interval of its step time.

    A step waits again and again for the slower of its devices, so jitter costs time even where no median changes.
    Therefore every action's duration is drawn from its measured spread, for `samples` steps, and the median step is the
    prediction. Where workers need longer for a batch than a step takes, the step waits for them. The interval simulates
    the step at the 10th and the 90th percentile of all durations at once. A program of more than `LARGE` actions is
    outlined instead (`planner.simulate.outline`): nothing shared, nothing drawn.
    """
    placed = Placed(profile, plan, cluster)
    if actions(plan) > LARGE and not failures:
        return outline(placed)
    costs = costs_of(placed, Linked(lower(plan)))
    rows = {name: row for row, group in zip(plan.devices, plan.groups, strict=True) for name in group}
    failures = tuple(failure._replace(device=rows.get(failure.device, "")) for failure in failures)

    def played(prices: Costs) -> Run:
        run = Run(prices, plan.devices, together=not placed.synchronisation.asynchronous, failures=failures)
        run.play()
        return run

    def step(prices: Costs, quantile: Quantile = "median") -> Run:
        run = played(prices)
        least = max(run.made, float(prices.least[list(QUANTILES).index(quantile)]))
        for _ in range(WAITS):  # a part of what waits may be hidden
            if run.last >= least * (1 - ROUNDING) or asynchronous(plan):
                break
            prices = dataclasses.replace(prices, late=prices.late + least - run.last)
            run = played(prices)
        return run

    if costs.certain:
        steps = [step(costs)]
        low = high = steps[0]
    else:
        random = np.random.default_rng(seed)
        steps = [step(costs.drawn(random)) for _ in range(samples)]
        low, high = step(costs.at("low"), "low"), step(costs.at("high"), "high")

    def seconds(run: Run) -> float:
        return steady_step(plan, costs.linked, np.array(run.end)) if asynchronous(plan) else run.last

    middle = sorted(steps, key=seconds)[len(steps) // 2]
    memory = MemoryModel(placed, costs.linked)
    trace = msgspec.structs.replace(middle.trace(), memory=memory.curve(middle.ready, middle.end))
    ends = (seconds(low), seconds(high), seconds(middle))
    return Outcome(
        plan=plan,
        source="simulated",
        steps=(trace,),
        profiled_s=dataclasses.replace(costs, late=middle.costs.late).by_operation,
        interval_s=(min(ends), max(ends)),
        capacity_bytes=placed.capacities,
        hosts=rooms(memory.hosts, placed.host_capacities),
        step_times_s=(seconds(middle),) if asynchronous(plan) else (),
        samples_s=tuple(sorted(map(seconds, steps))),
        estimated=profile.estimated,
    )


def replay(profile: Profile, plan: Plan, cluster: Cluster, measured: Trace) -> float:
    """Put the measured computing times of one step through the simulator, and return the seconds of the step.

    A plan without flush has a pipeline that is full then.
    """
    costs = costs_of(Placed(profile, plan, cluster), Linked(lower(plan)))
    overlap = asynchronous(plan)
    run = Run(costs.replayed(measured, plan.microbatches // plan.pipelines if overlap else 0), plan.devices)
    run.play()
    return steady_step(plan, costs.linked, np.array(run.end)) if overlap else run.last
