"""A search from the question to what is saved of its answer: what `plan search` and `plan simulate` without K do."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from planner import __version__
from planner.basis.errors import PlanError
from planner.cli import answer as answers
from planner.cli import output, runnable, tables
from planner.cli.line import LINE, again
from planner.cli.measured import warn_beyond
from planner.cli.opened import opened
from planner.cli.progress import shown
from planner.costs.host_room import check_hosts
from planner.search.answer import Answer, Found, Progress, State
from planner.search.cost import HOUR_S, Terms, with_prices
from planner.search.front import cost_front
from planner.search.kinds import contenders, decision, family, first_of_each, look_at_others
from planner.search.outlook import outlook
from planner.search.ranking import Ranking, check
from planner.search.search import Search
from planner.search.simplicity import identity
from planner.search.space import Space, space
from planner.simulate.predict import SAMPLES, SEED, simulate
from planner.store import Searched, Store
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.profile import Profile

SHOWN, EVERY = 8, 40
"""Plans that are simulated in full and shown: the best of each family; with --all or --filter the best of all."""
OTHERS_S, EVERY_S = 4.0, 12.0
"""Seconds for the best plans of other strategies, so many or all."""
FRONT_S = 20.0
"""Seconds for the front of time against cost, beside those that the search itself has taken."""


class Question(NamedTuple):
    """What is asked: see the options of `plan search`. Nothing said is the default, or the whole space."""

    profile: str | None
    cluster: str | None
    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    axes: dict[str, tuple[Any, ...]]
    objective: str = "throughput"
    epoch: int = 0
    price: float | None = None
    host_price: float | None = None
    deadline_h: float | None = None
    budget: float | None = None
    stale: bool = False
    seconds: float = float("inf")
    restart: bool = False
    samples: int = SAMPLES
    seed: int = SEED

    def terms(self, of: Space) -> Terms:
        """Return what is asked beside the objective. Raises `PlanError` (exit 2) for terms that make no sense."""
        if (self.deadline_h is not None or self.budget is not None) and not self.epoch:
            raise PlanError(
                what="a deadline or a budget is for so many samples",
                where="--deadline and --budget",
                why="--epoch does not say how many",
                fix="give them, for example --epoch 1281167",
            )
        for flag, value in (("--deadline", self.deadline_h), ("--budget", self.budget)):
            if value is not None and not (value > 0 or (value == 0 and flag == "--budget")):
                raise PlanError(
                    what=f"{flag} {value:g} makes no sense",
                    where=flag,
                    why="a deadline is more than 0 hours" if flag == "--deadline" else "a budget is not below 0",
                    fix=f"give a number from its range, for example {flag} 10",
                )
        return Terms(self.epoch or of.units, None if self.deadline_h is None else self.deadline_h * HOUR_S, self.budget)


def run(
    question: Question,
    *,
    sort: str | None = None,
    words: Sequence[str] = (),
    every: bool = False,
    json: bool = False,
) -> None:
    """Search, save, and print: the best of each family; with words those whose names have them, with `every` more."""
    from executor.abilities import able

    tables.check_column(sort)
    store, path, measured, hardware, lengths = opened(question.profile, question.cluster, question.sequences)
    store.check_writable()
    priced = with_prices(hardware, device=question.price, host=question.host_price)
    batches = question.batches or (measured.batch,)
    for number, batch in itertools.product(question.axes.get("ks") or (1,), batches):
        check(measured, k=number, m=1, batch=batch)
        hardware.take(number)
    check_hosts(measured, hardware, batches)
    for number in question.axes.get("ms") or ():
        whole = (batch for batch in batches if number > 0 and batch % number == 0)
        check(measured, k=1, m=number, batch=next(whole, batches[0]))
    several = tuple(one.sequence for one in lengths)
    of = space(measured, priced, *batches, **question.axes, sequences=several)
    searching = _begin(store, (measured, *lengths), priced, of, question)
    others = (EVERY, EVERY_S) if every or words else (SHOWN + 2, OTHERS_S)
    answer = _searched(store, searching, str(path), question.seconds, others)
    if not answer.leaders:
        raise answers.nothing_fits(searching, answer)
    found = chosen(searching, answer, words, every=every)
    outcomes = outlined(searching, found, question.samples, question.seed)
    if question.cluster is None and not measured.estimated:
        outcomes += _runnable(searching, outcomes, question.seconds, question.samples, question.seed)
    best = outcomes[0]
    ranking = Ranking(
        k=len(best.plan.device_names),
        m=best.plan.microbatches,
        batch=best.plan.batch,
        profile=store.name_of(path),
        cluster=hardware,
        outcomes=tuple(outcomes),
        stale=question.stale,
        able=tuple(str(outcome.plan) for outcome in outcomes if able(outcome.plan)),
        chosen=str(best.plan),
        asked=again(LINE.get(), store.name_of(path)),
    )
    store.save_ranking(ranking)
    warn_beyond(measured, [best.plan.samples])
    rented, enough = cost_front(searching, seconds=min(question.seconds, FRONT_S + answer.seconds))
    shown = sorted(outcomes, key=lambda o: searching.scoring.of(o.plan, o.step_s, o.peak_bytes))
    rows = tables.arranged(shown, sort, words)
    if json:
        data = answers.as_data(searching, answer, outcomes, rows, rented)
        data["time_against_cost_complete"] = enough
        output.document("search", {**data, **runnable.as_data(ranking, measured, path)})
    else:
        answers.show(searching, answer, outcomes, rows, rented, enough)
        note, _ = runnable.words(ranking, measured, path)
        if note:
            output.results.print(note, markup=False)
        output.results.print("next: plan explain best   (what would change the answer)", markup=False)


def _begin(store: Store, profiles: Sequence[Profile], cluster: Cluster, of: Space, question: Question) -> Search:
    """Make a search, with what the same one has evaluated before."""
    searching = asking(profiles, cluster, of, question.objective, question.terms(of), question.stale)
    if not question.restart and (store.root / "search.json").exists():
        try:
            before = store.load_search()
            if before.question == searching.state.question:
                searching.state.done = before.done
        except PlanError:
            pass  # a damaged file is searched again, and replaced
    return searching


def asking(
    profiles: Sequence[Profile], cluster: Cluster, of: Space, objective: str, terms: Terms, stale: bool
) -> Search:
    """Make the search of a question; the other profiles are those of its lengths.

    Its state has nothing but a digest of all that the answer depends on: what the same question has evaluated before
    belongs to it.
    """
    from executor.abilities import able

    question = [__version__, [(one.key, one.created) for one in profiles], cluster, of, objective, terms, stale]
    return Search(
        profiles[0],
        cluster,
        of,
        lengths=profiles[1:],
        objective=objective,
        terms=terms,
        stale=stale,
        state=State(question=hashlib.sha256(msgspec.json.encode(question)).hexdigest()),
        able=able,
    )


def _searched(store: Store, searching: Search, profile: str, budget: float, others: tuple[int, float]) -> Answer:
    """Run a search with its progress shown, then for so many `others` and seconds; save it however it ends."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    expected = outlook(searching)
    if expected is not None and expected.long:
        output.progress.print(str(expected))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with shown(*columns) as bar:
        task = bar.add_task("searching", total=None)

        def told(progress: Progress) -> None:
            left = progress.remaining_s * progress.per_second
            best = (
                f"best {progress.best}, {searching.scoring.words(progress.score)}"
                if progress.best
                else "nothing fits yet"
            )
            bar.update(
                task,
                description=f"{progress.per_second:.0f} plans/s, {best}",
                completed=progress.seen,
                total=progress.seen + left,
            )

        try:
            answer = searching.run(told, seconds=budget)
            if answer.leaders and answer.complete:
                look_at_others(searching, others[0], min(budget, others[1]))
            return answer
        finally:
            store.save_search(
                Searched(
                    question=searching.state.question,
                    profile=profile,
                    cluster=searching.cluster,
                    space=searching.space,
                    objective=searching.objective.name,
                    terms=searching.terms,
                    stale=searching.stale,
                    answer=searching.answer(),
                    done=searching.state.done,
                )
            )


