"""The best plan of a whole space, found without simulating all of it, and provably the same.

A candidate is looked at three times, each dearer and closer to the truth than the one before: a bound that costs
nothing, the fast interpreter's time, which sharing can only make longer, and SimPy's. Always the most promising look is
taken next, so when the most promising is no better than what is certain, nothing that was left out could beat it.
A search ends earlier: a plan that could be better only by what a prediction cannot tell (`planner.search.choice`) is
looked at where it is simpler, for the simplest of those that are as good is the best. By how much something that was
left out could be better is said with the answer.
"""

from __future__ import annotations

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import numpy as np

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.placement import savings
from planner.search.answer import Answer, Found, Progress, State, pareto
from planner.search.bounds import Bounds
from planner.search.cost import Terms, price_per_hour
from planner.search.dominance import by_least, dominated, orders_by_seconds, slowing
from planner.search.hiring import HIRES
from planner.search.making import Plans
from planner.search.order import ordered
from planner.search.plan_bounds import plan_bound, plan_lack
from planner.search.scoring import Scoring
from planner.search.simplicity import identity, mechanisms
from planner.search.space import Block, Candidate, Space, blocks
from planner.search.standings import Standings
from planner.search.tally import Tally
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import Evaluation, evaluate
from planner.values.cluster import Cluster
from planner.values.plan import Plan, actions, asynchronous
from planner.values.profile import Profile

LARGER = 4
"""Of the plans that are ruled out as too large before they are made so many are looked at in the end."""
ACTIONS = 100_000
"""Programs with more actions are not walked by SimPy within a search: their time is the fast interpreter's."""


WORTH_A_LOOK = 0.98
"""A candidate that looks better than the best by this factor is looked at closely at once: it rules others out."""
TELL_S = 0.1
"""Seconds between two reports of progress."""


class _Unmade(NamedTuple):
    """A candidate in the queue of which no plan has been made, nor any with more savings been put there."""

    candidate: Candidate

    @property
    def key(self) -> str:
        """The candidate's key."""
        return self.candidate.key


