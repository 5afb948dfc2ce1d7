"""What-ifs against brute force: what is said to win on a changed cluster does, by the rule for ties."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.search.changed import there, with_more_memory, with_other_links
from planner.search.choice import TIE
from planner.search.kinds import contenders
from planner.search.search import Search
from planner.search.space import Space
from planner.simulate.injection import with_bandwidth, with_memory
from planner.values.cluster import Cluster
from planner.values.profile import Profile
from tests.factory import devices, profile
from tests.planner.test_search import everything, questions, space

Question = tuple[Profile, Cluster, Space]


@settings(max_examples=25)
@given(questions(strategies=4, savings=1), st.sampled_from([0.1, 0.5, 4.0]), st.booleans())
def test_what_wins_on_a_changed_cluster_is_that_of_brute_force(question: Question, factor: float, memory: bool) -> None:
    costs, cluster, of = question
    search = Search(costs, cluster, of)
    leaders = search.run().leaders
    assume(leaders)
    changed = (with_memory if memory else with_bandwidth)(cluster, factor)
    found = there(search, leaders[0], changed, contenders(search), seconds=60)
    tried = everything(costs, changed, of, "throughput")
    assert (found.best is None) == (not tried)
    if found.best is None:
        return
    assert found.sure
    best = min(one.score for one in tried)
    assert found.best.score <= best * (1 + TIE) * (1 + 1e-9)
    certain = [one for one in tried if one.score <= best * (1 + TIE) * (1 - 1e-9)]
    if found.best.score <= best * (1 + 1e-9):
        assert found.best.mechanisms <= min(one.merit.mechanisms for one in certain)
    if found.mine is not None and found.mine.exact and not found.ties:
        assert found.mine.score > best * (1 + TIE) * (1 - 1e-9), "what does not tie is slower than the quickest"


def example() -> Question:
    """A pipeline sends little over slow links; data parallelism sends every gradient, and has no bubble."""
    costs, cluster = profile([1.0] * 4, message_bytes=10), devices(4, bandwidth=400.0)
    chosen = ("1f1b", "gpipe", "data-parallel")
    return costs, cluster, space(costs, cluster, 8, strategies=chosen, savings=((),), ks=(1, 2, 4))


def rate(sentence: str) -> float:
    found = re.search(r"([\d.]+) samples/s", sentence)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("bandwidth", [20.0, 400.0, 4e4])
def test_sentences_about_links_are_true(bandwidth: float) -> None:
    """Whatever they name has the figure that it has by brute force, and nothing there is better by more than a tie."""
    costs, _, of = example()
    cluster = devices(4, bandwidth=bandwidth)
    search = Search(costs, cluster, of)
    best = search.run().leaders[0]
    sentences = with_other_links(search, best, contenders(search), seconds=60)
    assert len(sentences) == 2
    for sentence in sentences:
        said = re.match(r"With links ([\d.]+) times (slower|faster), (?!it )(\S+) would", sentence)
        again = re.match(r"With links ([\d.]+) times (slower|faster), it would still win", sentence)
        match = said or again
        assert match is not None, sentence
        factor = float(match[1]) if match[2] == "faster" else 1 / float(match[1])
        tried = everything(costs, with_bandwidth(cluster, factor), of, "throughput")
        named = said[3] if said else best.label
        (own,) = {one.score for one in tried if one.label == named}
        assert rate(sentence) == pytest.approx(1 / own, rel=0.005)
        least = min(one.score for one in tried)
        assert own <= least * (1 + TIE) * (1 + 1e-9)
        before = next((one.score for one in tried if one.label == best.label), float("inf"))
        assert ("a tie that goes to" in sentence) == (named != best.label and before <= least * (1 + TIE))
        assert any(found.label == named for found in search.state.done.values()), "it can be explained"


def test_what_is_not_proved_is_said_to_be_the_best_of_those_looked_at() -> None:
    costs, cluster, of = example()
    search = Search(costs, cluster, of)
    best = search.run().leaders[0]
    slow = [s for s in with_other_links(search, best, contenders(search), seconds=-1.0) if "slower" in s]
    assert len(slow) == 1
    assert "would win" not in slow[0]
    assert re.search(r"(of \d+ plans looked at \S+ would be the best|still be the best of \d+ looked at)", slow[0])
    factor = float(slow[0].split()[2])
    quickest = min(one.score for one in everything(costs, with_bandwidth(cluster, 1 / factor), of, "throughput"))
    assert "at least" in slow[0]
    assert rate(slow[0].split("at least")[1]) <= 1 / quickest * 1.005


def test_more_memory_names_what_wins_there() -> None:
    """With what the nearest larger plan lacks, the answer of brute force on that cluster."""
    costs, _, of = example()
    unbound = everything(costs, devices(4, bandwidth=400.0), of, "throughput")
    quickest = min(unbound, key=lambda one: one.score)
    cluster = devices(4, bandwidth=400.0, memory_bytes=int(0.9 * quickest.merit.peak_bytes))
    search = Search(costs, cluster, of)
    best = search.run().leaders[0]
    larger = [f for f in search.state.done.values() if f.label and f.lack > 1 and f.score < best.score]
    (sentence,) = with_more_memory(search, best, contenders(search), larger, seconds=60)
    assert re.search(r"would (win|be chosen|still win)", sentence), sentence
    said = re.match(r"With (?:([\d.]+) % more|([\d.]+) times the) memory, (\S+) would", sentence)
    assert said is not None, sentence
    factor = 1 + float(said[1]) / 100 if said[1] else float(said[2])
    tried = everything(costs, with_memory(cluster, factor), of, "throughput")
    named = best.label if said[3] == "it" else said[3]
    (own,) = {one.score for one in tried if one.label == named}
    assert own <= min(one.score for one in tried) * (1 + TIE) * (1 + 1e-9)
