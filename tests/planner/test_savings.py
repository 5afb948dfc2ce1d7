"""Savings: what they free by the memory model, what they cost by the simulator, and where they are not possible."""

from __future__ import annotations

from itertools import chain, combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.basis.errors import DEVICE, USAGE, PlanError
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.savings import COMBINATIONS, apply, names
from planner.placement.strategies import get
from planner.programs.lowering import lower, unroll
from planner.programs.waits import Linked
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster
from planner.values.outcome import Outcome
from planner.values.plan import Plan
from planner.values.profile import Profile
from planner.values.trace import KINDS
from tests.factory import devices, profile


def spread(costs: Profile, cluster: Cluster, strategy: str, k: int, m: int, *saved: str) -> Plan:
    return get(strategy).spread(Question(costs, cluster, k, m, m, savings=saved))


def simulated(costs: Profile, cluster: Cluster, strategy: str, k: int, m: int, *saved: str) -> Outcome:
    return simulate(costs, spread(costs, cluster, strategy, k, m, *saved), cluster)


def kinds(outcome: Outcome, device: int) -> dict[str, float]:
    """A device's bytes at its peak, by kind."""
    return dict(zip(KINDS, outcome.peak[device].bytes, strict=True))


def peaks(costs: Profile, plan: Plan) -> list[float]:
    found: list[float] = (
        MemoryModel(Placed(costs, plan, devices(len(plan.device_names))), Linked(unroll(plan))).peaks().tolist()
    )
    return found


@settings(max_examples=80)
@given(
    st.integers(1, 2),
    st.sampled_from(["gpipe", "1f1b"]),
    st.integers(2, 4),
    st.lists(
        st.tuples(st.sampled_from([1.0, 2.0, 3.0, 5.5]), st.sampled_from([100, 700, 1000, 2500])),
        min_size=3,
        max_size=6,
    ),
    st.floats(0.0, 1.0),
)
def test_recomputed_layers_are_the_cheapest(
    k: int, strategy: str, m: int, layers: list[tuple[float, int]], tightness: float
) -> None:
    """Against all subsets of layers, through the memory model: stages decide by themselves."""
    costs = profile([f for f, _ in layers], bytes_=[b for _, b in layers], message_bytes=100)
    plan = spread(costs, devices(k), strategy, k, m)
    ranges = plan.layer_ranges([layer.name for layer in costs.layers])
    plain = peaks(costs, plan)
    held: dict[tuple[int, tuple[int, ...]], float] = {}
    for row, own in enumerate(ranges):
        for chosen in chain.from_iterable(combinations(own, n) for n in range(len(own) + 1)):
            trial = msgspec.structs.replace(plan, recompute_layers=tuple(costs.layers[i].name for i in chosen))
            held[row, chosen] = peaks(costs, trial)[row]
    least = max(min(need for (at, _), need in held.items() if at == row) for row in range(k))
    room = int(least + tightness * (max(plain) - least)) + 1
    cluster = devices(k, memory_bytes=room)
    best = sum(
        min(sum(layers[i][0] for i in chosen) for (at, chosen), need in held.items() if at == row and need <= room)
        for row in range(k)
    )
    if max(plain) <= room:
        with pytest.raises(PlanError, match="changes nothing"):
            apply(Question(costs, cluster, k, m, m), plan, ("recompute-layers",))
        return
    found = apply(Question(costs, cluster, k, m, m), plan, ("recompute-layers",))
    assert max(peaks(costs, found)) <= room
    names = [layer.name for layer in costs.layers]
    seconds = sum(layers[names.index(name)][0] for name in found.recompute_layers)
    assert seconds <= best * 1.01
    lower(found)


@pytest.mark.parametrize("strategy", ["interleaved", "zb-v", "chimera", "v-half"])
def test_devices_with_several_stages_choose_together(strategy: str) -> None:
    costs = profile([1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 1.0, 2.0], bytes_=[1000, 200, 1500, 700, 1000, 300, 900, 400])
    plain = simulated(costs, devices(2), strategy, 2, 8)
    tight = devices(2, memory_bytes=int(0.9 * plain.peak_bytes))
    found = simulate(costs, apply(Question(costs, tight, 2, 8, 8), plain.plan, ("recompute-layers",)), tight)
    assert found.fits
    assert 0 < len(found.plan.recompute_layers) < 8
    assert plain.step_s < found.step_s


def test_no_choice_of_layers_is_enough() -> None:
    with pytest.raises(PlanError) as raised:
        spread(profile([1.0] * 4), devices(2, memory_bytes=9000), "gpipe", 2, 4, "recompute-layers")
    assert raised.value.code == USAGE
    assert "not enough" in raised.value.what


def test_recompute_repeats_what_it_says() -> None:
    """The trace shows an R before every B of a stage with a chosen layer, which takes as long as that layer's F."""
    costs = profile([1.0, 2.0, 4.0, 1.0])
    plan = msgspec.structs.replace(spread(costs, devices(2), "gpipe", 2, 4), recompute_layers=("layer1",))
    outcome = simulate(costs, plan, devices(2))
    repeated = [(e.device, e.work) for e in outcome.trace.events if e.op == "R"]
    assert repeated == [(0, 2.0)] * 4


