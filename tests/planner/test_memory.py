"""What devices hold, against what can be counted by hand."""

from __future__ import annotations

import msgspec
import pytest

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.profile import Profile, Timing
from planner.values.trace import KINDS
from tests.factory import devices, profile


def loading(costs: Profile) -> Profile:
    """The profile with batches of 10 bytes of inputs and 1 byte of targets per sample, loaded in 2 s each."""
    return msgspec.structs.replace(
        costs,
        batch_bytes=((1, 10, 1), (8, 80, 8)),
        load=(Timing.of(1, [2.0]), Timing.of(8, [16.0])),
    )


def outcome_of(costs: Profile, strategy: str, k: int, m: int, replicas: int = 1) -> Outcome:
    question = Question(costs, devices(k), k, m, m, replicas)
    return simulate(costs, get(strategy).spread(question), devices(k))


def loaded(outcome: Outcome) -> list[tuple[int, float, float]]:
    """Device, seconds, and bytes of the input that stay, of every load."""
    events = [e for e in outcome.trace.events if e.op == "LOAD"]
    after = {
        e.device: max(p.bytes[KINDS.index("input")] for p in outcome.trace.memory if p.device == e.device)
        for e in events
    }
    return [(e.device, e.work, after[e.device]) for e in events]


@pytest.mark.parametrize(
    ("strategy", "k", "m", "replicas", "expected"),
    [
        ("single", 1, 8, 1, [(0, 16.0, 88.0)]),
        ("data-parallel", 4, 8, 1, [(d, 4.0, 22.0) for d in range(4)]),
        ("1f1b", 4, 8, 2, [(0, 8.0, 40.0), (1, 8.0, 4.0), (2, 8.0, 40.0), (3, 8.0, 4.0)]),
    ],
)
def test_every_replica_loads_its_share(
    strategy: str, k: int, m: int, replicas: int, expected: list[tuple[int, float, float]]
) -> None:
    """8 samples: the first stage keeps inputs (10 bytes each), the last targets (1 byte), of its replica's samples."""
    found = loaded(outcome_of(loading(profile([1.0] * 2)), strategy, k, m, replicas))
    assert sorted(found) == expected


P, STATE = 2 * 1000, 2 * 2000
"""Bytes of the parameters of two layers, and of their optimizer's state."""


def model_of(costs: Profile, plan: Plan, cluster: Cluster) -> MemoryModel:
    return MemoryModel(Placed(costs, plan, cluster), Linked(unroll(plan)))


def static(model: MemoryModel, kind: str) -> list[float]:
    found: list[float] = model.static[:, KINDS.index(kind)].tolist()
    return found


@pytest.mark.parametrize("way", ["parameter-server", "parameter-server-async"])
@pytest.mark.parametrize(
    ("servers", "parameters", "state"),
    [
        (("d0", "d1", "d2", "d3"), [P + P / 4] * 4, [STATE / 4] * 4),
        (("d0",), [P + P, P, P, P], [STATE, 0, 0, 0]),
        (("d1", "d3"), [P, P + P / 2, P, P + P / 2], [0, STATE / 2, 0, STATE / 2]),
    ],
    ids=["sharded", "central", "two of four"],
)
def test_servers_hold_a_copy_and_the_state_workers_hold_parameters(
    way: str, servers: tuple[str, ...], parameters: list[float], state: list[float]
) -> None:
    question = Question(profile([1.0] * 2), devices(4), 4, 4, 4)
    plan = msgspec.structs.replace(get(way).spread(question), servers=servers)
    model = model_of(question.profile, plan, question.cluster)
    assert static(model, "parameters") == parameters
    assert static(model, "optimizer") == state
    alone = MemoryModel(Placed(question.profile, plan, question.cluster), Linked(unroll(plan, replicas=1)))
    assert alone.static[0].sum() == max(map(sum, zip(parameters, state, strict=True))), "one row stands for all"


def test_a_host_that_serves_has_the_parameters_and_the_state_once() -> None:
    costs, cluster = profile([1.0] * 2), devices(4, host_bandwidth=1e9)
    plan = get("central-storage").spread(Question(costs, cluster, 4, 4, 4))
    model = model_of(costs, plan, cluster)
    assert static(model, "parameters") == [P] * 4
    assert static(model, "optimizer") == [0] * 4
    assert model.host_bytes.tolist() == [0] * 4
    assert model.hosts == {"h": P + STATE}


@pytest.mark.parametrize(("way", "n"), [("all-reduce", 1), ("zero-1", 4)])
def test_an_optimizer_on_the_host(way: str, n: int) -> None:
    """Every replica's host has the parameters, gradients and state that it updates: all, or its shard of them."""
    costs, cluster = profile([1.0] * 2), devices(4, host_bandwidth=1e9)
    plan = get("data-parallel" if way == "all-reduce" else way).spread(Question(costs, cluster, 4, 4, 4))
    model = model_of(costs, msgspec.structs.replace(plan, host_optimizer=True), cluster)
    assert static(model, "optimizer") == [0] * 4
    assert model.host_bytes.tolist() == [(P + P + STATE) / n] * 4
    assert model.hosts == {"h": 4 * (P + P + STATE) / n}


def test_swapped_activations_at_their_peak() -> None:
    """GPipe, 2 stages, 6 micro-batches of 2000 bytes: of the last stage's, those stay whose backward comes soon.

    On stage 0 F0..F5 B0..B5: all are swapped (at least four computes lie in between), and all are away when the first
    backward begins. On stage 1, F0..F5 B0..B5 in the same order: likewise.
    """
    costs, cluster = profile([1.0] * 2, message_bytes=1000), devices(2, host_bandwidth=1e9)
    plan = msgspec.structs.replace(get("gpipe").spread(Question(costs, cluster, 2, 6, 6)), offload=True)
    model = model_of(costs, plan, cluster)
    assert model.host_bytes.tolist() == [6 * 2000] * 2
    assert model.hosts == {"h": 2 * 6 * 2000}
    one = msgspec.structs.replace(get("1f1b").spread(Question(costs, cluster, 2, 6, 6)), offload=True)
    assert model_of(costs, one, cluster).host_bytes.tolist() == [0, 0], "1F1B's backwards come too soon on two stages"
