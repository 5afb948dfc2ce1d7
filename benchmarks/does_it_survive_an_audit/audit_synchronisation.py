"""How replicas agree: who reduces, what a server's port carries, in which order, and how stale gradients are."""

from __future__ import annotations

from pathlib import Path

import msgspec
from figure import Found, figure
from hardware import GBIT, hosts_of

from planner.costs.collectives import ALL_REDUCE, over
from planner.costs.placed import Placed
from planner.costs.prices import PriceList
from planner.orders.operations import PULL, PUSH, REDUCE_GRAD
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.programs.lowering import lower
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.simulate.staleness import staleness
from planner.values import cluster_file
from planner.values.cluster import Cluster
from planner.values.plan import Plan
from planner.values.profile import Profile, Value
from profiles import shipped

TWO_BY_EIGHT = hosts_of(2, 8, nic=25 * GBIT)
EIGHT_HOSTS = hosts_of(8, 1, nic=10 * GBIT)
DGX_H100 = cluster_file.read(shipped.clusters()["dgx-h100"])
EIGHT_DEVICES = cluster_file.read(Path(__file__).parents[2] / "examples" / "eight_devices.toml")


def planned(strategy: str, profile: Profile, cluster: Cluster, m: int, batch: int, replicas: int = 1) -> Placed:
    """Return the plan of a strategy on all devices of a cluster."""
    question = Question(profile, cluster, len(cluster.devices), m, batch, replicas)
    return Placed(profile, get(strategy).spread(question), cluster)


def furthest(placed: Placed, derived: float) -> float:
    """Return the step of whichever interpreter is further away from what was derived."""
    return max(simulated_step(placed), evaluate(placed).step_s, key=lambda step: abs(step - derived))


def gradients(profile: Profile) -> float:
    """Bytes of all gradients."""
    return float(sum(layer.gradient_bytes for layer in profile.layers))


@figure("GNMT-16, Chimera over 2 x 8 at 25 Gbit/s: gradients on a NIC", section="synchronisation", before="0 s")
def chimera_reduces() -> Found:
    """The two copies of each of 16 stages are on different hosts (stage s on devices s and 15 - s).

    A ring of two sends all of a stage's gradients each way: 1,111 MB at 3.125 GB/s are 355 ms on each NIC, each way.
    """
    profile = shipped.read(shipped.profiles()["gnmt_large"])
    placed = planned("chimera", profile, TWO_BY_EIGHT, 16, 1024)
    prices, carried = PriceList(placed), 0.0
    program = lower(placed.plan)
    nic = next(i for i, link in enumerate(TWO_BY_EIGHT.links) if link.between == ("host0", "switch"))
    for stage, holders in enumerate(placed.holders):
        for row in program.rows[holders[0]]:
            if (row.stage, row.op) == (stage, REDUCE_GRAD):
                flows = prices.transfer(REDUCE_GRAD, stage, -1, -1).flows
                carried += sum(flow.bytes for flow in flows if 2 * nic in flow.path)
    return Found(carried / (25 * GBIT), gradients(profile) / 3.125e9)


