"""Why a plan is the best, in a few sentences: what bounds it, what is next, what would change the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from planner.basis.errors import PlanError
from planner.basis.units import percent, samples_words, seconds, size
from planner.costs.placed import Placed
from planner.search.answer import Answer, Found
from planner.search.choice import choose
from planner.search.kinds import QUICK_ACTIONS, decision, first_of_each, settled, strategy
from planner.search.search import Search, shares
from planner.search.space import Candidate
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.injection import with_bandwidth
from planner.simulate.limits import limits
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan, actions

NAMED = 4
"""Plans that one sentence names."""
FACTORS = (1.5, 2.0, 4.0, 10.0)
"""How much faster or slower links are tried to be, or memory larger or smaller."""


def explain(
    search: Search, answer: Answer, outcome: Outcome, *, of: Found | None = None, changes: bool = True
) -> list[str]:
    """Return sentences about a plan that a search has found, the best if not another, whose outcome is given.

    `changes` asks what would change the answer. Of a plan whose time is only a lower bound it is said how much worse it
    is at least; the few that are named are simulated first, where that is quick.
    """
    best, cluster = answer.leaders[0], search.cluster
    everything = [f for f in search.state.done.values() if f.label and not f.late and (search.stale or not f.stale)]
    if of is not None and of.key != best.key:
        against = f"compared with {best.label}, the best for {answer.objective}"
        rank = f"{_behind(best, settled(search, of))}, {against}"
        if of.lack > 1:
            lacking = f"the host {of.full}" if of.full else "its worst device"
            rank = f"too large, as it lacks {percent(of.lack - 1)} of the memory of {lacking}, {against}"
        elif of.late:
            rank = f"too late or too dear for what was asked, {against}"
        elif of.stale and not search.stale:
            rank = f"not competing, as its gradients are stale, {against}"
        return [_what(search, outcome, of, answer, rank), *_bounds(outcome, cluster)]
    text = [_what(search, outcome, best, answer, f"the best for {answer.objective}"), *_bounds(outcome, cluster)]
    own = decision(search, best)

    def kind(found: Found) -> object:
        return own if decision(search, found) == own else found.strategy  # another name is no other kind

    others = (f for f in everything if f.lack <= 1 and f.strategy != best.strategy)
    rivals = [f for f in first_of_each(search, others, kind, NAMED + 1) if kind(f) != own][:NAMED]
    larger = [
        f for f in first_of_each(search, (f for f in everything if f.lack > 1), strategy, NAMED) if f.score < best.score
    ]
    text += [*_next(best, rivals), *_ruled_out(best, larger)]
    if changes:
        if answer.objective != "memory":
            text += _bandwidth(search, best, everything)
        sure = not any(family.too_large for family in answer.families)
        text += _memory(search, best, larger, everything, sure=sure)
        text += _microbatches(search, best, everything)
        text += _batches(search, best, everything)
        text += _lengths(search, best, everything)
    return text


def _behind(best: Found, found: Found) -> str:
    """How much worse a plan is than the best: a figure where both times are known, else what it is at least."""
    worse = found.score / best.score - 1
    if not best.exact and not found.exact:
        return f"{percent(abs(worse))} {'behind' if worse >= 0 else 'ahead'}, what devices share left out"
    if abs(worse) < 0.0005:
        return "as good" if found.exact else "as good at best"
    if worse < 0:
        decider = best.merit.decider(found.merit)
        return f"{percent(-worse)} ahead{'' if found.exact else ' at best'}, a tie that goes to {decider}"
    return f"{'' if found.exact else 'at least '}{percent(worse)} behind"


def _better(best: Found, found: Found) -> str:
    """How much better a plan would be that does not fit: at most so much where its time is only a bound."""
    return f"{'' if found.exact else 'at most '}{percent(1 - found.score / best.score)} better"


def _what(search: Search, outcome: Outcome, found: Found, answer: Answer, rank: str) -> str:
    plan = outcome.plan
    devices = len(plan.device_names)
    worst = max(range(len(outcome.peak)), key=lambda d: outcome.peak[d].total / outcome.capacity_bytes[d])
    held = size(outcome.peak[worst].total)
    words = search.words(search.score(plan, outcome.step_s, outcome.peak_bytes))
    on = "1 device" if devices == 1 else f"{devices} devices"
    checked = f"{answer.evaluated:,} of {answer.points:,} candidates evaluated, {answer.certainty}"
    if not answer.complete:
        checked = f"stopped after {answer.evaluated:,} of {answer.points:,} candidates"
    if not found.exact and outcome.idle is not None:
        checked += "; what its devices share has not been simulated"
    step = f"{seconds(outcome.step_s)} per step of {samples_words([plan.batch], [plan.sequence])} on {on}"
    memory = f"{outcome.trace.devices[worst]} holds most, {held} of {size(outcome.capacity_bytes[worst])}"
    if outcome.peak_actions[worst]:
        memory += f" during {outcome.peak_actions[worst]}"
    return f"{plan} is {rank}: {words}, {step}; {memory} ({checked})."


def _bounds(outcome: Outcome, cluster: Cluster) -> list[str]:
    found = limits(outcome, cluster)
    if not found[0].share:
        return [f"It is bound by {found[0].text}."]
    return [f"It is bound by {'; and by '.join(limit.text for limit in found[:2])}."]


def _next(best: Found, others: list[Found]) -> list[str]:
    """The best plan of each other strategy that fits."""
    if not others:
        return []
    nearest = others[0]
    less = (best.peak_bytes - nearest.peak_bytes) / best.peak_bytes
    text = f"Of the other kinds that were evaluated, {nearest.label} is next, {_behind(best, nearest)}"
    if abs(less) > 0.05:
        text += f", with {percent(abs(less))} {'less' if less > 0 else 'more'} memory"
    more = [f"{f.label} ({_behind(best, f)})" for f in others[1:]]
    return [text + (f"; then {', '.join(more)}." if more else ".")]


def _ruled_out(best: Found, better: list[Found]) -> list[str]:
    """What would be better and does not fit."""
    if not better:
        return []
    names = [f"{f.label} ({_better(best, f)}) lacks {percent(f.lack - 1)}" for f in better[:2]]
    return [f"Memory rules out {'; '.join(names)} of its worst device's memory."]


def _bandwidth(search: Search, best: Found, known: list[Found]) -> list[str]:
    """The smallest change of all links' bandwidth after which another strategy wins, by the objective asked for."""
    rivals = [best, *_of_each_strategy(f for f in known if f.lack <= 1 and f.strategy != best.strategy)[:8]]
    if len(rivals) == 1:
        return []

    def winner(factor: float) -> tuple[Found, float]:
        changed = with_bandwidth(search.cluster, factor)
        found = []
        for rival in rivals:
            plan = search.plan(rival)
            try:
                step_s = _step_s(search, plan, changed)
            except PlanError:
                continue
            score = search.score(plan, step_s, rival.peak_bytes)
            found.append(msgspec.structs.replace(rival, score=score, step_s=step_s, exact=True))
        best = choose([(one.merit, one) for one in found])
        return best, best.score

    def first_change(factors: Iterable[float], change: str) -> str:
        for factor in factors:
            found, score = winner(factor)
            if found.strategy != best.strategy:
                times = max(factor, 1 / factor)
                return f"With links {times:g} times {change}, {found.label} would win: {search.words(score)}."
        others = f"the best of {len(rivals) - 1} other kinds"
        return f"With links {FACTORS[-1]:g} times {change}, it would still win against {others}."

    return [first_change((1 / f for f in FACTORS), "slower"), first_change(FACTORS, "faster")]


