"""A rehearsal performs the program that is predicted, with the bytes that are predicted. Times are not asserted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch

from executor.rehearse import rehearse
from executor.waiting import Waits, untouched
from planner.costs.placed import Placed
from planner.costs.rehearsed import rehearsal_of, rehearsed_profile, stage_hardware
from planner.placement.pipeline import Question
from planner.placement.strategies import get
from planner.programs.lowering import lower
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Host, Link
from planner.values.outcome import compare
from planner.values.rehearsal import Row
from planner.values.trace import COMPUTE, LINK
from tests.factory import devices, profile

HERE = Cluster(
    name="here",
    hosts=(Host(name="local", cores=2, memory_bytes=2**33),),
    elastic=True,
    links=(Link(between=("local", "local"), latency_s=1e-4, bandwidth_bytes_per_s=1e9),),
)


def test_every_action_happens_and_as_many_bytes_come_as_are_predicted(tmp_path: Path) -> None:
    """A plan with messages and a collective on four processes, from a profile that nobody measured."""
    model = msgspec.structs.replace(profile([1e-3] * 4, message_bytes=10_000, bytes_=[40_000] * 4), estimated=True)
    plan = get("1f1b").spread(Question(model, devices(4), 4, 4, 8, replicas=2))
    cluster = stage_hardware(devices(4), HERE, plan, message_scale=0.5, wake_s=0.0)
    model = rehearsed_profile(model, jitter=False)
    predicted = simulate(model, plan, cluster)
    measured = rehearse(
        rehearsal_of(Placed(model, plan, cluster)),
        plan,
        steps=2,
        seed=0,
        folder=tmp_path,
        capacity_bytes=predicted.capacity_bytes,
        expected_step_s=predicted.step_s,
    )
    assert measured.source == "rehearsed"
    assert not measured.losses
    for row, actions in enumerate(lower(plan).rows):
        done = [e.action for e in measured.trace.events if e.device == row and e.lane == COMPUTE]
        assert sorted(done) == sorted(map(str, actions))
    assert _moved(predicted) == _moved(measured)
    assert all(abs(error.relative) < 0.01 for error in compare(predicted, measured).memory)


def _moved(outcome: object) -> Counter[tuple[int, str]]:
    """The bytes of every message, by who receives it and which it is."""
    events = (e for e in outcome.trace.events if e.lane == LINK and "RECV" in e.action)  # type: ignore[attr-defined]
    return Counter({(e.device, e.action): round(e.bytes) for e in events})


def test_hardware_of_a_rehearsal_waits_at_the_plans_own_speed_and_sends_over_this_machines_links() -> None:
    target = devices(2)
    plan = get("gpipe").spread(Question(profile([1.0] * 2, message_bytes=1000), target, 2, 4, 4))
    slow = msgspec.structs.replace(target.devices[0], speed=0.5)
    target = msgspec.structs.replace(target, devices=(slow, *target.devices[1:]))
    cluster = stage_hardware(target, HERE, plan, message_scale=0.25, wake_s=0.0)
    placed = Placed(profile([1.0] * 2, message_bytes=1000), plan, cluster)
    found = rehearsal_of(placed)
    assert found.rows[0].seconds["0F"][2] == pytest.approx(2 * found.rows[1].seconds["1F"][2])
    assert cluster.links == HERE.links
    whole = Placed(profile([1.0] * 2, message_bytes=1000), plan, target).edge_bytes(plan.edges[0], gradients=False)
    assert found.stages[1].taken[0].bytes == placed.edge_bytes(plan.edges[0], gradients=False) == whole / 4


def test_waits_are_drawn_from_a_seed_and_never_beyond_what_was_measured() -> None:
    row = Row(static={}, seconds={"0F": (1.0, 2.0, 3.0, 4.0, 5.0)})

    def drawn(seed: int) -> list[float]:
        waits = Waits(row, (0.1, 0.25, 0.5, 0.75, 0.9), jitter=True, seed=seed)
        return [waits.seconds_of(0, "F") for _ in range(200)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert min(drawn(1)) >= 1.0
    assert max(drawn(1)) <= 5.0
    assert len(set(drawn(1))) > 100


def test_what_is_never_written_is_counted_and_not_there() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    held = untouched(3 * 2**30)
    assert sum(tensor.nbytes for tensor in held) == 3 * 2**30
    assert all(isinstance(t, torch.Tensor) for t in held)
    assert resident() - before < 2**26
