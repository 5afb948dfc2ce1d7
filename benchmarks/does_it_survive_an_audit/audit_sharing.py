"""How transfers share links, and whether the first look of a search keeps plans in order where they do."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import msgspec
import simpy
from figure import Found, figure
from hardware import FOUR_BY_FOUR, GB, GBIT, hosts_of

from planner.basis.errors import PlanError
from planner.costs.flows import Flow
from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.savings import apply
from planner.placement.strategies import all_strategies, get
from planner.search.search import Search
from planner.search.space import Space, candidates, make
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.network import Network, load
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import asynchronous
from planner.values.profile import Profile
from profiles import shipped


def star(**bandwidth: float) -> Cluster:
    """Return devices around one switch, each with a link of its own bandwidth."""
    return Cluster(
        name="star",
        hosts=(Host(name="host", cores=1, memory_bytes=1),),
        devices=tuple(Device(name=name, memory_bytes=1, host="host") for name in bandwidth),
        switches=("switch",),
        links=tuple(
            Link(between=(name, "switch"), latency_s=0.0, bandwidth_bytes_per_s=own) for name, own in bandwidth.items()
        ),
    )


def ends(cluster: Cluster, *messages: tuple[str, str, float]) -> list[float]:
    """Return when messages (from, to, bytes) that begin together are over."""
    env = simpy.Environment()
    network = Network(env, cluster.bandwidths)
    found = [0.0] * len(messages)

    def over(index: int, _: object) -> None:
        found[index] = env.now

    for index, (source, target, size) in enumerate(messages):
        path = cluster.path(source, target)
        seconds = cluster.transfer_seconds(path, size)
        network.send(load((Flow(path, size),), seconds, cluster.bandwidths), seconds, partial(over, index))
    env.run()
    return found


@figure("10 GB beside a flow of 1 GB/s on 100 GB/s", section="sharing", before="0.200 s")
def beside_a_slow_flow() -> Found:
    """The slow flow comes over a link of 1 GB/s and takes 1 of the 100 GB/s that both end in: 10 / (100 - 1) s."""
    cluster = star(slow=1 * GB, quick=100 * GB, end=100 * GB)
    return Found(ends(cluster, ("slow", "end", 1 * GB), ("quick", "end", 10 * GB))[1], 10 / 99)


@figure("12 GB each way over one link of 12 GB/s", section="sharing", before="2 s")
def both_ways_at_once() -> Found:
    """PCIe is full duplex: what goes down does not slow what comes up, each takes 12 / 12 = 1 s."""
    cluster = star(gpu=12 * GB, other=12 * GB)
    return Found(max(ends(cluster, ("gpu", "other", 12 * GB), ("other", "gpu", 12 * GB))), 1.0)


@figure("three flows over a chain of 10 and 4 GB/s", section="sharing", before="3.2 s")
def a_chain_by_hand() -> Found:
    """Flow a passes both links, b the first, c the second; 8 GB each.

    All rates rise to 2 GB/s, where the second link is full with a and c; b rises on to 10 - 2 = 8 GB/s and is over
    after 1 s, a and c after 4 s. Mean: (4 + 1 + 4) / 3 = 3 s.
    """
    chain = Cluster(
        name="chain",
        hosts=(Host(name="host", cores=1, memory_bytes=1),),
        devices=tuple(Device(name=f"d{i}", memory_bytes=1, host="host") for i in range(3)),
        links=(
            Link(between=("d0", "d1"), latency_s=0.0, bandwidth_bytes_per_s=10 * GB),
            Link(between=("d1", "d2"), latency_s=0.0, bandwidth_bytes_per_s=4 * GB),
        ),
    )
    found = ends(chain, ("d0", "d2", 8 * GB), ("d0", "d1", 8 * GB), ("d1", "d2", 8 * GB))
    return Found(sum(found) / 3, 3.0)


@figure("VGG-16 data parallel over 4 x 4: a step", section="sharing", before="1.58 s")
def vgg_step() -> Found:
    """A ring does not contend with itself: forward, the backward of the last two layers, the ring, the optimizer.

    The last layers' gradients, 84 MB, are ready after 0.7 ms of backward and keep the NICs busy until all 553 MB have
    been reduced, 0.83 s, long after the backward is over: 0.117 + 0.001 + 0.830 + 0.003 = 0.951 s. (The issue says
    0.96: the same with the first bucket later.)
    """
    profile = shipped.read(shipped.profiles()["vgg16"])
    plan = get("data-parallel").spread(Question(profile, FOUR_BY_FOUR, 16, 16, 1024))
    size = float(sum(layer.gradient_bytes for layer in profile.layers))
    derived = 0.11695 + 0.00066 + 2 * 15 / 16 * size / 1.25e9 + 0.00307
    return Found(simulated_step(Placed(profile, plan, FOUR_BY_FOUR)), derived)


@figure("VGG-16, 8 devices: optimizers on the host", section="sharing", before="0.23 s")
def eight_host_optimizers() -> Found:
    """All 8 update at the same time through one host's memory, of 100 GB/s here.

    Each brings gradients down and parameters up, p = 553 MB each way, reads p, p of gradients and p of momentum, and
    writes p and p of momentum: 7 p pass the memory. So the 8 take 8 x 7 x 0.553 / 100 = 0.31 s, where one alone takes
    2 x 0.553 / 12 + 5 x 0.553 / 100 = 0.12 s over PCIe and in the memory.
    """
    cluster = hosts_of(1, 8, nic=10 * GBIT)
    host = msgspec.structs.replace(cluster.hosts[0], memory_bytes_per_s=100 * GB)
    cluster = msgspec.structs.replace(cluster, hosts=(host,))
    profile = shipped.read(shipped.profiles()["vgg16"])
    question = Question(profile, cluster, 8, 8, 512)
    plan = apply(question, get("data-parallel").spread(question), ("host-optimizer",))
    trace = simulate(profile, plan, cluster).trace
    update = max(event.end - event.ready for event in trace.events if event.op == "OPTIMIZER")
    parameters = sum(layer.parameter_bytes for layer in profile.layers)
    state = sum(layer.optimizer_bytes for layer in profile.layers)
    return Found(update, 8 * (5 * parameters + 2 * state) / (100 * GB))


def looks(profile: Profile, cluster: Cluster, of: Space) -> list[tuple[float, float]]:
    """Every plan's first look and SimPy's answer."""
    found = []
    for candidate in candidates(of, profile, cluster):
        try:
            plan = make(candidate, profile, cluster)
            placed = Placed(profile, plan, cluster)
            if not asynchronous(plan):
                found.append((evaluate(placed).step_s, simulated_step(placed)))
        except PlanError:
            continue
    return found


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's rank correlation, of the pairs whose second values differ."""
    signs = [(a - c) * (b - d) for (a, b), (c, d) in combinations(pairs, 2) if abs(b - d) > 1e-9 * b]
    return sum((s > 0) - (s < 0) for s in signs) / len(signs)