@figure("VGG-16, 8 sharded servers on separate devices: a pull", section="synchronisation", before="6.9 ms")
def pull() -> Found:
    """A server sends its eighth of 553 MB to 7 others over its port of 10 GB/s: 553 x 7/8 / 10 GB/s = 48.4 ms."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("parameter-server", profile, EIGHT_DEVICES, 8, 128)
    return Found(PriceList(placed).transfer(PULL, 0, 1, 1).seconds, gradients(profile) * 7 / 8 / 10e9)


@figure("VGG-16, batch 128, 8 sharded servers: what serving adds to a step", section="synchronisation")
def served_step() -> Found:
    """Every worker pulls for 48.4 ms, computes, and pushes for 48.4 ms; then each server updates its eighth.

    Reducing costs 43 ms behind the last backward (the rest of the ring's 97 ms hides), so the server is slower.
    """
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("parameter-server", profile, EIGHT_DEVICES, 8, 128)
    trace = simulate(profile, placed.plan, EIGHT_DEVICES).trace
    computing = sum(e.work for e in trace.events if e.device == 3 and e.op in ("F", "B"))
    update = sum(layer.times[0].optimizer.median_s for layer in profile.layers) / 8
    derived = 2 * gradients(profile) * 7 / 8 / 10e9 + update
    return Found(furthest(placed, computing + derived) - computing, derived)


@figure("VGG-16, batch 128, one server for 8 workers: what serving adds to a step", section="synchronisation")
def central_server() -> Found:
    """The server's port carries 7 x 553 MB out for the pulls and in for the pushes: 2 x 7 x 0.553 / 10 = 775 ms.

    Then it updates all parameters.
    """
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("parameter-server", profile, EIGHT_DEVICES, 8, 128)
    placed = Placed(profile, msgspec.structs.replace(placed.plan, servers=("d0",)), EIGHT_DEVICES)
    trace = simulate(profile, placed.plan, EIGHT_DEVICES).trace
    computing = sum(e.work for e in trace.events if e.device == 3 and e.op in ("F", "B"))
    update = sum(layer.times[0].optimizer.median_s for layer in profile.layers)
    derived = 2 * 7 * gradients(profile) / 10e9 + update
    return Found(furthest(placed, computing + derived) - computing, derived)


@figure("DenseNet-121, 8 sharded servers on a DGX H100: a pull and a push", section="synchronisation", before="0.16 ms")
def served_in_turn() -> Found:
    """Over a device's NVLink 7 shards come one after the other, and 7 go: each message has a latency of its own.

    From GPU to NVSwitch to GPU are 2 x 10 us; 7 messages of an eighth of 32 MB over 450 GB/s: 7 x 20 us + 62 us, 0.20
    ms each way, as in a ring, whose 2 x 7 rounds wait as often for as many bytes. With one latency for all 7 the server
    was twice as quick as the all-reduce, and "best" for small models.
    """
    profile = shipped.read(shipped.profiles()["densenet121"])
    placed = planned("parameter-server", profile, DGX_H100, 8, 64)
    prices = PriceList(placed)
    found = sum(prices.transfer(op, 0, 3, 3).seconds for op in (PULL, PUSH))
    return Found(found, 2 * (7 * 20e-6 + gradients(profile) * 7 / 8 / 450e9))


@figure("DenseNet-121, 8 devices of a DGX H100: servers over an all-reduce", section="synchronisation", unit="times")
def served_as_reduced() -> Found:
    """A pull and a push move what a ring moves, 2 x 7/8 of the bytes, in as many messages: they take as long."""
    profile = shipped.read(shipped.profiles()["densenet121"])
    prices = PriceList(planned("parameter-server", profile, DGX_H100, 8, 64))
    served = sum(prices.transfer(op, 0, 3, 3).at_once for op in (PULL, PUSH))
    names = tuple(device.name for device in DGX_H100.devices)
    return Found(served / over(DGX_H100, (names,), ALL_REDUCE).seconds(gradients(profile)), 1.0)


def four_stages() -> Profile:
    """Four layers with VGG-16's first layer's times, 250 MB of gradients each, and nothing to send on."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    layers = tuple(
        msgspec.structs.replace(profile.layers[0], name=f"stage{s}", gradient_bytes=250_000_000) for s in range(4)
    )
    values = tuple(
        Value(name=f"value{s}", source=s, targets=(s + 1,), bytes_at=((128, 0),), gradient=True) for s in range(3)
    )
    return msgspec.structs.replace(profile, layers=layers, values=values)


@figure("PP 4 x DP 2: stages reduce at the same time", section="synchronisation", before="0.83 s")
def sent_first() -> Found:
    """Four equal stages of 250 MB of gradients and two replicas, 8 hosts with a NIC of 10 Gbit/s each.

    12 samples of VGG-16's first layer take 4.4 ms forward and backward; 4 micro-batches per replica through 4 stages 7
    times that, 31 ms. Then every stage reduces over NICs of its own: a ring of two sends 250 MB each way in 0.2 s.
    Reduced before the gradient is sent on, the stages would do so one after the other: 0.03 + 4 x 0.2 = 0.83 s.
    (The audit gives 0.23 and 0.83 s without their assumptions; these are some with which both come out.)
    """
    profile = four_stages()
    placed = planned("1f1b", profile, EIGHT_HOSTS, 8, 96, 2)
    (times,) = profile.layers[0].times
    both = (times.forward[0].median_s + times.backward[0].median_s) * 12 / 128
    derived = 7 * both + 250e6 / 1.25e9
    return Found(furthest(placed, derived), derived)


def stale(plan: Plan, profile: Profile, cluster: Cluster) -> float:
    """Return the mean staleness of a plan's gradients."""
    return staleness(simulate(profile, plan, cluster))


@figure("VGG-16, asynchronous servers, 8 equal workers: staleness", section="synchronisation", unit="updates")
def server_staleness() -> Found:
    """Between a worker's pull and its push every other worker pushes once: K - 1 = 7."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("parameter-server-async", profile, EIGHT_DEVICES, 8, 128)
    assert PUSH in {action.op for action in lower(placed.plan).rows[0]}
    return Found(stale(placed.plan, profile, EIGHT_DEVICES), 7)


@figure("VGG-16, PipeDream over 8: staleness", section="synchronisation", unit="updates")
def pipedream_staleness() -> Found:
    """Stage s of 8 updates 7 - s times between a micro-batch's forward and backward: 3.5 on average."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("pipedream", profile, EIGHT_DEVICES, 8, 128)
    return Found(stale(placed.plan, profile, EIGHT_DEVICES), 3.5)


@figure("VGG-16, PipeDream-2BW over 8: staleness", section="synchronisation", unit="updates")
def double_buffered_staleness() -> Found:
    """W(t + 1) = W(t) - lr x gradient at W(t - 1) (arXiv 2006.09503): one update, at every stage."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    placed = planned("pipedream-2bw", profile, EIGHT_DEVICES, 8, 128)
    return Found(stale(placed.plan, profile, EIGHT_DEVICES), 1)