def _step_s(search: Search, plan: Plan, cluster: Cluster) -> float:
    """Seconds per step, with what is shared as far as that can be simulated while somebody waits."""
    placed = Placed(search.profile_of(plan), plan, cluster)
    if shares(placed) and actions(plan) <= QUICK_ACTIONS:
        return simulated_step(placed)
    return evaluate(placed).step_s


def _memory(search: Search, best: Found, better: list[Found], known: list[Found], *, sure: bool) -> list[str]:
    """What more memory would buy (`sure`: nothing was too large), and how much less the plan can do with."""
    text = []
    if better:
        nearest = min(better, key=lambda f: f.lack)
        more = percent(nearest.lack - 1)
        text.append(f"With {more} more memory, {nearest.label} would be {_better(best, nearest)}.")
    elif sure:
        text.append("More memory would not change the answer.")
    smaller = [f for f in known if f.lack < min(0.8, 0.8 * best.lack)]
    if smaller:
        chosen = choose([(found.merit, found) for found in smaller])  # as a search among them would
        text.append(
            f"With more than {percent(1 - best.lack)} less memory it would not fit any more; {chosen.label} needs "
            f"{percent(1 - chosen.lack / best.lack)} less, {_behind(best, settled(search, chosen))}."
        )
    return text


def _microbatches(search: Search, best: Found, known: list[Found]) -> list[str]:
    """The same point with other numbers of micro-batches."""
    mine = Candidate.parse(best.key)
    same = {}
    for found in known:
        other = Candidate.parse(found.key)
        if other._replace(m=mine.m) == mine and found.lack <= 1 and found.key != best.key:
            same[other.m] = found
    near = sorted(sorted(same, key=lambda m: same[m].score)[:NAMED])
    others = [f"M={m} is {_behind(best, settled(search, same[m]))}" for m in near]
    return [f"With other M: {', '.join(others)}."] if others else []