SPACE = Space(
    strategies=tuple(s.name for s in all_strategies()),
    ks=(1, 2, 4),
    ms=(1, 8),
    replicas=(1, 2),
    tensors=(1,),
    chunks=(1, 2),
    synchronisations=("all-reduce", "zero-1"),
    savings=((),),
    batches=(64,),
)


def _register(nic: int, latency_s: float) -> None:
    hardware = f"2 x 2 at {nic} Gbit/s, {latency_s * 1e3:.0f} ms"

    def cluster() -> Cluster:
        return hosts_of(2, 2, nic=nic * GBIT, latency_s=latency_s / 4)

    def order() -> Found:
        """The first look puts plans in SimPy's order: Kendall's tau over the space is 1, or 0.85 at least."""
        profile = shipped.read(shipped.profiles()["vgg16"])
        return Found(tau(looks(profile, cluster(), SPACE)), 1.0)

    def best() -> Found:
        """What a search calls best takes as long as the best of all plans, each simulated by SimPy."""
        profile = shipped.read(shipped.profiles()["vgg16"])
        answer = Search(profile, cluster(), SPACE).run()
        return Found(
            min(one.step_s for one in answer.leaders), min(step for _, step in looks(profile, cluster(), SPACE))
        )

    figure(f"{hardware}: tau of the first look", section="sharing", unit="", tolerance=0.15)(order)
    figure(f"{hardware}: best of the search", section="sharing", tolerance=1e-6)(best)


for _nic in (1, 10):
    for _latency_s in (0.001, 0.05):
        _register(_nic, _latency_s)
