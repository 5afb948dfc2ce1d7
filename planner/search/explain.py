"""Why a plan is the best, in a few sentences: what bounds it, what is next, what would change the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from planner.basis.errors import PlanError
from planner.basis.units import percent, rate, seconds, size
from planner.costs.placed import Placed
from planner.search import objective as objectives
from planner.search.search import Answer, Found, Search, shares
from planner.search.space import Candidate
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.injection import with_bandwidth
from planner.simulate.limits import limits
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan, actions

QUICK_ACTIONS = 20_000
"""Programs up to so many actions go through SimPy when changes are tried."""
FACTORS = (1.5, 2.0, 4.0, 10.0)
"""How much faster or slower links are tried to be, or memory larger or smaller."""


def explain(
    search: Search, answer: Answer, outcome: Outcome, *, of: Found | None = None, changes: bool = True
) -> list[str]:
    """Return sentences about a plan that a search has found, the best if not another, whose outcome is given.

    `changes` asks what would change the answer.
    """
    best, cluster = answer.leaders[0], search.cluster
    everything = [f for f in search.state.done.values() if f.label and (search.stale or not f.stale)]
    if of is not None and of.key != best.key:
        behind = f"{percent(of.score / best.score - 1)} behind {best.label}, the best for {answer.objective}"
        return [_what(outcome, of, answer, behind), *_bounds(outcome, cluster)]
    text = [_what(outcome, best, answer, f"the best for {answer.objective}"), *_bounds(outcome, cluster)]
    text += [*_next(best, answer, everything), *_ruled_out(best, everything)]
    if changes:
        text += _bandwidth(search, best, everything)
        text += _memory(best, everything)
        text += _microbatches(best, everything)
    return text


def _what(outcome: Outcome, found: Found, answer: Answer, rank: str) -> str:
    plan = outcome.plan
    devices = len(plan.device_names)
    worst = max(range(len(outcome.peak)), key=lambda d: outcome.peak[d].total / outcome.capacity_bytes[d])
    held = size(outcome.peak[worst].total)
    words = objectives.get(answer.objective).words(found.score)
    on = "1 device" if devices == 1 else f"{devices} devices"
    checked = f"{answer.evaluated:,} of {answer.points:,} candidates evaluated, the others cannot be better"
    if not answer.complete:
        checked = f"stopped after {answer.evaluated:,} of {answer.points:,} candidates"
    if not found.exact:
        checked += "; what its devices share has not been simulated"
    step = f"{seconds(outcome.step_s)} per step of {plan.batch} samples on {on}"
    memory = f"{outcome.trace.devices[worst]} holds most, {held} of {size(outcome.capacity_bytes[worst])}"
    if outcome.peak_actions[worst]:
        memory += f" during {outcome.peak_actions[worst]}"
    return f"{plan} is {rank}: {words}, {step}; {memory} ({checked})."


def _bounds(outcome: Outcome, cluster: Cluster) -> list[str]:
    found = limits(outcome, cluster)
    if not found[0].share:
        return [f"It is bound by {found[0].text}."]
    return [f"It is bound by {'; and by '.join(limit.text for limit in found[:2])}."]


def _next(best: Found, answer: Answer, known: list[Found]) -> list[str]:
    """The best plan of each other strategy that fits."""
    others = _of_each_strategy(f for f in known if f.lack <= 1 and f.strategy != best.strategy)
    if not others:
        return []
    nearest = others[0]
    worse = nearest.score / best.score - 1
    less = (best.peak_bytes - nearest.peak_bytes) / best.peak_bytes
    text = f"The next best of another kind is {nearest.label}, {percent(worse)} behind"
    if abs(less) > 0.05:
        text += f" with {percent(abs(less))} {'less' if less > 0 else 'more'} memory"
    more = [f"{f.label} (+{percent(f.score / best.score - 1)})" for f in others[1:4]]
    return [text + (f"; then {', '.join(more)}." if more else ".")]


def _ruled_out(best: Found, known: list[Found]) -> list[str]:
    """What would be better and does not fit."""
    better = _of_each_strategy(f for f in known if f.lack > 1 and f.score < best.score)
    if not better:
        return []
    names = [f"{f.label} ({percent(1 - f.score / best.score)} better) lacks {percent(f.lack - 1)}" for f in better[:2]]
    return [f"Memory rules out {'; '.join(names)} of its worst device's memory."]


def _bandwidth(search: Search, best: Found, known: list[Found]) -> list[str]:
    """The smallest change of all links' bandwidth after which another strategy wins."""
    rivals = [best, *_of_each_strategy(f for f in known if f.lack <= 1 and f.strategy != best.strategy)[:8]]
    if len(rivals) == 1:
        return []

    def winner(factor: float) -> tuple[Found, float]:
        changed = with_bandwidth(search.cluster, factor)
        scores = []
        for rival in rivals:
            plan = search.plan(rival)
            try:
                scores.append((_step_s(search, plan, changed) / plan.batch, rival.key, rival))
            except PlanError:
                continue
        least, _, rival = min(scores)
        return rival, least

    return [
        _first_change(winner, best, [1 / f for f in FACTORS], "With links {:g} times slower", invert=True),
        _first_change(winner, best, list(FACTORS), "With links {:g} times faster", invert=False),
    ]


