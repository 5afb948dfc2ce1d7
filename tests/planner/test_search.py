"""The search against brute force over the same space, its bounds against what they bound, and its being taken up."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.basis.units import percent
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, layer_table
from planner.placement import savings as all_savings
from planner.placement.mapping import MAPPINGS
from planner.placement.repeating import least_repeated
from planner.placement.savings import apply
from planner.placement.strategies import all_strategies
from planner.search.answer import Answer, Found, State, pareto
from planner.search.bounds import Bounds, bound
from planner.search.choice import TIE, Merit
from planner.search.cost import Terms, price_per_hour
from planner.search.dominance import orders_by_seconds, slowing
from planner.search.explain import _less_memory, cheapest_change, explain
from planner.search.hiring import HIRES
from planner.search.objective import Reckoned
from planner.search.objective import get as objective_of
from planner.search.plan_bounds import plan_bound, plan_lack
from planner.search.search import Search
from planner.search.simplicity import mechanisms
from planner.search.space import Candidate, Space, candidates, make, space
from planner.search.space import question as asked_of
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan, asynchronous
from planner.values.profile import Profile
from tests.factory import devices, hosts_of, profile

NAMES = tuple(s.name for s in all_strategies())
COST = st.one_of(st.integers(1, 9).map(float), st.floats(0.5, 9.0))
TERMS = Terms(10)
WAYS = ("all-reduce", "zero-1", "zero-2", "zero-3", "parameter-server")


@st.composite
def clusters(draw: st.DrawFn, most: int = 4) -> Cluster:
    """One or two hosts of devices, equal or not, with quick or slow, shared or unshared links; or a CPU's cores."""
    count = draw(st.integers(1, most))
    memory = draw(st.sampled_from([8_000, 20_000, 60_000, 10**9]))
    if draw(st.integers(0, 4)) == 0:
        return Cluster(
            name="cores",
            hosts=(Host(name="h", cores=draw(st.sampled_from([2, count])), memory_bytes=memory * count),),
            links=(Link(between=("h", "h"), latency_s=0.0, bandwidth_bytes_per_s=1e4, shared=draw(st.booleans())),),
            elastic=True,
        ).take(count)
    first = draw(st.integers(1, count))
    equal = draw(st.booleans())
    bandwidths = st.sampled_from([3e2, 3e3, 1e12])
    shared = draw(st.booleans())

    def link(a: str, b: str) -> Link:
        latency = draw(st.sampled_from([0.0, 0.5]))
        return Link(between=(a, b), latency_s=latency, bandwidth_bytes_per_s=draw(bandwidths), shared=shared)

    copying = draw(st.booleans())
    made = tuple(
        Device(
            name=f"d{i}",
            memory_bytes=memory if equal else draw(st.sampled_from([memory, memory // 2, 4 * memory])),
            host="h0" if i < first else "h1",
            speed=1.0 if equal else draw(st.sampled_from([0.5, 1.0, 2.0])),
            price_per_hour=1.0 if equal else draw(st.sampled_from([0.5, 1.0, 3.0])),
        )
        for i in range(count)
    )
    return Cluster(
        name="drawn",
        hosts=tuple(Host(name=name, cores=4, memory_bytes=10**9, memory_bytes_per_s=1e4) for name in ("h0", "h1")),
        devices=made,
        links=(
            *(link(a, b) for a, b in (("h0", "h0"), ("h1", "h1"), ("h0", "h1"))),
            *(link(device.name, device.host) for device in made if copying),
        ),
    )


@st.composite
def networks(draw: st.DrawFn) -> Cluster:
    """Two to four hosts of one to three equal devices, on a switch that each reaches over a NIC of its own."""
    hosts, each = draw(st.sampled_from([(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1)]))
    nic, inside = draw(st.sampled_from([3e2, 3e3, 3e4])), draw(st.sampled_from([1e3, 1e12]))
    cluster = hosts_of(hosts, each, nic=nic, inside=inside, latency_s=draw(st.sampled_from([0.0, 0.1])))
    memory = draw(st.sampled_from([20_000, 10**9]))
    made = tuple(msgspec.structs.replace(device, memory_bytes=memory) for device in cluster.devices)
    return msgspec.structs.replace(cluster, devices=made)


@st.composite
def profiles(draw: st.DrawFn, layers: int = 0) -> Profile:
    count = layers or draw(st.integers(1, 5))

    def each(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(values, min_size=count, max_size=count))

    forward, backward, sizes = each(COST), each(COST), each(st.sampled_from([100, 500, 1000, 3000]))
    return profile(
        forward,
        backward,
        bytes_=sizes,
        gradients=draw(st.sampled_from([0.5, 1.0, 2.0])),
        message_bytes=draw(st.sampled_from([0, 100, 2000])),
        optimizer_s=draw(st.sampled_from([0.0, 1.0])),
        half_s=[draw(st.sampled_from([0.3, 0.5, 0.8])) * b for b in backward],
        recompute_s=[draw(st.sampled_from([0.1, 1.0])) * f for f in forward],
        tied=(("w", "layer0", f"layer{count - 1}"),) if count > 1 and draw(st.booleans()) else (),
        tied_bytes=int(draw(st.sampled_from([0.0, 0.5, 1.0])) * min(sizes[0], sizes[-1])),
        whole=draw(st.one_of(st.none(), st.tuples(*[st.sampled_from([0.7, 1.0, 1.05])] * 2))),
    )


@st.composite
def questions(
    draw: st.DrawFn, strategies: int = 5, savings: int = 3, of_clusters: st.SearchStrategy[Cluster] | None = None
) -> tuple[Profile, Cluster, Space]:
    """A small space: some strategies, some savings, all K and M."""
    cluster, costs = draw(clusters() if of_clusters is None else of_clusters), draw(profiles())
    batches = draw(st.sampled_from([(1,), (2,), (4,), (6,), (2, 4), (4, 6)]))
    chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=strategies, unique=True))
    found = draw(st.lists(st.sampled_from(all_savings.COMBINATIONS), max_size=savings, unique=True))
    ways = draw(st.lists(st.sampled_from(WAYS), min_size=1, max_size=2, unique=True))
    of = space(
        costs, cluster, *batches, strategies=tuple(chosen), savings=tuple({(): None, **dict.fromkeys(found)}),
        synchronisations=tuple(ways), chunks=(2,), hires=draw(st.sampled_from([(), HIRES])),
    )  # fmt: skip
    return costs, cluster, of


def made(costs: Profile, cluster: Cluster, of: Space) -> list[tuple[Candidate, Plan]]:
    """Every candidate that is a plan."""
    found = []
    for candidate in candidates(of, costs, cluster):
        try:
            plan = make(candidate, costs, cluster)
            simulated_step(Placed(costs, plan, cluster))
        except PlanError:
            continue
        found.append((candidate, plan))
    return found


def peaks(costs: Profile, plan: Plan, cluster: Cluster) -> tuple[list[float], bool]:
    """Each device's peak, and whether it and what the plan keeps in hosts' memory fit."""
    outcome = simulate(costs, plan, cluster)
    return [point.total for point in outcome.peak], outcome.fits


class Tried(NamedTuple):
    """A plan simulated by itself: its score, and what decides a tie."""

    score: float
    merit: Merit
    label: str


def everything(
    costs: Profile,
    cluster: Cluster,
    of: Space,
    objective: str,
    stale: bool = False,
    terms: Terms = TERMS,
    *,
    tokens: bool = False,
) -> list[Tried]:
    """All plans that fit and may be the best; scores are per sample, or per token."""
    found = []
    if objective == "cost" or terms.budget is not None:
        of = of._replace(hires=of.hires or HIRES)
    for _, plan in made(costs, cluster, of):
        held, fits = peaks(costs, plan, cluster)
        if fits and (stale or not asynchronous(plan)):
            step = simulated_step(Placed(costs, plan, cluster))
            price = price_per_hour(cluster, plan.device_names)
            units = plan.units if tokens else plan.batch
            if not terms.met(step, units, price):
                continue
            score = objective_of(objective).score(Reckoned(step, max(held), price, units), terms)
            own = Merit(score, score, score, len(mechanisms(plan)), True, max(held))
            found.append(Tried(score, own, str(plan)))
    return found


def brute_force(
    costs: Profile, cluster: Cluster, of: Space, objective: str, stale: bool = False, terms: Terms = TERMS
) -> float:
    """The best score of all, each plan simulated by itself."""
    return min((one.score for one in everything(costs, cluster, of, objective, stale, terms)), default=math.inf)


@settings(max_examples=60)
@given(questions(), st.sampled_from(["throughput", "epoch", "memory", "cost"]), st.booleans())
def test_the_answer_is_that_of_brute_force(
    question: tuple[Profile, Cluster, Space], objective: str, stale: bool
) -> None:
    costs, cluster, of = question
    assume(objective != "cost" or cluster.devices[0].price_per_hour > 0)
    tried = everything(costs, cluster, of, objective, stale)
    answer = Search(costs, cluster, of, objective=objective, terms=TERMS, stale=stale).run()
    assert answer.complete
    the_simplest_of_the_quickest(answer, tried)


def the_simplest_of_the_quickest(answer: Answer, tried: list[Tried]) -> None:
    """Check a search's answer against all plans: none is better by more than a tie, and none as good is simpler."""
    if not tried:
        assert not answer.leaders
        return
    best = min(one.score for one in tried)
    assert all(f.exact for f in answer.leaders[:1])
    quickest, chosen = min(f.score for f in answer.leaders), answer.leaders[0].merit
    assert chosen.score <= best * (1 + TIE) * (1 + 1e-9)
    assert chosen.score <= quickest * (1 + TIE) * (1 + 1e-9)
    assert answer.margin is not None
    assert min(quickest, chosen.score / (1 + answer.margin)) <= best * (1 + 1e-9), "of what was left out, too"
    least = min(one.merit.mechanisms for one in tried if one.score <= quickest * (1 + TIE) * (1 - 1e-9))
    assert chosen.mechanisms <= least


@settings(max_examples=40)
@given(questions(), st.sampled_from(["throughput", "cost"]), st.floats(0.1, 1.2), st.booleans())
def test_a_deadline_or_a_budget_is_met_as_by_brute_force(
    question: tuple[Profile, Cluster, Space], objective: str, part: float, money: bool
) -> None:
    """The cheapest or quickest of the plans that meet it, each simulated by itself."""
    costs, cluster, of = question
    assume(cluster.devices[0].price_per_hour > 0)
    seconds = brute_force(costs, cluster, of, "epoch")
    assume(seconds < math.inf)
    limit = 2 * part * seconds
    terms = TERMS._replace(**{"budget": limit / 3600} if money else {"deadline_s": limit})
    tried = everything(costs, cluster, of, objective, terms=terms)
    answer = Search(costs, cluster, of, objective=objective, terms=terms).run()
    assert answer.complete
    the_simplest_of_the_quickest(answer, tried)


@settings(max_examples=25)
@given(
    profiles(),
    st.sampled_from([2, 3]),
    st.sampled_from([6_000, 12_000, 25_000]),
    st.sampled_from([100.0, 1e3, 1e9]),
    st.lists(st.sampled_from(["gpipe", "1f1b", "zb-h1", "data-parallel", "zero-3"]), min_size=1, max_size=2),
)
def test_all_savings_are_that_of_brute_force(
    costs: Profile, count: int, memory_bytes: int, host_bandwidth: float, strategies: list[str]
) -> None:
    """Little memory, and a quick or slow link to the host's: what is not repeated has to be swapped."""
    cluster = devices(count, memory_bytes=memory_bytes, bandwidth=1e4, host_bandwidth=host_bandwidth)
    of = space(costs, cluster, 8, strategies=tuple(strategies), ks=(count,), ms=(4, 8))
    tried = everything(costs, cluster, of, "throughput")
    the_simplest_of_the_quickest(Search(costs, cluster, of).run(), tried)


def test_repeating_spares_swapping() -> None:
    """What is repeated need not be swapped: over a slow link both savings are quicker than swapping alone."""
    costs, cluster = profile([1.0] * 4, message_bytes=10), devices(2, memory_bytes=25_000, host_bandwidth=500.0)
    chosen = ((), ("recompute",), ("offload",), ("recompute", "offload"))
    of = space(costs, cluster, 16, strategies=("gpipe",), ks=(2,), ms=(16,), replicas=(1,), savings=chosen)
    best = Search(costs, cluster, of).run().leaders[0]
    assert best.label == "gpipe-k2-m16-recompute-offload"
    assert best.score == pytest.approx(brute_force(costs, cluster, of, "throughput"))


NETWORKS = questions(strategies=2, savings=2, of_clusters=networks())


@settings(max_examples=40)
@given(st.one_of(questions(), NETWORKS))
def test_bounds_are_below_what_they_bound(question: tuple[Profile, Cluster, Space]) -> None:
    costs, cluster, of = question
    for candidate, plan in made(costs, cluster, of):
        bounds = Bounds(costs, candidate.offered(cluster))
        step = simulated_step(Placed(costs, plan, cluster)) * (1 + 1e-9)
        assert bound(candidate, costs, cluster) <= step, candidate
        assert plan_bound(Placed(costs, plan, cluster)) <= step, plan
        assert bounds.sends(candidate) <= step, candidate


@pytest.mark.parametrize("whole", [(1.05, 0.8), (0.8, 1.2), (0.8, 0.8), (1.05, 1.05)])
def test_a_direction_that_is_slower_whole_does_not_hide_that_the_other_is_quicker(whole: tuple[float, float]) -> None:
    """Every operation runs its layers, quicker or slower than they are, by its own part."""
    costs, cluster = profile([1.0] * 4, [2.0] * 4, whole=whole), devices(2)
    saved = ((), ("recompute",))
    of = space(costs, cluster, 8, strategies=("single", "gpipe", "zb-h1"), replicas=(1,), savings=saved)
    bounds, found = Bounds(costs, cluster), made(costs, cluster, of)
    assert {candidate.savings for candidate, _ in found} == set(saved)
    for candidate, plan in found:
        step = simulated_step(Placed(costs, plan, cluster)) * (1 + 1e-9)
        assert plan_bound(Placed(costs, plan, cluster)) <= step, plan
        assert max(bound(candidate, costs, cluster), bounds.sends(candidate), bounds.takes(candidate)) <= step, plan


@settings(max_examples=40)
@given(questions(), st.randoms(use_true_random=False))
def test_whatever_layers_are_repeated_fits_only_if_they_take_as_long_as_the_least(
    question: tuple[Profile, Cluster, Space], random: Random
) -> None:
    """No choice of layers is ruled out, or said to take longer, by which a plan fits."""
    costs, cluster, of = question
    for candidate, plan in made(costs, cluster, of):
        if candidate.savings or not Placed(costs, plan, cluster).schedule.trains:
            continue
        chosen = tuple(layer for stage in plan.stages for layer in stage.layers if random.random() < 0.7)
        repeating = Placed(costs, msgspec.structs.replace(plan, recompute_layers=chosen), cluster)
        need, _ = evaluate(repeating).worst(repeating)
        if need <= 1:
            seconds = np.diff(layer_table(repeating.profile, plan.samples, plan.threads).recompute[MEDIAN])
            each = [sum(float(seconds[i]) for run in runs for i in run) for runs in repeating.checkpoints]
            least = least_repeated(Placed(costs, plan, cluster))
            for row, held in zip(least, plan.stages_of, strict=False):
                assert row <= sum(each[s] for s in held) / repeating.schedule.copies * (1 + 1e-9), plan


@settings(max_examples=40)
@given(st.one_of(questions(savings=3), NETWORKS))
def test_what_is_said_before_a_plan_is_walked_is_below_it(question: tuple[Profile, Cluster, Space]) -> None:
    """No plan is thrown away that would fit, or that repeats forwards and is quicker than was said."""
    costs, cluster, of = question
    for candidate, plan in made(costs, cluster, of):
        bounds = Bounds(costs, candidate.offered(cluster))
        placed = Placed(costs, plan, cluster)
        need, _ = evaluate(placed).worst(placed)
        assert plan_lack(placed) <= need * (1 + 1e-9), plan
        assert candidate.mechanisms <= len(mechanisms(plan)), candidate
        if "recompute-layers" not in candidate.savings:
            assert bounds.need(candidate).lack <= need * (1 + 1e-9), candidate
        if need <= 1:
            assert bounds.takes(candidate) <= simulated_step(placed) * (1 + 1e-9), candidate


@settings(max_examples=40)
@given(questions(strategies=3, savings=0), st.data())
def test_savings_that_slow_make_no_plan_quicker(question: tuple[Profile, Cluster, Space], data: st.DataObject) -> None:
    costs, cluster, of = question
    names = data.draw(st.lists(st.sampled_from(sorted(slowing(costs, cluster))), min_size=1, max_size=2, unique=True))
    for candidate, plan in made(costs, cluster, of):
        if asynchronous(plan):
            continue  # their steady state is a mean over few steps
        if orders_by_seconds(candidate):
            continue  # greedy orders have anomalies: another order for other seconds, sometimes the better one
        asked = asked_of(candidate, costs, cluster)
        try:
            saved = apply(asked, plan, tuple(names))
            step = simulated_step(Placed(costs, saved, cluster))
        except (PlanError, ValueError):
            continue
        assert step >= simulated_step(Placed(costs, plan, cluster)) * (1 - 1e-9), saved


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1", "data-parallel"])
def test_savings_are_asked_what_they_do_not_what_they_are_called(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under other names they bound the same: little memory and a slow link to the host's make each of them count."""
    costs = profile(
        [1.0] * 4, [2.0] * 4, bytes_=[3000] * 4, optimizer_s=1.0, names=["a.0.x", "a.0.y", "a.1.x", "a.1.y"]
    )
    cluster = devices(2, memory_bytes=24_000, host_bandwidth=1e3)
    of = space(costs, cluster, 8, strategies=(schedule,), savings=all_savings.COMBINATIONS)
    plain = all_savings.names()
    entries = {f"my-{name}": all_savings.get(name)._replace(name=f"my-{name}") for name in plain}

    def said(mine: str) -> tuple[list[tuple[float, float, float]], set[str]]:
        """Need and seconds of every point, and which savings slow, of those whose names begin so."""
        bounds, found = Bounds(costs, cluster), []
        for point in candidates(of, costs, cluster):
            own = point._replace(savings=tuple(f"{mine}{name}" for name in point.savings))
            need = bounds.need(own)
            found.append((need.lack, float(need.freed.sum()), bounds.takes(own)))
        return found, {name for name in plain if f"{mine}{name}" in slowing(costs, cluster)}

    found, slow = said("")
    assert len(set(found)) > 4
    assert 0 < len(slow) < len(plain)
    monkeypatch.setattr(all_savings, "_REGISTRY", {**all_savings._REGISTRY, **entries})
    assert said("my-") == (found, slow)


@pytest.mark.parametrize("gradients", [1.0, 2.0])
def test_holders_of_a_stage_that_is_held_twice_agree_once_for_their_own_microbatches(gradients: float) -> None:
    """Two pipelines that run against each other take half of the micro-batches each, so shards pass half as often."""
    costs, cluster = profile([0.1] * 4, bytes_=[4000] * 4, gradients=gradients), hosts_of(4, 1, nic=200.0)
    of = space(costs, cluster, 8, strategies=("chimera",), replicas=(2,), savings=((),), synchronisations=("zero-3",))
    bounds, found = Bounds(costs, cluster), made(costs, cluster, of)
    assert found
    for candidate, plan in found:
        step = simulated_step(Placed(costs, plan, cluster)) * (1 + 1e-9)
        assert plan_bound(Placed(costs, plan, cluster)) <= step, plan
        assert bounds.sends(candidate) <= step, candidate


def example(**changes: Any) -> tuple[Profile, Cluster, Space]:
    """Four layers on four devices that share a link: some strategies do not fit, and sharing decides."""
    costs = profile([1.0, 2.0, 1.0, 3.0], message_bytes=500)
    cluster = devices(4, **{"memory_bytes": 40_000, "bandwidth": 2e3, "shared": True, **changes})
    names = ("single", "naive", "gpipe", "1f1b", "data-parallel", "zb-h1", "zero-3", "pipedream")
    of = space(costs, cluster, 8, strategies=names, savings=((), ("recompute",)))
    return costs, cluster, of


class StoppedError(Exception):
    pass


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers agree in what they found."""
    return [(f.key, f.score) for f in (*one.leaders[:1], *one.nearest)] == [
        (f.key, f.score) for f in (*other.leaders[:1], *other.nearest)
    ]


@pytest.mark.parametrize(("objective", "count"), [("throughput", 1), ("throughput", 4), ("memory", 9), ("memory", 40)])
def test_a_stopped_search_is_taken_up(objective: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    question = example()
    whole = Search(*question, objective=objective).run()
    looked: Counter[str] = Counter()
    closely: Counter[str] = Counter()
    stop = [True]

    def evaluated(self: Search, candidate: Candidate) -> Found | None:
        if stop[0] and len(looked) == count:
            raise StoppedError
        looked[candidate.key] += 1
        return evaluate(self, candidate)

    def looked_at(self: Search, found: Found) -> Found:
        closely[found.key] += 1
        return exact(self, found)

    evaluate, exact = Search._evaluate, Search.exact
    monkeypatch.setattr(Search, "_evaluate", evaluated)
    monkeypatch.setattr(Search, "exact", looked_at)
    state = State(question="")
    with pytest.raises(StoppedError):
        Search(*question, objective=objective, state=state).run()
    stop[0] = False
    kept = msgspec.json.decode(msgspec.json.encode(state), type=State)
    answer = Search(*question, objective=objective, state=kept).run()
    assert answer.complete
    assert same(answer, whole)
    assert set(closely.values()) == {1}
    # A candidate whose plan's bound rules it out is not kept: making its plan again costs less than keeping it.
    assert {looked[key] for key in kept.done if kept.done[key].lack <= 1} == {1}


def test_a_budget_stops_a_search_and_it_goes_on() -> None:
    question = example()
    search = Search(*question)
    stopped = search.run(seconds=-1.0)
    assert not stopped.complete
    assert not stopped.leaders
    answer = Search(*question, state=search.state).run()
    assert answer.complete
    assert same(answer, Search(*question).run())


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_no_member_of_the_front_is_dominated(points: list[tuple[int, int]]) -> None:
    found = [Found(key=f"{i}", family="", step_s=float(s), peak_bytes=float(b)) for i, (s, b) in enumerate(points)]
    front = [(int(f.step_s), int(f.peak_bytes)) for f in pareto(found)]
    for s, b in points:
        worse = [(x, y) for x, y in front if x <= s and y <= b]
        assert worse, "everything is dominated by, or is, a member"
    assert not [(p, q) for p in front for q in front if p != q and p[0] <= q[0] and p[1] <= q[1]]


@pytest.mark.parametrize("objective", ["throughput", "memory"])
def test_the_front_of_a_search(objective: str) -> None:
    answer = Search(*example(), objective=objective).run()
    front = [(f.step_s, f.peak_bytes) for f in answer.front]
    assert front
    assert not [(p, q) for p in front for q in front if p != q and p[0] <= q[0] and p[1] <= q[1]]
    assert all(f.lack <= 1 and not f.stale for f in answer.front)
    best = answer.leaders[0]
    assert all(best.score <= f.score for f in answer.front if f.exact)


def test_stale_plans_compete_only_if_they_may() -> None:
    costs, cluster, _ = example(memory_bytes=10**9)
    of = space(costs, cluster, 8, strategies=("1f1b", "pipedream"), savings=((),), ks=(4,), replicas=(1,))
    plain, stale = (Search(costs, cluster, of, stale=stale).run() for stale in (False, True))
    assert plain.leaders[0].strategy == "1f1b"
    assert not any(f.stale for f in plain.leaders)
    assert stale.leaders[0].strategy == "pipedream"
    assert stale.leaders[0].score < plain.leaders[0].score
    assert "stale" in next(f.why for f in plain.families if f.name == "pipedream")


def test_nothing_fits() -> None:
    """The nearest plans come first, and the change is the first one's."""
    question = example(memory_bytes=3_000)
    search = Search(*question)
    answer = search.run()
    assert answer.complete
    assert not answer.leaders
    assert [f.lack for f in answer.nearest] == sorted(f.lack for f in answer.nearest)
    assert all(f.lack > 1 for f in answer.nearest)
    least = min(f.lack for f in search.state.done.values() if f.label)
    assert answer.nearest[0].lack == least
    change = cheapest_change(search, answer)
    assert f"{percent(least - 1)} more memory per device would do" in change
    assert change.startswith(answer.nearest[0].label)
    needed = math.ceil(3_000 * least)
    costs, cluster, of = example(memory_bytes=needed)
    assert Search(costs, cluster, of).run().leaders, "that much memory does"


def test_less_memory_names_the_simplest_of_those_as_good() -> None:
    """Of two that need less memory and are within a tie, the one with fewer mechanisms would be chosen."""
    costs, cluster, of = example(memory_bytes=10**9)
    search = Search(costs, cluster, of)
    search.run()
    best = search.standings.leaders[0]
    some = {"lack": 0.1 * best.lack, "exact": True}
    quick = msgspec.structs.replace(best, label="quick", score=1.5 * best.score, mechanisms=9, **some)
    simple = msgspec.structs.replace(best, label="simple", score=1.51 * best.score, mechanisms=1, **some)
    assert "simple needs 90.0 % less" in _less_memory(search, best, [quick, simple])[0]


def test_everything_is_explained() -> None:
    question = example()
    search = Search(*question)
    answer = search.run()
    outcome = simulate(question[0], search.plan(answer.leaders[0]), question[1])
    text = explain(search, answer, outcome)
    assert text[0].startswith(f"{outcome.plan} is the best for throughput")
    assert text[1].startswith("It is bound by")
    assert any(sentence.startswith("Of the other kinds that were evaluated") for sentence in text)
    assert any("times slower" in sentence for sentence in text)
    assert any("times faster" in sentence for sentence in text)
    assert any("memory" in sentence for sentence in text[2:])


def test_every_candidate_is_counted_once() -> None:
    answer = Search(*example()).run()
    assert sum(f.points for f in answer.families) == answer.points
    for family in answer.families:
        each = family.fitting, family.too_large, family.slower, family.impossible, family.stale
        assert sum(each) == family.points
        assert min(each) >= 0


def test_keys_are_read_back() -> None:
    for candidate in candidates(example()[2], example()[0], example()[1]):
        assert Candidate.parse(candidate.key) == candidate


def test_one_replica_is_slower_than_the_others() -> None:
    """The second replica's devices have a link with more latency: the step is that replica's."""
    seconds = {("d0", "d1"): 1.0, ("d2", "d3"): 2.5, ("d0", "d2"): 1.0, ("d1", "d3"): 1.0}
    links = tuple(
        Link(between=ends, latency_s=latency, bandwidth_bytes_per_s=1e15, shared=False)
        for ends, latency in seconds.items()
    )
    cluster = msgspec.structs.replace(devices(4), links=links)
    costs = profile([1.0, 1.0], message_bytes=100)
    of = space(costs, cluster, 4, strategies=("1f1b",), savings=((),), ks=(4,), ms=(4,), replicas=(2,))
    best = Search(costs, cluster, of).run().leaders[0]
    assert best.score == pytest.approx(brute_force(costs, cluster, of, "throughput"))


@settings(max_examples=25)
@given(questions(strategies=3, savings=1), st.sampled_from(["throughput", "epoch", "memory", "cost"]))
def test_the_best_over_batches_is_the_best_of_single_searches(
    question: tuple[Profile, Cluster, Space], objective: str
) -> None:
    """Also by brute force over each batch: no plan of one batch hides that of another."""
    costs, cluster, of = question
    assume(objective != "cost" or cluster.devices[0].price_per_hour > 0)

    def best(space: Space) -> float:
        leaders = Search(costs, cluster, space, objective=objective, terms=TERMS).run().leaders
        return min((found.score for found in leaders), default=math.inf)

    several = of._replace(batches=(2, 4, 6))
    single = [several._replace(batches=(batch,)) for batch in several.batches]
    least = min(brute_force(costs, cluster, one, objective) for one in single)
    for found in (best(several), min(map(best, single))):
        assert found == least or least * (1 - 1e-9) <= found <= least * (1 + TIE) * (1 + 1e-9)


def test_plans_of_several_batches_have_names_of_their_own() -> None:
    """The batch is part of a plan's name only where there are several; `explain` compares them per sample."""
    costs, cluster, _ = example()
    chosen = {"strategies": ("gpipe", "data-parallel"), "savings": ((),)}
    (alone,) = {f.batch for f in Search(costs, cluster, space(costs, cluster, 8, **chosen)).run().leaders}
    assert alone == 8
    search = Search(costs, cluster, space(costs, cluster, 8, 32, **chosen))
    answer = search.run()
    assert answer.batches == (8, 32)
    assert all(f"-b{f.batch}" in f.label and search.plan(f).batch == f.batch for f in answer.leaders)
    done = [f for f in search.state.done.values() if f.label]
    assert {f.batch for f in done} == {8, 32}
    assert len({f.label for f in done}) == len(done)
    best = answer.leaders[0]
    assert best.score == pytest.approx(best.unit_s)
    text = explain(search, answer, simulate(costs, search.plan(best), cluster))
    assert any(sentence.startswith("With other batches: of ") for sentence in text)


def test_both_mappings_are_tried() -> None:
    """Which of them is better is SimPy's to say, not an estimate's: each by itself is no better than both."""
    costs, cluster = profile([1.0, 2.0, 2.0, 1.0], message_bytes=300), hosts_of(2, 4, nic=1e3)
    chosen: dict[str, Any] = {"strategies": ("gpipe", "1f1b", "looped-bfs"), "savings": ((),), "ks": (4, 8)}
    of = space(costs, cluster, 16, replicas=(2, 4), **chosen)
    found = list(candidates(of, costs, cluster))
    assert {c.mapping for c in found if c.k == 8} == {"pipelines", "stages"}
    assert {c.mapping for c in found if c.k == 4} == {""}, "on one host all devices are side by side"
    both = Search(costs, cluster, of).run()
    each = {m: Search(costs, cluster, of._replace(mappings=(m,))).run() for m in MAPPINGS}
    seconds = {m: min(f.step_s for f in answer.leaders) for m, answer in each.items()}
    assert min(f.step_s for f in both.leaders) == pytest.approx(min(seconds.values()))
    assert min(seconds.values()) == pytest.approx(16 * brute_force(costs, cluster, of, "throughput"))
    assert seconds["stages"] != pytest.approx(seconds["pipelines"])
    labels = [f.label for f in both.leaders]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(("agreed", "gradients"), [("all-reduce", 1.0), ("zero-1", 1.0), ("zero-1", 2.0)])
def test_gradients_between_hosts_are_in_a_plans_bound(agreed: str, gradients: float) -> None:
    """On 4 x 4 devices the bound of data parallelism is above half of its step, and below it.

    Also where gradients are wider than parameters: zero-1 reduces those, and gathers these.

    8 layers of 10 MB over 4 hosts with a link of 125 MB/s each: 2 x 3 / 4 x 80 MB need 0.96 s, a ring of 16 takes
    2 x 15 / 16 x 80 MB = 1.2 s; computing takes 8 x 3 ms for one sample per device.
    """
    hosts = [f"h{i}" for i in range(4)]
    cluster = Cluster(
        name="4 x 4",
        hosts=tuple(Host(name=name, cores=4, memory_bytes=10**12) for name in hosts),
        devices=tuple(Device(name=f"d{i}", memory_bytes=10**12, host=hosts[i // 4]) for i in range(16)),
        links=(
            *(Link(between=(h, h), latency_s=0.0, bandwidth_bytes_per_s=1e10) for h in hosts),
            *(Link(between=(h, "switch"), latency_s=0.0, bandwidth_bytes_per_s=1.25e8, shared=True) for h in hosts),
        ),
        switches=("switch",),
    )
    costs = profile([1e-3] * 8, [2e-3] * 8, bytes_=[10**7] * 8, gradients=gradients, message_bytes=1000)
    names = ("data-parallel", "gpipe", "zb-h1")
    of = space(costs, cluster, 32, strategies=names, ks=(16,), ms=(16, 32), synchronisations=(agreed,), savings=((),))
    for candidate, plan in made(costs, cluster, of):
        placed = Placed(costs, plan, cluster)
        assert plan_bound(placed) <= simulated_step(placed) * (1 + 1e-9), plan
        assert Bounds(costs, cluster).sends(candidate) <= simulated_step(placed) * (1 + 1e-9), candidate
        if candidate.strategy == "data-parallel" and candidate.k == 16 and agreed == "all-reduce":
            assert plan_bound(placed) >= 0.96


@pytest.mark.parametrize(("strategy", "mapping", "seconds"), [
    ("data-parallel", "", 4 + 2 * 4000 / 200),  # no gradient before the forward; each host's parts leave over its NIC
    ("gpipe", "stages", 4 * 500 / 100),  # each host has a stage: all four samples' values leave the first
    ("gpipe", "pipelines", 4 + 2 * 4000 / 200),  # both stages' replicas are on both hosts
])  # fmt: skip
def test_what_leaves_hosts_is_known_before_a_plan_is_made(strategy: str, mapping: str, seconds: float) -> None:
    """Four layers of 1000 bytes on 2 hosts of 2 devices with a NIC of 100 bytes/s each; 500 bytes cross every cut."""
    costs, cluster = profile([1.0] * 4, [2.0] * 4, message_bytes=500), hosts_of(2, 2, nic=100.0)
    replicas = 2 if strategy == "gpipe" else 1
    point = Candidate(strategy, 4, 4, replicas, 0, 1, "all-reduce", (), 4, mapping)
    step = simulated_step(Placed(costs, make(point, costs, cluster), cluster))
    assert 0.98 * seconds <= Bounds(costs, cluster).sends(point) <= seconds * (1 + 1e-9)  # it is found by halving
    assert seconds <= step
