"""Why a plan is the best, in a few sentences: what bounds it, what is next, what would change the answer."""

from __future__ import annotations

from collections.abc import Callable

from planner.basis.units import percent, samples_words, seconds, size
from planner.search.answer import Answer, Found
from planner.search.changed import with_more_memory, with_other_links
from planner.search.choice import choose
from planner.search.kinds import decision, first_of_each, settled, strategy
from planner.search.search import Search
from planner.search.space import Candidate
from planner.simulate.limits import bounded_by
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome

NAMED = 4
"""Plans that one sentence names."""


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
            text += with_other_links(search, best, everything)
        text += with_more_memory(search, best, everything, larger)
        text += _less_memory(search, best, everything)
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
    words = search.scoring.words(search.scoring.of(plan, outcome.step_s, outcome.peak_bytes))
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
    return [f"It is bound by {bounded_by(outcome, cluster)}."]


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


def _less_memory(search: Search, best: Found, known: list[Found]) -> list[str]:
    """How much less memory the plan can do with, and which of those evaluated needs less."""
    smaller = [f for f in known if f.lack < min(0.8, 0.8 * best.lack)]
    if not smaller:
        return []
    chosen = choose([(found.merit, found) for found in smaller])  # as a search among them would
    return [
        f"With more than {percent(1 - best.lack)} less memory it would not fit any more; of those evaluated "
        f"{chosen.label} needs {percent(1 - chosen.lack / best.lack)} less, {_behind(best, settled(search, chosen))}."
    ]


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
