"""What a search has found, in words and as JSON data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from planner.basis.errors import NOTHING_FITS, USAGE, PlanError
from planner.basis.units import percent, samples_words, seconds, size
from planner.cli import output, tables
from planner.cli.draw import ascii_timeline
from planner.cli.figures import figures
from planner.cli.unmet import unmet
from planner.search.answer import Answer, Family, Found, pareto
from planner.search.choice import TIE
from planner.search.cost import HOUR_S
from planner.search.explain import cheapest_change, explain
from planner.search.hiring import named, words
from planner.search.kinds import contenders
from planner.search.possible import Rejected, grouped, rejections
from planner.search.search import Search
from planner.search.space import Candidate, make, question
from planner.values.outcome import Outcome


def nothing_fits(searching: Search, answer: Answer) -> PlanError:
    """The error of a search without an answer: the nearest plans, and the cheapest change that would do."""
    missed = unmet(searching) if answer.complete or answer.late else None
    if missed is not None:
        return missed
    if answer.complete and not answer.nearest:
        of = {f.name: _impossible(searching, f) for f in answer.families if f.why and "+" not in f.name}
        reasons = grouped((name, why) for name, (why, _) in of.items())
        why = "; ".join(str(Rejected(strategies=names, why=why)) for names, why in reasons) or "there is no candidate"
        return PlanError(
            what="no plan is possible",
            where=f"cluster '{searching.cluster.name}'",
            why=why,
            fix=next((fix for _, fix in of.values() if fix), "allow other K, M or strategies"),
            code=USAGE,
        )
    change = cheapest_change(searching, answer)
    nearest = "; ".join(f"{f.label} needs {_too_much(f)}" for f in answer.nearest)
    return PlanError(
        what="no plan fits into memory" if answer.complete else "no plan that fits has been found in that time",
        where=f"cluster '{searching.cluster.name}', {answer.evaluated} candidates evaluated of {answer.points}",
        why=nearest or "nothing was evaluated",
        fix=change if answer.complete else "search longer: the same command goes on where it was",
        code=NOTHING_FITS,
        details=[{"plan": f.label, "peak_bytes": f.peak_bytes, "lack_fraction": f.lack - 1} for f in answer.nearest],
    )


def _too_much(found: Found) -> str:
    more = percent(found.lack - 1)
    return (
        f"{more} more memory of the host {found.full}" if found.full else f"{size(found.peak_bytes)}, {more} too much"
    )


def as_data(
    searching: Search, answer: Answer, outcomes: Sequence[Outcome], rows: Sequence[Outcome], rented: Sequence[Found]
) -> dict[str, Any]:
    """A search as JSON data, with units in the names."""
    return {
        "objective": answer.objective,
        "cluster": searching.cluster.name,
        "batch_samples": outcomes[0].plan.batch,
        "batches_samples": answer.batches,
        "tokens_per_sample": [n for n in answer.sequences if n] or [outcomes[0].plan.sequence],
        "complete": answer.complete,
        "left_out_better_by_at_most": answer.margin,
        "candidates": answer.points,
        "evaluated": answer.evaluated,
        "simulated_with_contention": answer.simulated,
        "search_s": answer.seconds,
        "plans_per_s": answer.evaluated / max(1e-9, answer.seconds),
        "explanation": explain(searching, answer, outcomes[0], changes=False),
        "plans": [figures(outcome) for outcome in rows],
        "pareto": [
            {
                "plan": f.label,
                "batch_samples": f.batch,
                "step_s": f.step_s,
                "peak_bytes": f.peak_bytes,
                "contention_simulated": f.exact,
            }
            for f in _front(searching, outcomes)
        ],
        "time_against_cost": [
            {
                "plan": f.label,
                "devices": len(searching.plan(f).device_names),
                "step_s": f.step_s,
                "price_per_hour": f.price_per_hour,
                f"{searching.space.unit}s": searching.terms.units,
                "seconds": searching.terms.seconds(f.step_s, f.units),
                "cost": searching.terms.money(f.step_s, f.units, f.price_per_hour),
                "contention_simulated": f.exact,
            }
            for f in rented
        ],
        "hires": [named(hire) for hire in searching.hires],
        "families": [msgspec.to_builtins(family) for family in answer.families],
        "estimated": searching.profile.estimated,
    }


def show(
    searching: Search,
    answer: Answer,
    outcomes: Sequence[Outcome],
    rows: Sequence[Outcome],
    rented: Sequence[Found],
    enough: bool,
) -> None:
    """Print the table, what the search has done, its fronts, and why the best plan is that."""
    title = f"{searching.profile.key.model} on {searching.cluster.name}, "
    lengths = answer.sequences if any(answer.sequences) else (outcomes[0].plan.sequence,)
    title += f"{samples_words(answer.batches, lengths)} per step"
    title = f"estimated: {title}" if searching.profile.estimated else title
    without, bounds = ("interval", "fits"), {f.label for f in searching.state.done.values() if not f.exact}
    bounds -= {str(outcome.plan) for outcome in outcomes if outcome.idle is None}
    tables.show(rows, title=title, best=outcomes[0], unit=searching.space.unit, without=without, bounds=bounds)
    alike = _alike(searching, answer, rows)
    if alike:
        output.results.print(alike, markup=False)
    speed = answer.evaluated / max(1e-9, answer.seconds)
    state = answer.certainty + ("" if answer.complete else "; stopped, the same command goes on")
    output.results.print(
        f"{answer.evaluated:,} of {answer.points:,} candidates evaluated in {seconds(answer.seconds)} ({speed:.0f} "
        f"plans/s), {answer.simulated} with contention: {state}"
    )
    front = [
        f"{f.label} ({'' if f.exact else 'at least '}{seconds(f.step_s)}, {size(f.peak_bytes)})"
        for f in _front(searching, outcomes)
    ]
    if len(front) > 1:
        shown = front if len(front) <= 5 else [*front[:2], f"{len(front) - 4} more", *front[-2:]]
        output.results.print(f"time against memory: {'; '.join(shown)}", markup=False)
    front = [f"{f.label} ({price_words(searching, f)})" for f in rented]
    if rented:
        stopped = "" if enough else " (stopped: there may be quicker plans)"
        output.results.print(f"time against cost: {'; '.join(front)}{stopped}", markup=False)
    hired = words(searching.cluster, searching.space.ks, searching.hires)
    if hired:
        output.results.print(hired, markup=False)
    for line in _families(searching, answer):
        output.results.print(line, markup=False)
    print(ascii_timeline(outcomes[0].trace, width=min(90, output.results.width)))
    for sentence in explain(searching, answer, outcomes[0], changes=False):
        output.results.print(sentence, markup=False)


def _front(searching: Search, outcomes: Sequence[Outcome]) -> list[Found]:
    """The plans that no other beats in both time and memory, the least memory first; those shown as they are shown."""
    simulated = {str(outcome.plan): outcome for outcome in outcomes if outcome.idle is None}

    def as_shown(found: Found) -> Found:
        outcome = simulated.get(found.label)
        if outcome is None:
            return found
        return msgspec.structs.replace(found, step_s=outcome.step_s, peak_bytes=outcome.peak_bytes, exact=True)

    return sorted(pareto(map(as_shown, contenders(searching))), key=lambda f: f.peak_bytes)


def _alike(searching: Search, answer: Answer, rows: Sequence[Outcome]) -> str:
    """Say how many plans are as good as the best and not in the table, where each line is the best of its family."""
    shown = {str(outcome.plan) for outcome in rows}
    reach = min(found.score for found in answer.leaders) * (1 + TIE)
    tied = [f for f in contenders(searching) if f.exact and f.score <= reach and f.label not in shown]
    if not tied:
        return ""
    first = min(tied, key=lambda f: f.score).label
    return f"as good as the best within {percent(TIE)}: {len(tied)} more, as {first} (--all shows them)"


def price_words(searching: Search, found: Found) -> str:
    """Say how long the samples that are asked about take, and what they cost."""
    terms, units, bound = searching.terms, found.units, "" if found.exact else "at least "
    unit = searching.space.unit
    if terms.units == searching.space.units:
        million = found.price_per_hour / HOUR_S * found.step_s / units * 1e6
        return f"{bound}{seconds(found.step_s)} a step, {bound}{million:.3g} per million {unit}s"
    spent, cost = terms.seconds(found.step_s, units), terms.money(found.step_s, units, found.price_per_hour)
    return f"{bound}{seconds(spent)}, {bound}{cost:.3g} for {terms.units:,} {unit}s"


def _impossible(searching: Search, family: Family) -> tuple[str, str]:
    """Why no plan of a family is possible, and with what the first that was tried would be, where that is known."""
    if not family.example:
        return family.why, ""
    candidate = Candidate.parse(family.example)
    try:
        make(candidate, searching.profile_of(candidate), searching.cluster)
    except PlanError as error:
        asked = question(candidate, searching.profile_of(candidate), searching.cluster)
        rejected = rejections(asked, [(candidate.how, error)])[0]
        return rejected.why, rejected.fix
    return family.why, ""


def _families(searching: Search, answer: Answer) -> list[str]:
    """Why strategies are not the answer: those that cannot be, do not fit, or may not compete."""
    impossible, too_large, barred = [], [], []
    for family in answer.families:
        if "+" in family.name or (family.fitting and not family.why):
            continue
        if family.impossible and not family.evaluated:
            why, fix = _impossible(searching, family)
            impossible.append((family.name, f"{why}; {fix}" if fix else why))
        elif family.too_large and not family.fitting:
            too_large.append(f"{family.name} ({family.too_large} candidates)")
        elif family.why and not family.impossible:
            barred.append((family.name, family.why))
    lines = [f"not possible where it might be better: {', '.join(names)}: {why}" for names, why in grouped(impossible)]
    lines += [f"does not fit: {', '.join(too_large)}"] if too_large else []
    return lines + [f"not competing: {', '.join(names)}: {_of(names, why)}" for names, why in grouped(barred)]


def _of(names: Sequence[str], why: str) -> str:
    """A reason of one in the plural, where several have it."""
    return why if len(names) == 1 else why.replace("its ", "their ").replace("lets it ", "lets them ")
