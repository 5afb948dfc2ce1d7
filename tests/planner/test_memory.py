"""What devices hold, against what can be counted by hand."""

from __future__ import annotations

import msgspec
import pytest

from planner.placement.question import Question
from planner.placement.strategies import get
from planner.simulate.predict import simulate
from planner.values.outcome import Outcome
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