class Search:
    """A search that can be stopped after any candidate and taken up again."""

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        space: Space,
        *,
        lengths: Iterable[Profile] = (),
        among: Iterable[Block] | None = None,
        objective: str = "throughput",
        terms: Terms | None = None,
        stale: bool = False,
        state: State | None = None,
        able: Callable[[Plan], bool] = lambda plan: True,
        allowed: Callable[[Plan], bool] = lambda plan: True,
    ) -> None:
        """`lengths` are profiles of the same model for the several sequence lengths of a space, one of each.

        `among` are the blocks of the space that are searched, if not all.

        Plans that are not `allowed` are not looked at, and not kept with the state.
        Of plans that are as good, one that is `able` to be run is preferred to one that is as simple and is not.
        """
        self.able, self.allowed = able, allowed
        self.profile, self.cluster, self.space = profile, cluster, space
        self.lengths = {one.sequence: one for one in lengths}
        self.scoring, self.stale = Scoring(objective, terms or Terms(space.units), cluster, space.unit), stale
        self.objective, self.terms = self.scoring.objective, self.scoring.terms
        self.state = state or State(question="")
        money = self.objective.priced or self.terms.budget is not None
        every = space._replace(hires=space.hires or (HIRES if money else ()))
        self.blocks = list(blocks(every, profile, cluster)) if among is None else list(among)
        self.hires = tuple(hire for hire in HIRES if any(block.point.hire == hire for block in self.blocks))
        self.plans = Plans(profile, cluster, space, self.lengths)
        self.bounds: dict[tuple[int, str, int], Bounds] = {}
        """Of each length and hire."""
        self.larger: list[tuple[float, str]] = []
        """Candidates that were put aside, as no plan of theirs fits: how much they lack at least, a heap."""
        self.aside = set[Candidate]()
        on_host = any(savings.states_on_host(chosen) for chosen in space.savings)
        self.order, self.large = ordered(
            self.blocks, self._bounds_of, self.scoring.least_of, on_host=on_host, stale=stale
        )
        self.slowing = frozenset.intersection(
            *(slowing(self.lengths.get(n, profile), cluster) for n in space.sequences)
        )
        self.quickening = len(self.slowing) < len(savings.names())
        self.savings = by_least(space.savings)
        self.known: dict[Candidate, list[tuple[frozenset[str], Found]]] = defaultdict(list)
        self.same: dict[int, str] = {}
        """The key of the candidate that first was each plan."""
        self.tally = Tally(self.blocks, space.savings, stale=stale)
        self.queue: list[tuple[float, int, str, Candidate | Found | _Unmade]] = []
        self.standings = Standings()
        self.frontier = 0.0
        self.seen = self.evaluated = self.simulated = 0
        self.began = time.monotonic()
        self.complete = False

    def _bounds_of(self, point: Candidate) -> Bounds:
        """Bounds for plans of a point's length on the devices that it hires."""
        key = point.sequence, point.hire, point.devices if point.hire else 0
        if key not in self.bounds:
            self.bounds[key] = Bounds(self.profile_of(point), point.offered(self.cluster))
        return self.bounds[key]

    def run(self, tell: Callable[[Progress], None] = lambda progress: None, *, seconds: float = float("inf")) -> Answer:
        """Search until nothing can be better, or for so many seconds; `tell` is called about ten times a second."""
        told = 0.0
        while True:
            now = time.monotonic()
            bound = float(self.order.scores[self.seen]) if self.seen < len(self.order.scores) else float("inf")
            hope = self.queue[0][0] if self.queue else float("inf")
            self.frontier = min(bound, hope)
            if self.frontier == float("inf") and self._lacks_less():
                if self.larger and not (self.large and self.large[-1][0] <= self.larger[0][0]):
                    self._look_aside()
                    continue
                _, number, m = self.large.pop()
                self._open(0.0, number, m)
                continue
            if self.frontier >= self.standings.reach or self.frontier == float("inf"):
                if self._take_up():
                    continue
                break
            if now - self.began > seconds:
                return self.answer()
            if now - told > TELL_S:
                told = now
                tell(self.progress())
            if bound < hope:
                self._open(bound, int(self.order.block[self.seen]), int(self.order.m[self.seen]))
                self.seen += 1
                continue
            score, *_, item = heapq.heappop(self.queue)
            if isinstance(item, _Unmade):
                self._begin(score, item.candidate)
            elif isinstance(item, Candidate):
                self._look(item, score)
            elif self.standings.hopeless(score, item):
                self.standings.spare(score, item)
            else:
                self._look_closer(item)
        self._look_at_larger()
        self.complete = True
        return self.answer()

    def begin_with(self, candidates: Iterable[Candidate]) -> None:
        """Look at some candidates before all others, however long it takes: good ones rule others out."""
        for candidate in candidates:
            self._look(candidate, 0.0)

    def looked_at(self, candidate: Candidate) -> Found | None:
        """Put one candidate through the fast interpreter; None where another name of its plan has been."""
        return self._evaluate(candidate)

    def _take_up(self) -> bool:
        """Take up what was left out and is not hopeless any more, as the choice is another one; return if any was."""
        before = len(self.queue)
        for bound, item, opened in self.standings.taken_up():
            if opened:
                self._push(bound, item)
            else:
                assert isinstance(item, Candidate), "what has been evaluated was opened before"
                self._begin(bound, item)
        return len(self.queue) > before

    def _lacks_less(self) -> bool:
        """Whether nothing has been found that fits, and a point that cannot might lack less than what has been seen."""
        found = self.standings
        if found.leaders or found.late or not (self.large or self.larger):
            return False
        least = min([*(own[0] for own in self.large[-1:]), *(own[0] for own in self.larger[:1])])
        return not found.nearest or least < found.nearest[0].lack

    def _open(self, bound: float, number: int, m: int) -> None:
        """Put a point of a block in the queue with its plan's own bound, however it agrees and wherever it stands."""
        block = self.blocks[number]
        for candidate in block.at(block.ms[m], tuple(self.savings)):
            least = max(bound, self.scoring.least(candidate, self._bounds_of(candidate).sends(candidate)))
            if self.standings.hopeless(least, candidate):
                self.standings.spare(least, candidate, opened=False)
            elif least > bound:  # what promises more is looked at before it
                heapq.heappush(self.queue, (least, len(candidate.savings), candidate.key, _Unmade(candidate)))
            else:
                self._begin(least, candidate)

    def _begin(self, bound: float, candidate: Candidate) -> None:
        """Put a candidate that saves least in the queue, and those that save more if it says nothing of them."""
        if self.standings.hopeless(bound, candidate):
            return self.standings.spare(bound, candidate, opened=False)
        least = max(bound, self._takes(candidate))
        if self._cannot_fit(candidate):
            return self._save(candidate, bound)
        if self.standings.hopeless(least, candidate):
            self.standings.spare(least, candidate)
            return self._save(candidate, bound)
        try:
            placed = self.plans.placed(candidate)
            own = max(least, self.scoring.of(placed.plan, plan_bound(placed), 0.0))
            recut = self.plans.squeezed(candidate, placed)
        except PlanError as error:
            return self._impossible(candidate, f"{error.what}: {error.why}")
        if recut or self.quickening:  # what saves is cut otherwise: what this plan takes says nothing about it
            self._save(candidate, bound)
        if self.standings.hopeless(own, candidate):
            return self.standings.spare(own, candidate)
        return self._push(own, candidate)

    def _cannot_fit(self, candidate: Candidate) -> bool:
        """Put a candidate aside of which no plan fits, however it is cut."""
        bounds = self._bounds_of(candidate)
        lack = bounds.need(candidate).lack * (1 - 1e-9)
        if bounds.takes(candidate) < float("inf") and (lack <= 1 or savings.behind_cut(candidate.savings)):
            return False
        if candidate.key in self.state.done:
            return False
        if candidate not in self.aside:
            self.aside.add(candidate)
            heapq.heappush(self.larger, (lack, candidate.key))
            self.tally.aside(candidate)
        return True

    def _look_aside(self) -> None:
        """Look at the candidate that lacks least of those that were put aside, as nothing fits."""
        candidate = Candidate.parse(heapq.heappop(self.larger)[1])
        self.tally.aside(candidate, back=True)
        found = self._evaluate(candidate)
        if found is not None:
            self._note(candidate, found)

    def _look_at_larger(self) -> None:
        """Look at those that lack least of what was put aside without a plan: a person asks what memory would buy."""
        if not self.standings.leaders:
            return
        wanted = LARGER
        for _, key in heapq.nsmallest(4 * LARGER, self.larger):
            try:
                candidate, placed = Candidate.parse(key), self.plans.placed(Candidate.parse(key))
                if wanted and self.scoring.of(placed.plan, plan_bound(placed), 0.0) < self.standings.best:
                    self.state.done[key] = self._found(candidate, placed, evaluate(placed))
                    wanted -= 1
            except PlanError:
                continue

    def _takes(self, candidate: Candidate) -> float:
        """Return the least score of a candidate's plan that fits, by what it computes, saves and keeps."""
        return self.scoring.least(candidate, self._bounds_of(candidate).takes(candidate))

    def _push(self, score: float, item: Candidate | Found) -> None:
        """Put a candidate, or one that has been looked at, in the queue: of equals the one that saves least first."""
        saved = len(item.savings) if isinstance(item, Candidate) else 0
        heapq.heappush(self.queue, (score, saved, item.key, item))

    def _impossible(self, candidate: Candidate, why: str) -> None:
        """Rule out a candidate, and all that save more than it."""
        for saved in (candidate.savings, *self.savings.get(candidate.savings, ())):
            self.tally.impossible(candidate._replace(savings=saved), why)

    def _look(self, candidate: Candidate, bound: float) -> None:
        """Put one candidate through the fast interpreter, and those that save more than it in the queue."""
        if self.standings.hopeless(bound, candidate):
            return self.standings.spare(bound, candidate)
        if self._dominated(candidate):
            return None
        found = self.state.done.get(candidate.key)
        if found is None and candidate.savings and self._cannot_fit(candidate):
            return None
        if found is None:
            found = self._evaluate(candidate)
            if found is None:
                return None
        if self._note(candidate, found) and not found.squeezed and not self.quickening:
            self._save(candidate, bound, found)
        return None

    def _note(self, candidate: Candidate, found: Found) -> bool:
        """Keep what was found of a candidate; return whether it is possible."""
        if not found.outlined:
            self.state.done[candidate.key] = found
        self.evaluated += 1
        if not found.label:
            self._impossible(candidate, found.why)
            return False
        self.tally.evaluated(found)
        self.known[candidate.bare].append((frozenset(candidate.savings), found))
        if found.lack > 1:
            if not found.outlined:
                self.standings.lacking(found)
        elif found.late:
            self._too_late(found)
        else:
            self.standings.hoped(found)
            if found.exact or found.score < WORTH_A_LOOK * self.standings.best:
                self._look_closer(found)
            else:
                self._push(found.score, found)
        return True

    def _save(self, candidate: Candidate, bound: float, found: Found | None = None) -> None:
        """Put what saves more than a candidate in the queue: where it can only be slower, behind what was `found`."""
        for saved in self.savings.get(candidate.savings, ()):
            slower = not candidate.savings and set(saved) <= self.slowing and self.objective.timed
            slower = slower and not orders_by_seconds(candidate)
            least = max(bound, found.score) if slower and found is not None and not found.stale else bound
            more = candidate._replace(savings=saved)
            least = max(least, self._takes(more))
            if self.standings.hopeless(least, more):
                self.standings.spare(least, more)
            elif not self._dominated(more):
                self._push(least, more)

    def _look_closer(self, found: Found) -> None:
        """Put a candidate that could be the best through SimPy."""
        exact = found if found.exact else self.exact(found)
        if exact.score <= self.standings.reach and not exact.runnable:
            exact = msgspec.structs.replace(exact, runnable=self.able(self.plan(exact)))
        self.state.done[found.key] = exact
        if exact.late:
            self._too_late(exact)
            return
        self.standings.certain(exact)

    def _too_late(self, found: Found) -> None:
        self.tally.late(found)
        self.standings.too_late(found)

    def _dominated(self, candidate: Candidate) -> bool:
        """Whether the same plan with fewer savings says enough (`planner.search.dominance`)."""
        known = self.known[candidate.bare]
        return self.objective.timed and dominated(
            candidate, known, self.slowing, self.standings.reach, stale=self.stale
        )

    def _evaluate(self, candidate: Candidate) -> Found | None:
        """One candidate through the fast interpreter; None where another name of its plan has been, or it may not."""
        try:
            if savings.behind_cut(candidate.savings):
                plan, seconds = self.plans.before_choice(candidate)
                own = self.scoring.of(plan, seconds, 0.0)
                if own < float("inf") and self.standings.hopeless(own, candidate):
                    self.standings.spare(own, candidate)
                    return None
            placed = self.plans.placed(candidate)
            plan = placed.plan
            if not self.allowed(plan) or self.same.setdefault(hash(identity(plan)), candidate.key) != candidate.key:
                return None
            own = self.scoring.of(plan, plan_bound(placed), 0.0)
            if candidate.savings and self.standings.hopeless(own, candidate):
                self.standings.spare(own, candidate)
                return None
            if self.standings.leaders and plan_lack(placed) > 1:
                return self._too_large(candidate, placed, own)
            evaluation = evaluate(placed)
        except PlanError as error:
            return Found(key=candidate.key, family=candidate.family, why=f"{error.what}: {error.why}")
        return self._found(candidate, placed, evaluation)

    def _found(self, candidate: Candidate, placed: Placed, evaluation: Evaluation) -> Found:
        """What is known of a candidate that has been evaluated."""
        plan = placed.plan
        step_s, peaks, _ = evaluation
        lack, full = evaluation.worst(placed)
        return Found(
            key=candidate.key,
            family=candidate.family,
            label=str(plan),
            stale=asynchronous(plan),
            late=self.scoring.late(plan, step_s),
            mechanisms=len(mechanisms(plan)),
            price_per_hour=price_per_hour(self.cluster, plan.device_names),
            score=self.scoring.of(plan, step_s, float(max(peaks))),
            step_s=step_s,
            peak_bytes=float(max(peaks)),
            lack=lack,
            full=full,
            exact=not shares(placed),
            batch=plan.batch,
            sequence=candidate.sequence,
            squeezed=self.plans.squeezed(candidate, placed),
        )

    def _too_large(self, candidate: Candidate, placed: Placed, score: float) -> Found:
        """What is known without walking it of a plan that cannot fit, where others do: nobody asks by how much."""
        return Found(
            key=candidate.key,
            family=candidate.family,
            label=str(placed.plan),
            stale=asynchronous(placed.plan),
            score=score,
            batch=candidate.batch,
            sequence=candidate.sequence,
            lack=plan_lack(placed),
            squeezed=self.plans.squeezed(candidate, placed),
            outlined=True,
        )

    def exact(self, found: Found) -> Found:
        """The same plan with what it shares, through SimPy."""
        plan = self.plan(found)
        if actions(plan) > ACTIONS:
            return found
        step_s = simulated_step(self.plans.placed(Candidate.parse(found.key)))
        self.simulated += 1
        score = self.scoring.of(plan, step_s, found.peak_bytes)
        late = self.scoring.late(plan, step_s)
        return msgspec.structs.replace(found, step_s=step_s, score=score, exact=True, late=late)

    def like(
        self,
        *,
        cluster: Cluster | None = None,
        space: Space | None = None,
        objective: str = "",
        terms: Terms | None = None,
        allowed: Callable[[Plan], bool] | None = None,
        state: State | None = None,
        among: Iterable[Block] | None = None,
    ) -> Search:
        """Return a search that has not begun, of the same but for what is given; its state is new if it is not."""
        return Search(
            self.profile,
            cluster or self.cluster,
            space or self.space,
            lengths=self.lengths.values(),
            objective=objective or self.objective.name,
            terms=terms or self.terms,
            stale=self.stale,
            able=self.able,
            allowed=allowed or self.allowed,
            state=state,
            among=among,
        )

    def profile_of(self, one: Candidate | Plan) -> Profile:
        """Return the profile of a candidate's, or a plan's, sequence length."""
        return self.plans.profile_of(one)

    def plan(self, found: Found) -> Plan:
        """Make the plan of a candidate that has been found."""
        return self.plans.placed(Candidate.parse(found.key)).plan

    def progress(self) -> Progress:
        """How far it is."""
        spent = max(1e-9, time.monotonic() - self.began)
        hopes = self.standings.hopes
        hoped = hopes[0].score if hopes else float("inf")
        rest = int(np.searchsorted(self.order.scores, hoped)) - self.seen + len(self.queue)
        return Progress(
            seen=self.seen,
            points=len(self.order.scores),
            per_second=self.evaluated / spent,
            remaining_s=rest * spent / max(1, self.evaluated),
            best=hopes[0].label if hopes else "",
            score=hoped,
        )

    def answer(self) -> Answer:
        """What has been found so far."""
        fitting = (
            f
            for f in self.state.done.values()
            if f.label and f.lack <= 1 and not f.late and (self.stale or not f.stale)
        )
        return Answer(
            objective=self.objective.name,
            batches=self.space.batches,
            sequences=self.space.sequences,
            leaders=self.standings.ranked(self.state.done),
            front=tuple(sorted(pareto(fitting), key=lambda f: f.peak_bytes)),
            nearest=tuple(self.standings.nearest[:3]),
            late=tuple(self.standings.late[:3]),
            families=self.tally.families(number for _, number, _ in self.large),
            points=self.tally.points,
            evaluated=self.evaluated,
            simulated=self.simulated,
            seconds=time.monotonic() - self.began,
            complete=self.complete,
            margin=self.standings.margin(self.frontier),
        )


def shares(placed: Placed) -> bool:
    """Whether the fast interpreter's time is only a bound: what a plan uses has several users.

    Several users have links that are shared, the cores and the memory of a host, and servers, which wait for all
    workers' gradients.
    """
    if placed.plan.offload or placed.plan.host_optimizer:
        return True
    taken, served = placed.cluster, bool(placed.synchronisation.server)
    if len(taken.devices) == 1 and not served:
        return False
    if any(link.shared for link in taken.links) or any(device.shares_cores for device in taken.devices):
        return True
    return served