def chosen(searching: Search, answer: Answer, words: Sequence[str] = (), *, every: bool = False) -> list[Found]:
    """Return what is shown: the best plan, then the best of each family that was evaluated, each line a decision.

    With `every` the best of all, and with words those whose names have all of them, whatever their family. Two names of
    one plan are one. Raises `PlanError` (exit 2) when no plan that was evaluated has the words.
    """
    single = every or bool(words)

    def does(found: Found) -> object:
        return identity(searching.plan(found)) if single else decision(searching, found)

    best, rivals = answer.leaders[0], contenders(searching)
    named = [found for found in rivals if all(word in found.label for word in words)]
    if not named:
        raise PlanError(
            what=f"no plan's name has {' and '.join(words)}",
            where="--filter",
            why=f"of the {len(rivals)} plans that were evaluated and fit; no other can be as good as {best.label}",
            fix="search among them alone, as with --strategy gpipe, or leave --filter out",
        )
    if single:
        found = first_of_each(searching, named, does, EVERY)
    else:
        others = (one for one in rivals if family(one) != family(best))
        found = first_of_each(searching, others, family, 2 * SHOWN)
    distinct = {does(one): one for one in (*reversed(found), best)}
    rest = (one for one in found if distinct[does(one)] is one and one.key != best.key)
    return [best, *rest][: EVERY if single else SHOWN]


def outlined(searching: Search, shown: Sequence[Found], samples: int, seed: int) -> list[Outcome]:
    """Simulate plans in full: contention, spread, memory over time."""
    outcomes = []
    for found in shown:
        plan = searching.plan(found)
        outcomes.append(simulate(searching.profile_of(plan), plan, searching.cluster, samples=samples, seed=seed))
    return outcomes


def _runnable(searching: Search, outcomes: Sequence[Outcome], budget: float, samples: int, seed: int) -> list[Outcome]:
    """Return the best plan that the executor can run, where the leaders have none: `plan run best` takes it."""
    from executor.abilities import able

    if any(able(outcome.plan) for outcome in outcomes):
        return []
    another = searching.like(allowed=able)
    plans = map(another.plan, another.run(seconds=budget).leaders[:1])
    return [simulate(another.profile_of(plan), plan, another.cluster, samples=samples, seed=seed) for plan in plans]