def _batches(search: Search, best: Found, known: list[Found]) -> list[str]:
    """The best of each other batch."""
    settled = _best_of_other(search, best, known, lambda f: f.batch)
    others = [f"of {found.batch} samples {found.label} is {_behind(best, found)}" for found in settled]
    return [f"With other batches: {', '.join(others)}."] if others else []


def _lengths(search: Search, best: Found, known: list[Found]) -> list[str]:
    """The best of each other sequence length."""
    settled = _best_of_other(search, best, known, lambda f: f.sequence)
    others = [f"of {found.sequence} tokens {found.label} is {_behind(best, found)}" for found in settled]
    return [f"With other sequences: {', '.join(others)}."] if others else []


def _best_of_other(search: Search, best: Found, known: list[Found], what: Callable[[Found], int]) -> list[Found]:
    """The best plan that fits for every value that the best plan does not have, each with its own time."""
    first: dict[int, Found] = {}
    for found in sorted((f for f in known if f.lack <= 1), key=lambda f: (f.score, not f.exact, f.key)):
        if what(found) != what(best):
            first.setdefault(what(found), found)
    return [settled(search, first[value]) for value in sorted(first)]


def _of_each_strategy(found: Iterable[Found]) -> list[Found]:
    """The best of each strategy by its bound, best first."""
    best: dict[str, Found] = {}
    for one in sorted(found, key=lambda f: (f.score, f.key)):
        best.setdefault(one.strategy, one)
    return list(best.values())


def cheapest_change(search: Search, answer: Answer) -> str:
    """Return what would make the nearest plan fit: how much memory on the device that lacks most."""
    if not answer.nearest:
        return "no candidate could be placed at all"
    nearest = answer.nearest[0]
    if nearest.full:
        return f"{nearest.label} needs {percent(nearest.lack - 1)} more memory of the host {nearest.full}"
    room = nearest.peak_bytes / nearest.lack
    text = f"{nearest.label} needs {size(nearest.peak_bytes)} on its worst device, has {size(room)}: "
    text += f"{percent(nearest.lack - 1)} more memory per device would do"
    static = sum(layer.parameter_bytes + layer.optimizer_bytes for layer in search.profile.layers)
    devices = len(search.plan(nearest).device_names)
    if static / devices < room:
        text += ", or a smaller batch: parameters and optimizer state alone would fit"
    return text