def _step_s(search: Search, plan: Plan, cluster: Cluster) -> float:
    """Seconds per step, with what is shared as far as that can be simulated while somebody waits."""
    placed = Placed(search.profile, plan, cluster)
    if shares(placed) and actions(plan) <= QUICK_ACTIONS:
        return simulated_step(placed)
    return evaluate(placed).step_s


def _first_change(
    winner: Callable[[float], tuple[Found, float]], best: Found, factors: list[float], words: str, *, invert: bool
) -> str:
    """The first factor at which another plan wins, or that none does."""
    for factor in factors:
        found, score = winner(factor)
        if found.strategy != best.strategy:
            shown = 1 / factor if invert else factor
            return f"{words.format(shown)}, {found.label} would win with {rate(1 / score)}."
    shown = 1 / factors[-1] if invert else factors[-1]
    return f"{words.format(shown)}, it would still win."


def _memory(best: Found, known: list[Found]) -> list[str]:
    """What more memory would buy, and how much less the plan can do with."""
    better = sorted((f for f in known if f.lack > 1 and f.score < best.score), key=lambda f: f.lack)
    text = []
    if better:
        gain = 1 - better[0].score / best.score
        text.append(
            f"With {percent(better[0].lack - 1)} more memory, {better[0].label} would be {percent(gain)} better."
        )
    else:
        text.append("More memory would not change the answer.")
    smaller = sorted((f for f in known if f.lack < min(0.8, 0.8 * best.lack)), key=lambda f: f.score)
    if smaller:
        text.append(
            f"With {percent(1 - best.lack)} less memory it would not fit any more; {smaller[0].label} needs "
            f"{percent(1 - smaller[0].lack / best.lack)} less, {percent(smaller[0].score / best.score - 1)} behind."
        )
    return text


def _microbatches(best: Found, known: list[Found]) -> list[str]:
    """The same point with other numbers of micro-batches."""
    mine = Candidate.parse(best.key)
    same = {}
    for found in known:
        other = Candidate.parse(found.key)
        if other._replace(m=mine.m) == mine and found.lack <= 1 and found.key != best.key:
            same[other.m] = found
    others = [f"M={m} is {percent(f.score / best.score - 1)} behind" for m, f in sorted(same.items())]
    return [f"M={mine.m} is its best: {', '.join(others[:4])}."] if others else []


def _of_each_strategy(found: Iterable[Found]) -> list[Found]:
    """The best of each strategy, best first."""
    best: dict[str, Found] = {}
    for one in sorted(found, key=lambda f: (f.score, f.key)):
        best.setdefault(one.strategy, one)
    return list(best.values())


def cheapest_change(search: Search, answer: Answer) -> str:
    """Return what would make the nearest plan fit: how much memory on the device that lacks most."""
    if not answer.nearest:
        return "no candidate could be placed at all"
    nearest = answer.nearest[0]
    room = nearest.peak_bytes / nearest.lack
    text = f"{nearest.label} needs {size(nearest.peak_bytes)} on its worst device, has {size(room)}: "
    text += f"{percent(nearest.lack - 1)} more memory per device would do"
    static = sum(layer.parameter_bytes + layer.optimizer_bytes for layer in search.profile.layers)
    devices = len(search.plan(nearest).device_names)
    if static / devices < room:
        text += ", or a smaller batch: parameters and optimizer state alone would fit"
    return text
