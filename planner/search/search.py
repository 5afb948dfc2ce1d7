"""The best plan of a whole space, found without simulating all of it, and provably the same.

A candidate is looked at three times, each dearer and closer to the truth than the one before: a bound that costs
nothing, the fast interpreter's time, which sharing can only make longer, and SimPy's. Always the most promising look is
taken next, so the first candidate whose last look comes up is the best: nothing that was left out could beat it.
"""

from __future__ import annotations

import bisect
import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import msgspec

from planner.basis.errors import PlanError
from planner.costs.placed import Placed
from planner.placement import savings
from planner.search import objective as objectives
from planner.search.objective import Reckoned
from planner.search.space import Candidate, Space, bare, candidates, make, plan_bound
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.values.cluster import Cluster
from planner.values.plan import Plan, actions, asynchronous
from planner.values.profile import Profile

LEADERS = 12
"""Plans that a search keeps beside the best."""
ACTIONS = 100_000
"""Programs with more actions are not walked by SimPy within a search: their time is the fast interpreter's."""


WORTH_A_LOOK = 0.98
"""A candidate that looks better than the best by this factor is looked at closely at once: it rules others out."""
TELL_S = 0.1
"""Seconds between two reports of progress."""


class Found(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One evaluated candidate, by its `key`; `label` is its plan's, empty where there is none, and `why` says why.

    `lack` is peak over capacity on the worst device: above 1 it does not fit. `exact` is off where sharing has not been
    simulated, `stale` on where gradients are.
    """

    key: str
    family: str
    label: str = ""
    score: float = float("inf")
    step_s: float = 0.0
    peak_bytes: float = 0.0
    lack: float = 0.0
    exact: bool = False
    stale: bool = False
    why: str = ""

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return Candidate.parse(self.key).strategy


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a strategy with its savings: how many points, and why they are not the best."""

    name: str
    points: int = 0
    evaluated: int = 0
    slower: int = 0
    too_large: int = 0
    impossible: int = 0
    why: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a search has found so far, best first. `front` are plans that no other beats in both time and memory."""

    objective: str
    batch: int
    leaders: tuple[Found, ...]
    front: tuple[Found, ...]
    nearest: tuple[Found, ...]
    families: tuple[Family, ...]
    points: int
    evaluated: int
    simulated: int
    seconds: float
    complete: bool


class State(msgspec.Struct, kw_only=True):
    """What a search saves, to be taken up again: `question` identifies it, `done` are its evaluations."""

    question: str
    done: dict[str, Found] = {}


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a search is: points seen of all, evaluations per second, seconds that the rest may take at most."""

    seen: int
    points: int
    per_second: float
    remaining_s: float
    best: str
    score: float


class Search:
    """A search that can be stopped after any candidate and taken up again."""

    def __init__(
        self,
        profile: Profile,
        cluster: Cluster,
        batch: int,
        space: Space,
        *,
        objective: str = "throughput",
        epoch_samples: int = 0,
        stale: bool = False,
        state: State | None = None,
        allowed: Callable[[Plan], bool] = lambda plan: True,
    ) -> None:
        """Plans that are not `allowed` are not looked at, and not kept with the state."""
        self.allowed = allowed
        self.profile, self.cluster, self.batch, self.space = profile, cluster, batch, space
        self.objective, self.epoch, self.stale = objectives.get(objective), epoch_samples or batch, stale
        self.state = state or State(question="")
        found = candidates(space, profile, cluster, batch)
        scored = sorted((self._optimistic(c), len(c.savings), c.key, c) for c in found)
        self.order = [candidate for *_, candidate in scored]
        self.bounds = [score for score, *_ in scored]
        self.slowing = slowing(profile, cluster)
        self.known: dict[tuple[object, ...], list[tuple[frozenset[str], Found]]] = defaultdict(list)
        self.bare_bounds: dict[tuple[object, ...], float] = {}
        """Of plans without savings, however their replicas are synchronised."""
        self.families: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: dict[str, str] = {}
        for candidate in self.order:
            self.families[candidate.family]["points"] += 1
        self.queue: list[tuple[float, str, Found]] = []
        self.leaders: list[Found] = []
        self.hopes: list[Found] = []
        self.nearest: list[Found] = []
        self.seen = self.evaluated = self.simulated = 0
        self.began = time.monotonic()
        self.complete = False

    def _optimistic(self, candidate: Candidate) -> float:
        k = 1 if candidate.strategy == "single" else candidate.k
        return self.objective.score(Reckoned(candidate.bound_s, 0.0, k, self.batch), self.cluster, self.epoch)

    @property
    def best(self) -> float:
        """The best score that is certain so far."""
        return self.leaders[0].score if self.leaders else float("inf")

    def run(self, tell: Callable[[Progress], None] = lambda progress: None, *, seconds: float = float("inf")) -> Answer:
        """Search until nothing can be better, or for so many seconds; `tell` is called about ten times a second."""
        told = 0.0
        while True:
            now = time.monotonic()
            bound = self.bounds[self.seen] if self.seen < len(self.order) else float("inf")
            hope = self.queue[0][0] if self.queue else float("inf")
            if min(bound, hope) >= self.best:
                break
            if now - self.began > seconds:
                return self.answer()
            if now - told > TELL_S:
                told = now
                tell(self.progress())
            if hope <= bound:
                self._look_closer(heapq.heappop(self.queue)[2])
            else:
                self._look(self.order[self.seen])
                self.seen += 1
        for candidate in self.order[self.seen :]:
            self.families[candidate.family]["slower"] += 1
        self.complete = True
        return self.answer()

    def _look(self, candidate: Candidate) -> None:
        """Put one candidate through the fast interpreter."""
        counts = self.families[candidate.family]
        if self._dominated(candidate):
            counts["slower"] += 1
            return
        found = self.state.done.get(candidate.key)
        if found is None:
            found = self._evaluate(candidate)
            if found is None:
                counts["slower"] += 1
                return
            self.state.done[candidate.key] = found
        self.evaluated += 1
        if not found.label:
            counts["impossible"] += 1
            self.reasons.setdefault(candidate.family, found.why)
            return
        counts["evaluated"] += 1
        self.known[candidate[:7]].append((frozenset(candidate.savings), found))
        if found.lack > 1:
            counts["too large"] += 1
            self.nearest = _least(self.nearest, found, lambda f: (f.lack, f.score))
        elif found.stale and not self.stale:
            counts["stale"] += 1
            self.reasons.setdefault(candidate.family, "its gradients are stale; --stale lets it compete")
        else:
            self.hopes = _least(self.hopes, found, lambda f: (f.score, f.key))
            if found.exact or found.score < WORTH_A_LOOK * self.best:
                self._look_closer(found)
            else:
                heapq.heappush(self.queue, (found.score, found.key, found))

    def _look_closer(self, found: Found) -> None:
        """Put a candidate that could be the best through SimPy."""
        exact = found if found.exact else self._exact(found)
        self.state.done[found.key] = exact
        self.leaders = _least(self.leaders, exact, lambda f: (f.score, f.key))

    def _dominated(self, candidate: Candidate) -> bool:
        """Whether the same plan with fewer savings says enough: it fits, or is too slow already.

        Savings that only add work or waits can make a plan smaller, never quicker. But what is repeated need not be
        swapped; and of a plan without flush the steady state is a mean over few steps, which moves by more than some
        savings cost.
        """
        if self.objective.name == "memory":
            return False
        mine = frozenset(candidate.savings)
        return any(
            less < mine
            and mine - less <= self.slowing
            and not ("offload" in less and (mine - less) & {"recompute", "recompute-layers"})
            and (found.lack <= 1 or found.score >= self.best)
            and not (found.stale and self.stale)
            for less, found in self.known[candidate[:7]]
        )

    def _evaluate(self, candidate: Candidate) -> Found | None:
        """One candidate through the fast interpreter; None where its plan cannot beat the best."""
        try:
            if self.bare_bounds.get(candidate[:6], 0.0) >= self.best:
                return None
            plan = bare(candidate, self.profile, self.cluster, self.batch)
            placed = Placed(self.profile, plan, self.cluster)
            bound = self._score(plan, plan_bound(placed), 0.0)
            self.bare_bounds[candidate[:6]] = bound
            if bound >= self.best or not self.allowed(plan):
                return None
            if candidate.savings:
                placed = placed.with_plan(make(candidate, self.profile, self.cluster, self.batch))
                plan = placed.plan
                if not self.allowed(plan):
                    return None
            step_s, peaks = evaluate(placed)
        except PlanError as error:
            return Found(key=candidate.key, family=candidate.family, why=f"{error.what}: {error.why}")
        room = placed.capacities
        lack = max(peak / capacity for peak, capacity in zip(peaks, room, strict=False))
        return Found(
            key=candidate.key,
            family=candidate.family,
            label=str(plan),
            stale=asynchronous(plan),
            score=self._score(plan, step_s, float(max(peaks))),
            step_s=step_s,
            peak_bytes=float(max(peaks)),
            lack=float(lack),
            exact=not shares(placed),
        )

    def _score(self, plan: Plan, step_s: float, peak: float) -> float:
        reckoned = Reckoned(step_s, peak, len(plan.device_names), self.batch)
        return self.objective.score(reckoned, self.cluster, self.epoch)

    def _exact(self, found: Found) -> Found:
        """The same plan with what it shares, through SimPy."""
        plan = self.plan(found)
        if actions(plan) > ACTIONS:
            return found
        step_s = simulated_step(Placed(self.profile, plan, self.cluster))
        self.simulated += 1
        score = self._score(plan, step_s, found.peak_bytes)
        return msgspec.structs.replace(found, step_s=step_s, score=score, exact=True)

    def plan(self, found: Found) -> Plan:
        """Make the plan of a candidate that has been found."""
        return make(Candidate.parse(found.key), self.profile, self.cluster, self.batch)

    def progress(self) -> Progress:
        """How far it is."""
        spent = max(1e-9, time.monotonic() - self.began)
        rest = bisect.bisect_left(self.bounds, self.hopes[0].score if self.hopes else float("inf")) - self.seen
        return Progress(
            seen=self.seen,
            points=len(self.order),
            per_second=self.evaluated / spent,
            remaining_s=rest * spent / max(1, self.evaluated),
            best=self.hopes[0].label if self.hopes else "",
            score=self.hopes[0].score if self.hopes else float("inf"),
        )

    def answer(self) -> Answer:
        """What has been found so far."""
        families = [
            Family(
                name=name,
                points=c["points"],
                evaluated=c["evaluated"],
                slower=c["slower"],
                too_large=c["too large"],
                impossible=c["impossible"],
                why=self.reasons.get(name, ""),
            )
            for name, c in sorted(self.families.items())
        ]
        known = self.state.done.values()
        fitting = (f for f in known if f.label and f.lack <= 1 and (self.stale or not f.stale))
        return Answer(
            objective=self.objective.name,
            batch=self.batch,
            leaders=tuple(_ranked(self.state.done[f.key] for f in (*self.leaders, *self.hopes))),
            front=tuple(sorted(pareto(fitting), key=lambda f: f.peak_bytes)),
            nearest=tuple(self.nearest[:3]),
            families=tuple(families),
            points=len(self.order),
            evaluated=self.evaluated,
            simulated=self.simulated,
            seconds=time.monotonic() - self.began,
            complete=self.complete,
        )


def slowing(profile: Profile, cluster: Cluster) -> frozenset[str]:
    """Return the savings that cannot make any plan quicker here.

    All add actions or waits; only an update on the host could be quicker than the device's own, where some layer's is.
    """
    rate = max((host.memory_bytes_per_s for host in cluster.hosts), default=0.0)
    speed = min((device.speed for device in cluster.devices), default=1.0)
    every = frozenset(savings.names())
    for layer in profile.layers:
        moved = 2 * layer.parameter_bytes + layer.gradient_bytes + 2 * layer.optimizer_bytes
        own = max(times.optimizer.median_s for times in layer.times) / speed
        if own > moved / rate:
            return every - {"host-optimizer"}
    return every


def shares(placed: Placed) -> bool:
    """Whether the fast interpreter's time is only a bound: what a plan uses has several users, or replicas differ.

    Several users have links that are shared, the cores of a host, and servers, which wait for all workers' gradients.
    """
    taken, served = placed.cluster, bool(placed.synchronisation.server)
    if len(taken.devices) == 1 and not served:
        return False
    if any(link.shared for link in taken.links) or any(device.shares_cores for device in taken.devices):
        return True
    return served or not _alike(placed.plan, taken)


def _alike(plan: Plan, cluster: Cluster) -> bool:
    """Whether the links inside every replica of the pipeline, and to its hosts, are as quick as the first one's."""
    if plan.replicas == 1 or plan.uneven:
        return True  # of stages with different numbers of replicas all are walked

    def figures(a: str, b: str) -> tuple[object, ...]:
        links = map(cluster.link_of, cluster.path(a, b))
        return tuple((link.latency_s, link.bandwidth_bytes_per_s, link.points) for link in links)

    host = {device.name: device.host for device in cluster.devices}
    copying = {
        name: (link.latency_s, link.bandwidth_bytes_per_s, link.points)
        for link in cluster.links
        for name, other in (link.between, link.between[::-1])
        if host.get(name) == other
    }
    first = [group[0] for group in plan.groups]
    replicas = [first[start : start + plan.depth] for start in range(0, len(first), plan.depth)]
    looks = {
        (
            tuple(figures(a, b) for a, b in zip(own, (*own[1:], own[0]), strict=True) if a != b),
            tuple(copying.get(name) for name in own),
        )
        for own in replicas
    }
    return len(looks) == 1


def _ranked(found: Iterable[Found]) -> list[Found]:
    """Best first, every plan once; of equals, one whose score is certain before one whose score is a bound."""
    distinct = {one.key: one for one in found}
    return sorted(distinct.values(), key=lambda f: (f.score, not f.exact, f.key))[:LEADERS]


def _least(kept: list[Found], new: Found, key: Callable[[Found], tuple[object, ...]]) -> list[Found]:
    return sorted([*kept, new], key=key)[:LEADERS]


def pareto(found: Iterable[Found]) -> list[Found]:
    """Keep the plans that no other beats in both step time and peak memory."""
    front: list[Found] = []
    for one in sorted(found, key=lambda f: (f.step_s, f.peak_bytes)):
        if not front or one.peak_bytes < front[-1].peak_bytes:
            front.append(one)
    return front
