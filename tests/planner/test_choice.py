"""Ties go to the simplest plan; two names of one plan are one; what renting costs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.basis.errors import PlanError
from planner.placement import strategies
from planner.placement.devices import choose as taken_of
from planner.placement.question import Question
from planner.search.choice import TIE, Merit, choose
from planner.search.cost import Terms, least_price_per_hour, price_per_hour, with_prices
from planner.search.front import cost_front
from planner.search.hiring import HIRES, hires, offered, rents
from planner.search.ranking import rank
from planner.search.search import Search
from planner.search.simplicity import identity, mechanisms
from planner.search.space import candidates, make, space
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan
from tests.factory import devices, profile


def own(score: float, mechanisms: int = 0, runnable: bool = True, peak: float = 0.0, spread: float = 0.0) -> Merit:
    return Merit(score, score * (1 - spread), score * (1 + spread), mechanisms, runnable, peak)


def test_a_tie_is_the_simplest_then_the_runnable_then_the_smallest() -> None:
    quick = own(1.0, 3)
    assert choose([(quick, "quick"), (own(1 + TIE / 2, 2), "simple")]) == "simple"
    assert choose([(quick, "quick"), (own(1 + 2 * TIE, 2), "simple")]) == "quick"
    assert choose([(own(1.0, 2, runnable=False), "not yet"), (own(1.01, 2), "runs")]) == "runs"
    assert choose([(own(1.0, 2, peak=2.0), "large"), (own(1.01, 2, peak=1.0), "small")]) == "small"
    assert choose([(own(1.0, 2), "quick"), (own(1.01, 2), "slow")]) == "quick"


def test_a_tie_says_what_decided_it() -> None:
    """No plan is called simpler than one with as many mechanisms."""
    one = own(1.0, 2, peak=2.0)
    assert own(1.01, 1).decider(one) == "the simpler plan"
    assert own(1.01, 2, peak=3.0).decider(one._replace(runnable=False)) == "the plan that can be run here"
    assert own(1.01, 2, peak=1.0).decider(one) == "the plan with less memory"
    assert own(0.99, 2, peak=2.0).decider(one) == "the quicker plan"


def test_an_order_that_turns_round_when_durations_are_high_is_a_tie() -> None:
    """5 % slower at the medians, quicker where all durations are high: which is quicker is not known."""
    quick, steady = Merit(1.0, 0.9, 1.3, 3, True, 0.0), Merit(1.05, 0.95, 1.2, 1, True, 0.0)
    assert choose([(quick, "quick"), (steady, "steady")]) == "steady"
    assert choose([(quick, "quick"), (steady._replace(high=1.4), "steady")]) == "quick"


def plan_of(name: str, k: int, m: int, **asked: int) -> Plan:
    costs = profile([1.0] * 4)
    question = Question(costs, devices(4), k, m, 8)._replace(**asked)  # type: ignore[arg-type]
    return strategies.get(name).spread(question)


def test_mechanisms_are_counted() -> None:
    assert mechanisms(plan_of("single", 1, 1)) == ()
    assert mechanisms(plan_of("data-parallel", 4, 4)) == ("replicas",)
    assert mechanisms(plan_of("zero-3", 4, 4))[1:] == ("optimizer sharded", "gradients sharded", "parameters sharded")
    assert mechanisms(plan_of("gpipe", 4, 8)) == mechanisms(plan_of("1f1b", 4, 8)) == ("stages", "micro-batches")
    assert mechanisms(plan_of("zb-h1", 4, 8)) == ("stages", "backward in halves", "micro-batches")
    saved = msgspec.structs.replace(plan_of("gpipe", 4, 8), recompute=True)
    assert mechanisms(saved) == ("stages", "micro-batches", "recompute")


def test_two_names_of_one_plan_are_one() -> None:
    same = [plan_of(name, 1, 4) for name in ("single", "naive", "gpipe", "1f1b", "data-parallel")]
    assert len({identity(plan) for plan in same}) == 1
    assert identity(plan_of("1f1b", 4, 4, replicas=4)) == identity(plan_of("data-parallel", 4, 4))
    assert identity(plan_of("gpipe", 2, 1)) == identity(plan_of("1f1b", 2, 1)), "one micro-batch: one order"
    assert identity(plan_of("gpipe", 2, 2)) != identity(plan_of("1f1b", 2, 2))
    assert identity(plan_of("pipedream", 1, 4)) != identity(plan_of("1f1b", 1, 4)), "it updates after each micro-batch"
    assert identity(plan_of("zero-1", 4, 4)) != identity(plan_of("data-parallel", 4, 4))


def test_candidates_of_a_space_are_different_plans() -> None:
    """Every candidate without a pipeline is one plan, whatever strategies could name it."""
    costs, cluster = profile([1.0] * 4), devices(4)
    of = space(costs, cluster, 8, ks=(1,), savings=((),))
    plans = [make(candidate, costs, cluster) for candidate in candidates(of, costs, cluster)]
    assert len({identity(plan) for plan in plans}) == len(plans)
    assert {plan.strategy for plan in plans if plan.schedule == "1f1b"} >= {"single"}
    assert not {plan.strategy for plan in plans} & {"gpipe", "1f1b", "zb-h1", "interleaved", "chimera"}


def test_a_ranking_lists_every_plan_once_and_no_recompute_wins_by_noise() -> None:
    costs = profile([1.0] * 4, spread=0.3)
    ranking = rank(costs, devices(4), k=1, m=4, batch=8, name="p", strategies=None)
    assert len({identity(o.plan) for o in ranking.outcomes}) == len(ranking.outcomes)
    for seed in range(5):
        found = rank(costs, devices(4), k=4, m=4, batch=8, name="p", seed=seed).best.plan
        assert not found.recompute


def rented() -> Cluster:
    """Three hosts of 4 devices: 1 an hour each device, 2 each host."""
    return Cluster(
        name="rented",
        hosts=tuple(Host(name=f"h{i}", cores=4, memory_bytes=10**9, price_per_hour=2.0) for i in range(3)),
        devices=tuple(
            Device(name=f"d{i}", memory_bytes=10**9, host=f"h{i // 4}", price_per_hour=1.0) for i in range(12)
        ),
        links=tuple(
            Link(between=(f"h{a}", f"h{b}"), latency_s=0.0, bandwidth_bytes_per_s=1e12)
            for a in range(3)
            for b in range(a, 3)
        ),
    )


def test_hosts_are_rented_whole() -> None:
    cluster = rented()
    assert price_per_hour(cluster, ("d0", "d1", "d2")) == 6.0, "3 devices of a host of 4 pay the host"
    assert price_per_hour(cluster, ("d0", "d4")) == 12.0
    assert [least_price_per_hour(cluster, k) for k in (1, 4, 5, 12)] == [6.0, 6.0, 12.0, 18.0]
    assert price_per_hour(with_prices(cluster, device=0.5, host=0.0), ("d0",)) == 2.0
    with pytest.raises(PlanError, match="makes no sense"):
        with_prices(cluster, device=-1.0)


@given(st.integers(1, 1000), st.floats(0.1, 100.0), st.integers(1, 64))
def test_terms_are_those_of_whole_steps(samples: int, step_s: float, batch: int) -> None:
    terms = Terms(samples)
    seconds = terms.seconds(step_s, batch)
    assert seconds >= step_s * samples / batch * (1 - 1e-9)
    assert terms._replace(deadline_s=seconds).met(step_s, batch, 1.0)
    assert not terms._replace(deadline_s=seconds * 0.99).met(step_s, batch, 1.0)
    assert terms._replace(budget=seconds / 3600 * 2).met(step_s, batch, 2.0)
    assert not terms._replace(budget=seconds / 3600).met(step_s, batch, 2.0)


def test_a_deadline_takes_the_cheapest_that_meets_it() -> None:
    """One device takes 8 x 4 x 2 s = 64 s a step; four of the same host 16 s for the same price; eight cost twice."""
    costs, cluster = profile([1.0] * 4, bytes_=[0] * 4), rented()
    of = space(costs, cluster, 8, strategies=("single", "data-parallel"), savings=((),))

    def best(**terms: float) -> str:
        return Search(costs, cluster, of, objective="cost", terms=Terms(8)._replace(**terms)).run().leaders[0].label  # type: ignore[arg-type]

    assert best() == "data-parallel-k4-m4"
    assert best(deadline_s=15.0) == "data-parallel-k8-m8"
    with pytest.raises(PlanError, match="no price"):
        Search(costs, devices(4), of, objective="cost")


def test_the_front_of_time_against_cost() -> None:
    """Renting a second and a third host is quicker and, with an all-reduce that takes as long as a layer, dearer."""
    costs, cluster = profile([1.0] * 4, bytes_=[1] * 4), rented()
    slow = tuple(
        msgspec.structs.replace(link, bandwidth_bytes_per_s=2.0) if link.between[0] != link.between[1] else link
        for link in cluster.links
    )
    cluster = msgspec.structs.replace(cluster, links=slow)
    of = space(costs, cluster, 24, strategies=("single", "data-parallel"), savings=((),), ks=(1, 4, 8, 12))
    search = Search(costs, cluster, of, objective="cost", terms=Terms(24))
    front, proved = cost_front(search)
    assert proved
    assert [found.price_per_hour for found in front] == [6.0, 12.0, 18.0]
    assert front[0].key == search.run().leaders[0].key
    money = [search.terms.money(f.step_s, 24, f.price_per_hour) for f in front]
    assert money == sorted(money)
    assert [f.step_s for f in front] == sorted((f.step_s for f in front), reverse=True)
    late = Search(costs, cluster, of, terms=Terms(24, deadline_s=front[1].step_s))
    assert cost_front(late)[0] == front[1:], "what misses the deadline is not on it"


def two_kinds(prices: tuple[float, ...], speeds: tuple[float, ...], each: int = 2) -> Cluster:
    """Hosts of some devices, each host with its own price and speed."""
    hosts = [f"h{i}" for i in range(len(prices))]
    return Cluster(
        name="kinds",
        hosts=tuple(
            Host(name=h, cores=4, memory_bytes=10**9, price_per_hour=p) for h, p in zip(hosts, prices, strict=True)
        ),
        devices=tuple(
            Device(name=f"{h}d{i}", memory_bytes=10**9, host=h, speed=s)
            for h, s in zip(hosts, speeds, strict=True)
            for i in range(each)
        ),
        links=tuple(
            Link(between=(a, b), latency_s=0.0, bandwidth_bytes_per_s=1e12) for a in hosts for b in hosts if a <= b
        ),
    )


def test_a_cheap_host_is_hired_where_money_is_asked_about() -> None:
    """Two devices a tenth slower for a hundredth of the price: a step of 4 x 4 x 2 s takes 16 s on both of them."""
    costs, cluster = profile([1.0] * 4, bytes_=[0] * 4), two_kinds((100.0, 1.0), (1.1, 1.0))
    of = space(costs, cluster, 4, strategies=("single", "data-parallel"), savings=((),))
    quick = Search(costs, cluster, of).run().leaders[0]
    assert (quick.label, quick.price_per_hour) == ("data-parallel-k4-m4", 101.0)
    cheap = Search(costs, cluster, of, objective="cost").run().leaders[0]
    assert (cheap.label, cheap.price_per_hour) == ("data-parallel-k2-m2-cheapest", 1.0)
    assert cheap.step_s == pytest.approx(16.0)
    assert cheap.score == pytest.approx(16.0 / 3600 / 4 * 1e6)
    budget = Search(costs, cluster, of, terms=Terms(4, budget=1.01 * 16 / 3600)).run().leaders[0]
    assert budget.key == cheap.key, "within the budget only the cheap host is"
    front, proved = cost_front(Search(costs, cluster, of, terms=Terms(4)))
    assert proved
    assert [found.label for found in front] == [cheap.label, quick.label]


def test_a_host_is_hired_by_its_price_for_what_it_gives() -> None:
    """Of three hosts the slowest costs least per device, the middle one least per work."""
    cluster = two_kinds((100.0, 2.0, 1.5), (4.0, 2.0, 1.0))
    assert hires(cluster, 2) == HIRES
    assert [rents(cluster, 2, hire) for hire in HIRES] == [100.0, 1.5, 2.0]
    assert [rents(cluster, 4, hire) for hire in hires(cluster, 4)] == [102.0, 3.5]
    assert hires(cluster, 6) == HIRES[:1], "there are no others"
    assert hires(with_prices(cluster, host=3.0), 2) == HIRES[:1], "none costs less"
    assert hires(with_prices(cluster, host=0.0), 2) == HIRES[:1]


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(*(st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=n, max_size=n) for _ in range(2)))
    ),
    st.integers(1, 2),
    st.booleans(),
)
def test_every_hire_has_its_devices_and_costs_less(
    drawn: tuple[list[float], list[float]], each: int, equal: bool
) -> None:
    prices, speeds = drawn
    cluster = two_kinds(tuple(prices[:1] * len(prices) if equal else prices), tuple(speeds), each)
    for count in range(1, len(cluster.devices) + 1):
        own = hires(cluster, count)
        taken = [frozenset(d.name for d in taken_of(offered(cluster, count, hire), count)) for hire in own]
        assert own[0] == ""
        assert len(set(taken)) == len(taken), "no plan twice"
        assert {len(names) for names in taken} == {count}
        assert all(rents(cluster, count, hire) < rents(cluster, count, "") for hire in own[1:])
        assert not equal or own == ("",)
        least = min(rents(cluster, count, hire) for hire in own)
        assert least == least_price_per_hour(cluster, count), "hosts are alike in size: the cheapest are the cheapest"
