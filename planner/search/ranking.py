"""All strategies asked the same question, simulated and ranked: the answer to `plan simulate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from planner.basis.errors import NOTHING_FITS, USAGE, PlanError
from planner.basis.units import samples_words, size
from planner.orders.codes import MICROBATCH, STAGES
from planner.placement.question import Mapping, Question
from planner.placement.strategies import Axis, Strategy, all_strategies
from planner.search.choice import Merit, choose, merit
from planner.search.possible import Rejected, rejections
from planner.search.simplicity import identity
from planner.simulate.contention import Failure
from planner.simulate.predict import SAMPLES, SEED, simulate
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan, asynchronous
from planner.values.profile import Profile

DEFAULT_SAVINGS: tuple[tuple[str, ...], ...] = ((), ("recompute",))
"""With and without recompute; where there is nothing to recompute, without."""


SAMPLES_AT_MOST = 2**53
"""Samples of a step: whole numbers up to it are exact as seconds and bytes are reckoned."""


ENOUGH_S = 40.0
"""Seconds from which on no further plan is simulated: with the one that is begun, and the table, about a minute."""


class Shape(NamedTuple):
    """What is asked of a pipeline besides K and M: see `Question`."""

    replicas: int = 1
    tensor: int = 1
    chunks: int = 0
    synchronisation: str = ""
    mapping: Mapping = ""


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The outcomes: those that fit by throughput, then those that do not by how much they lack.

    `able` are the plans, by their labels, that can be run. Where a search has decided, by whatever objective, `chosen`
    is its best plan's label, and the outcomes are in its order. `asked` is the command that asks the same again. For
    plans that are `left_out`, by strategy and savings, there was no time.
    """

    k: int
    m: int
    batch: int
    profile: str
    cluster: Cluster
    outcomes: tuple[Outcome, ...]
    stale: bool = False
    rejected: tuple[Rejected, ...] = ()
    able: tuple[str, ...] = ()
    chosen: str = ""
    asked: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def best(self) -> Outcome:
        """The plan that fits and is the fastest, or the simplest of those that are as fast (`planner.search.choice`).

        Its gradients are not stale unless `stale` lets them be. Raises `PlanError` (exit 3) with the nearest plans when
        none fits, and (exit 2) when there is none at all.
        """
        decided = next((outcome for outcome in self.outcomes if str(outcome.plan) == self.chosen), None)
        if decided is not None:
            return decided
        fitting = self._contenders()
        if not fitting:
            raise self._nothing_fits()
        return choose([(self._merit(outcome), outcome) for outcome in fitting])

    def runnable(self, able: Callable[[Plan], bool]) -> Outcome:
        """Return the best plan that is `able` to be run, the best one where none is. Raises as `best`."""
        best = self.best
        if able(best.plan):
            return best
        those = [o for o in self._contenders() if not asynchronous(o.plan) and able(o.plan)]
        if self.chosen:
            return those[0] if those else best
        return choose([(self._merit(outcome), outcome) for outcome in those]) if those else best

    def _merit(self, outcome: Outcome) -> Merit:
        return merit(outcome, runnable=str(outcome.plan) in self.able)

    def _contenders(self) -> list[Outcome]:
        """Those that may be the best: what recomputes where its twin fits without only differs from it by noise."""
        fitting = [o for o in self.outcomes if o.fits and (self.stale or not asynchronous(o.plan))]
        bare = {identity(o.plan) for o in fitting if not o.plan.recomputes}
        return [o for o in fitting if not o.plan.recomputes or identity(o.plan.without_recompute()) not in bare]

    def _nothing_fits(self) -> PlanError:
        if not self.outcomes:
            return PlanError(
                what="no plan is possible",
                where=f"cluster '{self.cluster.name}', K={self.k}, M={self.m}",
                why="; ".join(rejected.reason for rejected in self.rejected) or "there is no strategy",
                fix=next((rejected.fix for rejected in self.rejected if rejected.fix), "change K or M"),
                code=USAGE,
            )
        nearest = self.outcomes[:3]
        lines = [
            f"{o.plan} needs {size(o.tightest.need_bytes)} on {o.tightest.name}, has {size(o.tightest.has_bytes)}"
            for o in nearest
        ]
        what = f"{nearest[0].tightest.name} with {size(nearest[0].tightest.need_bytes)}"
        return PlanError(
            what="no plan fits into memory",
            where=f"cluster '{self.cluster.name}', K={self.k}, M={self.m}",
            why="; ".join(lines),
            fix=f"{what} would hold {nearest[0].plan}",
            code=NOTHING_FITS,
            details=[
                {"plan": str(o.plan), "peak_bytes": o.peak_bytes, "capacity_bytes": min(o.capacity_bytes)}
                for o in nearest
            ],
        )