@pytest.mark.parametrize("host_bandwidth", [1e12, 300.0])
def test_offload_frees_activations(host_bandwidth: float) -> None:
    """Over a quick link it costs nothing, over a slow one time; either way less is held."""
    cluster = devices(2, host_bandwidth=host_bandwidth)
    host = msgspec.structs.replace(cluster.hosts[0], memory_bytes_per_s=1e15)
    cluster = msgspec.structs.replace(cluster, hosts=(host,))
    costs = profile([1.0] * 4, message_bytes=10)
    plain, swapped = (simulated(costs, cluster, "gpipe", 2, 8, *saved) for saved in ((), ("offload",)))
    assert swapped.plan.offload
    assert swapped.peak_bytes < plain.peak_bytes
    assert kinds(swapped, 0)["activations"] < kinds(plain, 0)["activations"]
    if host_bandwidth == 1e12:
        assert swapped.step_s == pytest.approx(plain.step_s)
    else:
        assert swapped.step_s > plain.step_s * 1.01
    copied = [e for e in swapped.trace.events if e.op == "OFFLOAD" and e.lane == "link"]
    fetched = [e for e in swapped.trace.events if e.op == "FETCH" and e.lane == "link"]
    assert len(copied) == len(fetched) > 0
    for event in copied:
        assert event.end - event.start == pytest.approx(event.bytes / host_bandwidth, rel=1e-3)


def test_messages_keep_to_their_own_link() -> None:
    """A link to the host's memory does not take over what two devices say to each other."""
    costs = profile([1.0] * 2, message_bytes=100)
    alone, beside = (
        simulated(costs, devices(2, bandwidth=100.0, host_bandwidth=host), "gpipe", 2, 4) for host in (0.0, 10.0)
    )
    assert beside.step_s == alone.step_s


def test_the_hosts_optimizer() -> None:
    """Parameters 1000, gradients 1000 and optimizer state 2000 bytes per layer: the state leaves the device.

    The update moves 2 x 1000 + 1000 + 2 x 2000 bytes in the host's memory, and 1000 each way over the link.
    """
    cluster = devices(2, host_bandwidth=1000.0)
    hosts = (msgspec.structs.replace(cluster.hosts[0], memory_bytes_per_s=7000.0),)
    cluster = msgspec.structs.replace(cluster, hosts=hosts)
    costs = profile([1.0] * 2, optimizer_s=0.5)
    plain, moved = (simulated(costs, cluster, "gpipe", 2, 4, *saved) for saved in ((), ("host-optimizer",)))
    for device in range(2):
        assert kinds(plain, device)["optimizer"] == 2000
        assert kinds(moved, device)["optimizer"] == 0
        assert moved.peak[device].total == plain.peak[device].total - 2000
    updates = [e.work for e in moved.trace.events if e.op == "OPTIMIZER"]
    assert updates == pytest.approx([1.0 + 2.0] * 2)
    assert moved.step_s == pytest.approx(plain.step_s - 0.5 + 3.0)


def test_a_sharded_optimizer_on_the_host() -> None:
    """Each of two replicas moves and updates its half."""
    cluster = devices(2, host_bandwidth=1000.0)
    costs = profile([1.0])
    whole, half = (
        [e.work for e in simulated(costs, cluster, way, 2, 2, "host-optimizer").trace.events if e.op == "OPTIMIZER"]
        for way in ("data-parallel", "zero-1")
    )
    assert half == pytest.approx([seconds / 2 for seconds in whole])


@pytest.mark.parametrize("saved", [c for c in COMBINATIONS if c and c != ("recompute-layers",)])
def test_combinations(saved: tuple[str, ...]) -> None:
    """Savings add up: each one more makes a plan smaller, and none quicker, but for what then need not be swapped."""
    cluster = devices(2, host_bandwidth=500.0)
    costs = profile([1.0] * 4, message_bytes=10)
    plain = simulated(costs, cluster, "gpipe", 2, 8)
    both = simulated(costs, cluster, "gpipe", 2, 8, *saved)
    for one in saved:
        alone = simulated(costs, cluster, "gpipe", 2, 8, one)
        assert both.peak_bytes <= alone.peak_bytes < plain.peak_bytes
        assert alone.step_s >= plain.step_s
        assert both.step_s >= alone.step_s or (one == "offload" and "recompute" in saved)
    assert lower(both.plan)


@pytest.mark.parametrize("saved", ["offload", "host-optimizer"])
def test_without_a_link_to_the_host(saved: str) -> None:
    with pytest.raises(PlanError) as raised:
        simulated(profile([1.0] * 4), devices(2), "gpipe", 2, 8, saved)
    assert raised.value.code == DEVICE
    assert len(str(raised.value).splitlines()) == 4
    assert "no link to its host's memory" in raised.value.what
    assert '["d0", "h"]' in raised.value.fix


@pytest.mark.parametrize(("strategy", "m"), [("1f1b", 8), ("gpipe", 2), ("naive", 8)])
def test_swapping_that_would_change_nothing(strategy: str, m: int) -> None:
    """Backwards that come right behind their forwards leave nothing to swap."""
    cluster = devices(2, host_bandwidth=1e9)
    with pytest.raises(PlanError, match="offload changes nothing"):
        spread(profile([1.0] * 2), cluster, strategy, 2, m, "offload")


def test_unknown_savings_get_the_nearest() -> None:
    assert {name for chosen in COMBINATIONS for name in chosen} == set(names())
    with pytest.raises(PlanError) as raised:
        spread(profile([1.0]), devices(1), "gpipe", 1, 1, "ofload")
    assert raised.value.code == USAGE
    assert "did you mean 'offload'" in raised.value.why
