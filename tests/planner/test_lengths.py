"""The sequence length as an axis of a search: each has a profile of its own, and plans are compared per token."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.placement.savings import COMBINATIONS
from planner.search.explain import explain
from planner.search.search import Search
from planner.search.space import Candidate, Space, candidates, space
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.profile import Profile
from tests.factory import devices, profile
from tests.planner.test_search import TERMS, everything, profiles, questions, the_simplest_of_the_quickest

LENGTHS = (2, 6)


def of_length(costs: Profile, tokens: int) -> Profile:
    return msgspec.structs.replace(costs, key=msgspec.structs.replace(costs.key, sequence=tokens))


@settings(max_examples=25)
@given(questions(strategies=3, savings=1), st.sampled_from(["throughput", "epoch", "memory", "cost"]), st.data())
def test_a_search_over_two_lengths_is_the_union_of_the_two_searches(
    question: tuple[Profile, Cluster, Space], objective: str, data: st.DataObject
) -> None:
    """Its points are theirs, and its answer that of brute force over both, each length with its own profile.

    The profiles have nothing in common but the number of their layers: nothing is scaled from one to the other.
    """
    costs, cluster, of = question
    assume(objective != "cost" or cluster.devices[0].price_per_hour > 0)
    lengths = [of_length(costs, 2), of_length(data.draw(profiles(len(costs.layers))), 6)]
    both = Search(
        lengths[0], cluster, of._replace(sequences=LENGTHS), lengths=lengths, objective=objective, terms=TERMS
    )
    each = [Search(one, cluster, of, objective=objective, terms=TERMS) for one in lengths]
    assert both.tally.points == sum(search.tally.points for search in each)
    tried = [t for one in lengths for t in everything(one, cluster, of, objective, terms=TERMS, tokens=True)]
    answer = both.run()
    the_simplest_of_the_quickest(answer, tried)
    if objective == "throughput" and answer.leaders:  # the quickest of each by itself, in seconds per token
        alone = [min(found, default=float("inf")) for found in (_per_token(search) for search in each)]
        assert min(f.score for f in answer.leaders) == pytest.approx(min(alone), rel=1e-9)


def _per_token(search: Search) -> list[float]:
    return [found.score / search.profile.sequence for found in search.run().leaders]


def test_plans_of_several_lengths_have_names_and_words_of_their_own() -> None:
    """By hand: one layer, 1 s forward and 1 s backward per sample of 2 tokens, 3.03 s each per sample of 6.

    One device: 2 s for 2 tokens, 6.06 s for 6. Per sample the long ones are 203 % slower, per token 1 %.
    """
    short, long = of_length(profile([1.0]), 2), of_length(profile([3.03]), 6)
    cluster = devices(1)
    of = space(short, cluster, 4, strategies=("single",), savings=((),), ms=(4,), sequences=LENGTHS)
    search = Search(short, cluster, of, lengths=(short, long))
    answer = search.run()
    long_ones = (block for block in search.blocks if block.point.sequence == 6)
    (other,) = search.like(state=search.state, among=long_ones).run().leaders
    assert [(f.label, f.units) for f in (answer.leaders[0], other)] == [("single-k1-m4-s2", 8), ("single-k1-m4-s6", 24)]
    assert [1 / f.score for f in (answer.leaders[0], other)] == pytest.approx([1.0, 1 / 1.01])
    best = search.plan(answer.leaders[0])
    assert best.sequence == 2
    text = explain(search, answer, simulate(search.profile_of(best), best, cluster))
    assert "1 tokens/s, 8 s per step of 4 samples of 2 tokens" in text[0]
    assert "With other sequences: of 6 tokens single-k1-m4-s6 is 1.0 % behind." in text


def test_one_length_is_said_by_the_plan_and_not_by_its_name() -> None:
    """With one length everything is as without: samples per second, and names without it."""
    costs = of_length(profile([1.0]), 512)
    search = Search(costs, devices(1), space(costs, devices(1), 4, strategies=("single",), savings=((),)))
    best = search.run().leaders[0]
    assert (best.units, search.plan(best).sequence, search.scoring.words(best.score)) == (4, 512, "0.5 samples/s")
    assert "s512" not in best.label


def test_a_key_says_the_length() -> None:
    costs = profile([1.0, 1.0])
    of = space(costs, devices(2), 4, sequences=LENGTHS, savings=COMBINATIONS[:2])
    found = list(candidates(of, costs, devices(2)))
    assert {one.sequence for one in found} == set(LENGTHS)
    assert [Candidate.parse(one.key) for one in found] == found
