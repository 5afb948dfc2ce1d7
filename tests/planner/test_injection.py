"""What is injected is seen in the trace: slow devices and links, devices that fail; and nothing else is accepted."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.basis.errors import USAGE, PlanError
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.simulate.contention import Failure
from planner.simulate.injection import inject, slow_device, slow_link, with_bandwidth
from planner.simulate.predict import simulate
from planner.values.cluster import AllReduce
from planner.values.outcome import Outcome
from planner.values.profile import Split
from planner.values.trace import COMPUTE, LINK
from tests.factory import devices, pipeline, profile, shapes


def work(outcome: Outcome, lane: str, device: int) -> dict[str, float]:
    """Seconds of everything on one lane of a device."""
    events = [e for e in outcome.trace.events if e.lane == lane and e.device == device]
    return {e.action: e.end - (e.ready if lane == COMPUTE else e.start) for e in events}


@given(shapes(4, 6), st.sampled_from([2.0, 3.5]), st.data())
def test_a_slow_device_computes_longer(drawn: tuple[str, Any], factor: float, data: st.DataObject) -> None:
    name, shape = drawn
    plan, _ = pipeline(name, shape.devices, shape.microbatches, chunks=shape.chunks)
    slow = data.draw(st.integers(0, shape.devices - 1))
    costs, cluster = profile([1.0] * shape.stages), devices(shape.devices)
    plain = simulate(costs, plan, cluster)
    faulty = simulate(costs, plan, slow_device(cluster, f"d{slow}", factor))
    for device in range(shape.devices):
        times = factor if device == slow else 1.0
        expected = {action: times * seconds for action, seconds in work(plain, COMPUTE, device).items()}
        assert work(faulty, COMPUTE, device) == pytest.approx(expected, abs=1e-11)  # Chimera's reductions take 1e-12
    assert faulty.step_s >= plain.step_s


def test_a_slow_link_transfers_longer() -> None:
    plan, _ = pipeline("gpipe", 2, 3)
    costs, cluster = profile([1.0] * 2, message_bytes=100), devices(2, bandwidth=100.0, latency_s=0.5)
    plain, slow = (simulate(costs, plan, c) for c in (cluster, slow_link(cluster, ("h", "h"), 2.0)))
    assert work(plain, LINK, 1) == pytest.approx({f"1RECV_F{m}": 1.5 for m in range(3)})
    assert work(slow, LINK, 1) == pytest.approx({f"1RECV_F{m}": 3.0 for m in range(3)})
    assert work(slow, COMPUTE, 1) == pytest.approx(work(plain, COMPUTE, 1))


def test_measured_points_of_a_link_are_slower_too() -> None:
    link = msgspec.structs.replace(devices(2).links[0], points=((10, 1.0), (20, 2.0)))
    cluster = msgspec.structs.replace(
        devices(2), links=(link,), all_reduces=(AllReduce(devices=2, points=((10, 1.0),)),)
    )
    assert slow_link(cluster, ("h", "h"), 3.0).links[0].seconds(20) == 6.0
    quick = with_bandwidth(cluster, 2.0)
    assert quick.links[0].seconds(20) == 1.0
    assert quick.all_reduces[0].points == ((10, 0.5),)


@given(st.integers(0, 3), st.floats(0.0, 30.0), st.floats(0.1, 20.0))
def test_a_failing_device_repeats_its_action(device: int, at_s: float, down_s: float) -> None:
    """What it has begun is lost, what it has done is not; nothing is in its way while it is down."""
    plan, _ = pipeline("1f1b", 4, 6)
    costs, cluster = profile([1.0] * 4), devices(4)
    plain = simulate(costs, plan, cluster)
    faulty = simulate(costs, plan, cluster, failures=(Failure(f"d{device}", at_s, down_s),))
    assert plain.step_s <= faulty.step_s <= plain.step_s + down_s + 1.0 + 1e-9
    mine, before = (
        [e for e in outcome.trace.events if e.device == device and e.lane == COMPUTE and e.op in ("F", "B")]
        for outcome in (faulty, plain)
    )
    assert [e.action for e in mine] == [e.action for e in before], "the order is the program's"
    hit = [e for e in mine if e.ready < at_s < e.end]
    assert len(hit) <= 1
    for event in hit:
        assert event.end == pytest.approx(at_s + down_s + 1.0), "as long as it was down, and once more from the start"


def test_a_failure_that_everybody_waits_for() -> None:
    """One device has no slack: the step is longer by the time down and what was lost."""
    plan, _ = pipeline("gpipe", 1, 4)
    failures = (Failure("d0", 1.5, 3.0), Failure("d0", 7.25, 1.0))
    one, both = (simulate(profile([1.0]), plan, devices(1), failures=failures[:n]).step_s for n in (1, 2))
    assert one == pytest.approx(8.0 + 3.0 + 0.5)
    assert both == pytest.approx(one + 1.0 + 0.75)


def test_a_failure_while_waiting_costs_nothing() -> None:
    """The second device waits for the first for three seconds: down for two of them it is back in time."""
    plan, _ = pipeline("gpipe", 2, 2)
    costs = profile([3.0, 1.0])
    plain = simulate(costs, plan, devices(2)).step_s
    assert simulate(costs, plan, devices(2), failures=(Failure("d1", 0.5, 2.0),)).step_s == plain
    assert simulate(costs, plan, devices(2), failures=(Failure("d1", 0.5, 6.0),)).step_s > plain


def test_any_device_of_a_tensor_group_can_fail() -> None:
    costs = profile([2.0] * 2, split=Split(forward=0, backward=0))
    plan = get("tensor-parallel").spread(Question(costs, devices(2), 2, 2, 2))
    plain, *failing = (
        simulate(costs, plan, devices(2), failures=failures).step_s
        for failures in ((), (Failure("d0", 0.5, 2.0),), (Failure("d1", 0.5, 2.0),))
    )
    assert failing == pytest.approx([plain + 2.5] * 2)


def test_a_device_that_the_plan_does_not_use_may_fail() -> None:
    plan, _ = pipeline("gpipe", 2, 2)
    plain = simulate(profile([1.0] * 2), plan, devices(3)).step_s
    assert simulate(profile([1.0] * 2), plan, devices(3), failures=(Failure("d2", 0.5, 9.0),)).step_s == plain


def test_everything_at_once() -> None:
    cluster, failures = inject(
        devices(3), slow_devices=("d1=2", "d2=4"), slow_links=("h:h=10",), failing=("d0@1.5+3", "d1@1e-3+.5")
    )
    assert [d.speed for d in cluster.devices] == [1.0, 0.5, 0.25]
    assert cluster.links[0].bandwidth_bytes_per_s == pytest.approx(1e14)
    assert failures == (Failure("d0", 1.5, 3.0), Failure("d1", 0.001, 0.5))
    assert "d1 2 x slower" in cluster.name
    assert "h:h 10 x slower" in cluster.name


@pytest.mark.parametrize(
    ("flag", "text", "what", "why"),
    [
        ("slow_devices", "d1", "not understood", "d3=2"),
        ("slow_devices", "=2", "not understood", "d3=2"),
        ("slow_devices", "d1=fast", "no positive number", "fast"),
        ("slow_devices", "d1=0", "no positive number", "0"),
        ("slow_devices", "d1=-2", "no positive number", "-2"),
        ("slow_devices", "d1=nan", "no positive number", "nan"),
        ("slow_devices", "d1=inf", "no positive number", "inf"),
        ("slow_devices", "e1=2", "unknown device 'e1'", "did you mean 'd1'"),
        ("slow_links", "h=4", "not understood", "d0:d1=4"),
        ("slow_links", "h:h", "not understood", "d0:d1=4"),
        ("slow_links", "h:h=x", "no positive number", "x"),
        ("slow_links", "h:hh=2", "unknown link 'h:hh'", "did you mean 'h:h'"),
        ("failing", "d0", "not understood", "d2@1.5+3"),
        ("failing", "d0@1.5", "not understood", "d2@1.5+3"),
        ("failing", "d0@soon+3", "no positive number", "soon"),
        ("failing", "d0@1+0", "no positive number", "0"),
        ("failing", "dd0@1+3", "unknown device 'dd0'", "did you mean 'd0'"),
    ],
)
def test_malformed(flag: str, text: str, what: str, why: str) -> None:
    with pytest.raises(PlanError) as raised:
        inject(devices(2), **{flag: (text,)})
    assert raised.value.code == USAGE
    assert what in raised.value.what
    assert why in raised.value.why
    assert raised.value.fix