def rank(
    profile: Profile,
    cluster: Cluster,
    *,
    k: int,
    m: int,
    batch: int,
    name: str,
    strategies: Sequence[Strategy] | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
    stale: bool = False,
    failures: tuple[Failure, ...] = (),
    shapes: Sequence[Shape] = (Shape(),),
    savings: Sequence[tuple[str, ...]] = DEFAULT_SAVINGS,
    able: Callable[[Plan], bool] = lambda plan: True,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Ranking:
    """Simulate every strategy with every set of savings, for K devices and M micro-batches.

    `shapes` say what else is asked: replicas, chunks, tensor splits, synchronisation. Strategies that decide about
    these themselves have no part in such a question.
    `progress` is told what is simulated, and how many of how many plans are done.
    Of plans that are as good, one that is `able` to be run is preferred to one that is as simple and is not.
    Where that takes longer than `ENOUGH_S`, strategies that are left are not simulated, but named.
    Raises `PlanError` (exit 2) when K, M or the batch are not positive, or M does not divide the batch.
    """
    check(profile, k=k, m=m, batch=batch)
    question = Question(profile, cluster, k, m, batch)
    outcomes: list[Outcome] = []
    failed: list[tuple[Strategy, PlanError]] = []
    questions = [question._replace(**shape._asdict()) for shape in shapes]
    begun, left_out = time.monotonic(), list[str]()

    def late(label: str) -> bool:
        if outcomes and time.monotonic() - begun > ENOUGH_S:
            left_out.append(label)
        return label in left_out

    for entry, plan in _plans(questions, strategies or all_strategies(), savings, progress, late):
        if isinstance(plan, PlanError):
            failed.append((entry, plan))
            continue
        try:
            outcomes.append(simulate(profile, plan, cluster, samples=samples, seed=seed, failures=failures))
        except PlanError as error:
            failed.append((entry, error))
    distinct: dict[tuple[object, ...], Outcome] = {}
    for outcome in outcomes:  # two names of one plan are one: the first registered
        distinct.setdefault(identity(outcome.plan), outcome)
    outcomes = list(distinct.values())
    outcomes.sort(key=lambda o: (not o.fits, -o.throughput if o.fits else o.tightest.lack))
    return Ranking(
        k=k,
        m=m,
        batch=batch,
        profile=name,
        cluster=cluster,
        outcomes=tuple(outcomes),
        stale=stale,
        rejected=rejections(questions[0], failed) if not left_out else (),
        left_out=tuple(dict.fromkeys(left_out)),
        able=tuple(str(outcome.plan) for outcome in outcomes if able(outcome.plan)),
    )


def check(profile: Profile, *, k: int, m: int, batch: int) -> None:
    """Raise `PlanError` (exit 2) for a question that has no answer."""
    for flag, value in (("--k", k), ("--m", m), ("--batch", batch)):
        if value < 1:
            raise PlanError(
                what=f"{flag} must be positive", where=flag, why=f"it is {value}", fix=f"give a number from 1: {flag} 1"
            )
    for flag, value, most, of in (
        ("--k", k, STAGES + 1, "devices"),
        ("--m", m, MICROBATCH, "micro-batches"),
        ("--batch", batch, SAMPLES_AT_MOST, "samples"),
    ):
        if value > most:
            raise PlanError(
                what=f"{flag} {value} is too large",
                where=flag,
                why=f"a step has at most {most:,} {of}",
                fix=f"{flag} 8",
            )
    if m > batch:
        raise PlanError(
            what=f"M={m:,} micro-batches are more than the {samples_words([batch])} of a batch",
            where="--m and --batch",
            why="each has a sample at least",
            fix=f"--m {max(1, batch // profile.least)}, or fewer; or a larger --batch",
        )
    if batch % m:
        raise PlanError(
            what=f"M={m} micro-batches do not divide a batch of {batch} samples",
            where="--m and --batch",
            why=f"{batch} / {m} = {batch / m:.3g} is not a whole number of samples",
            fix=f"plan simulate --k {k} --m {m} --batch {(batch // m + 1) * m}",
        )
    check_least(profile, batch // m, "--m and --batch", f"--m {max(1, batch // profile.least)}, or fewer")


def check_least(profile: Profile, samples: int, where: str, fix: str) -> None:
    """Raise `PlanError` (exit 2) for micro-batches of fewer samples than the model takes."""
    if samples < profile.least:
        raise PlanError(
            what=f"micro-batches of {samples_words([samples])} are too small for the model",
            where=where,
            why=f"its batch norm needs {profile.least}: a single number has no variance, as torch says, too",
            fix=fix,
        )


def _plans(
    questions: Sequence[Question],
    strategies: Sequence[Strategy],
    savings: Sequence[tuple[str, ...]],
    progress: Callable[[str, int, int], None],
    late: Callable[[str], bool],
) -> Iterator[tuple[Strategy, Plan | PlanError]]:
    """Yield the plans of all that is not `late`, or why there are none; a plan is cut with its savings in mind."""
    every = [*itertools.product(questions, strategies, enumerate(savings))]
    for done, (question, entry, (index, chosen)) in enumerate(every):
        label = "+".join((entry.name, *chosen))
        if late(label):
            continue
        progress(f"simulating {label}", done, len(every))
        try:
            _heeds(entry, question)
            yield entry, entry.spread(question._replace(savings=chosen))
        except PlanError as error:
            if index == 0 or savings is not DEFAULT_SAVINGS:
                yield entry, error
    progress("looking for what would make the rest possible", len(every), len(every))


def _heeds(entry: Strategy, question: Question) -> None:
    """Raise `PlanError` (exit 2) for a strategy that would not do what the question asks."""
    asked: dict[Axis, bool] = {
        "replicas": question.replicas > 1,
        "chunks": question.chunks > 0,
        "tensor": question.tensor > 1,
        "synchronisation": bool(question.synchronisation),
    }
    ignored = [axis for axis, wanted in asked.items() if wanted and axis not in entry.takes]
    if ignored:
        raise PlanError(
            what=f"{entry.name} cannot be arranged",
            where=f"--{ignored[0]}",
            why=f"they decide about {' and '.join(ignored)} themselves",
            fix=f"leave --{ignored[0]} out",
        )
