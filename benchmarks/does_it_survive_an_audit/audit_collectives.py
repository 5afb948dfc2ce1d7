"""Collectives over several hosts, of tensor ranks, of sharded states; and as they were measured."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from figure import Found, figure
from hardware import FOUR_BY_FOUR, GB, GBIT, hosts_of

from planner.costs.collectives import ALL_REDUCE, HALF, Choice, over
from planner.costs.placed import Placed
from planner.costs.prices import PriceList
from planner.orders.operations import RECV_FORWARD, REDUCE_GRAD, UNSHARD_FORWARD
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.simulate.contention import simulated_step
from planner.values.cluster import Cluster
from planner.values.cluster_file import read
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, Split, Timing, Value
from profiles import shipped

RAILS = hosts_of(4, 4, nic=10 * GBIT, nics=4)
"""The audit's hosts with a NIC of 10 Gbit/s for every device."""

TWO_BY_FOUR = hosts_of(2, 4, nic=10 * GB)
"""2 hosts of 4 with one NIC of 10 GB/s each."""


def _all(cluster: Cluster, passes: int = ALL_REDUCE) -> Choice:
    return over(cluster, (tuple(device.name for device in cluster.devices),), passes)


def _shipped(name: str) -> Profile:
    return shipped.read(shipped.profiles()[name])


def _gradients(profile: Profile) -> float:
    return float(sum(layer.gradient_bytes for layer in profile.layers))


def _spread(strategy: str, profile: Profile, cluster: Cluster, batch: int) -> Placed:
    count = len(cluster.devices)
    return Placed(profile, get(strategy).spread(Question(profile, cluster, count, count, batch)), cluster)


# Several hosts.


@figure("VGG-16 over 4 x 4, a NIC per GPU: all-reduce", section="collectives", before="0.83 s, over one NIC")
def rails() -> Found:
    """Four rings at once, each with a quarter of 553 MB over a NIC of its own: 2 x 15/16 x 0.553 / (4 x 1.25) = 0.21 s.

    Level by level would take 2 x 3/4 x 0.553 / 12 = 0.07 s inside the hosts and 0.17 s between them.
    """
    size = _gradients(_shipped("vgg16"))
    return Found(_all(RAILS).seconds(size), 2 * 15 / 16 * size / 5e9)


@figure("1 GB over 2 x 8, one NIC per host: a tree instead of a ring", section="collectives", before="1.5 s")
def two_hosts() -> Found:
    """A double binary tree over two hosts has each of them as root for one half and leaf for the other.

    Up and down half a GB each: 1 GB / 1.25 GB/s = 0.8 s. A flat ring carries 2 x 15/16 GB over the NIC: 1.5 s.
    """
    return Found(_all(hosts_of(2, 8, nic=10 * GBIT)).seconds(1e9), 1e9 / 1.25e9)


@figure("1 MB over 4 x 4 with rails and 0.1 ms links: all-gather", section="collectives", unit="ms", before="3.8 ms")
def level_by_level() -> Found:
    """Every hop passes two links, 0.2 ms: 3 rounds between the hosts, then 3 inside.

    1/16 of 1 MB in each over a NIC of 1.25 GB/s, 1/4 over PCIe at 12 GB/s: 6 x 0.2 + 0.15 + 0.06 = 1.41 ms.
    A flat ring waits 15 rounds of 0.2 ms: 3 ms and more.
    """
    cluster = hosts_of(4, 4, nic=10 * GBIT, nics=4, latency_s=1e-4)
    return Found(1e3 * _all(cluster, HALF).seconds(1e6), 6 * 0.2 + 3e3 / 16 * 1e6 / 1.25e9 + 3e3 / 4 * 1e6 / 12e9)


@figure("64 KiB over 64 hosts, 10 us links: a tree", section="collectives", before="0.25 ms")
def small() -> Found:
    """Up and down log2(64) = 6 levels of two links with 10 us: 240 us, and 2 x 64 KiB at 12.5 GB/s: 10 us.

    A ring would wait 2 x 63 rounds of 20 us: 2.5 ms.
    """
    cluster = hosts_of(64, 1, nic=100 * GBIT, pcie=1e15)
    links = [
        msgspec.structs.replace(link, latency_s=1e-5 if "switch" in link.between else 0.0) for link in cluster.links
    ]
    cluster = msgspec.structs.replace(cluster, links=tuple(links))
    return Found(_all(cluster).seconds(2.0**16), 12 * 2e-5 + 2 * 2**16 / 12.5e9)


# Tensor ranks.


def _split_chain(layers: int, gradient_bytes: int, pass_s: float, message_bytes: int) -> Profile:
    """Layers whose tensors split, with as many bytes each, `pass_s` forward and twice that backward in all."""

    def layer(name: str, seconds: float, size: int, split: Split | None) -> LayerProfile:
        once, twice = (Timing.of(1, [seconds * factor]) for factor in (1, 2))
        times = LayerTimes(
            threads=1,
            forward=(once,),
            backward=(twice,),
            backward_input=(once,),
            backward_weight=(once,),
            recompute=(once,),
            optimizer=Timing.of(1, []),
        )
        sizes = LayerSizes(
            samples=1,
            saved_bytes=0,
            output_bytes=0,
            output_saved=False,
            forward_peak_bytes=0,
            backward_first_peak_bytes=0,
            backward_peak_bytes=0,
            flop=0,
        )
        return LayerProfile(
            name=name,
            parameter_bytes=size,
            buffer_bytes=0,
            gradient_bytes=size,
            optimizer_bytes=0,
            optimizer_peak_bytes=0,
            times=(times,),
            sizes=(sizes,),
            split=split,
        )

    like = _shipped("vgg16")
    return msgspec.structs.replace(
        like,
        layers=tuple(
            layer(f"block{i}", pass_s / layers, gradient_bytes // layers, Split(forward=1, backward=1))
            for i in range(layers)
        ),
        loss=layer("loss", 0.0, 0, None),
        values=tuple(
            Value(name=f"v{i}", source=i, targets=(i + 1,), bytes_at=((1, message_bytes),), gradient=True)
            for i in range(layers - 1)
        ),
        whole=(),
        load=(Timing.of(1, []),),
        batch_bytes=((1, 0, 0),),
    )


def _tensor_plan(profile: Profile, stages: int) -> Plan:
    """Four devices of each host split tensors; the two hosts are two replicas, or two stages."""
    names = [layer.name for layer in profile.layers]
    gpus = tuple(f"gpu{i}" for i in range(8))
    if stages == 1:
        parts = [Stage(layers=tuple(names), devices=gpus)]
    else:
        half = len(names) // 2
        parts = [
            Stage(layers=tuple(names[:half]), devices=gpus[:4]),
            Stage(layers=tuple(names[half:]), devices=gpus[4:]),
        ]
    return Plan(strategy="gpipe", schedule="gpipe", stages=tuple(parts), microbatches=2, batch=2, tensor=4)


@figure("8 GB of gradients, TP 4 x DP 2, one 10 GB/s NIC per host: a step", section="collectives", before="0.22 s")
def tensor_ranks_reduce() -> Found:
    """Two billion parameters in fp32: each of four tensor ranks reduces its 2 GB with its like on the other host.

    2 x 1/2 x 2 GB each way, four of them over one NIC: 8 GB / 10 GB/s = 0.80 s, behind 20 ms of computing (80 ms over
    four). Before, only the first rank's 2 GB were on the network.
    """
    profile = _split_chain(8, 8 * 10**9, 0.08 / 3, 0)
    return Found(simulated_step(Placed(profile, _tensor_plan(profile, 1), TWO_BY_FOUR)), 0.02 + 0.8)


@figure("100 MB of activations between stages, TP 4: a message", section="collectives", before="10 ms")
def tensor_ranks_send() -> Found:
    """Each of four tensor ranks has the whole activation and sends it to its like: 4 x 100 MB / 10 GB/s = 40 ms."""
    profile = _split_chain(2, 8, 0.1, 10**8)
    prices = PriceList(Placed(profile, _tensor_plan(profile, 2), TWO_BY_FOUR))
    return Found(prices.transfer(RECV_FORWARD, 0, 0, 1).seconds, 4 * 1e8 / 10e9)


# Sharded states.


@figure("ResNet-50 on 64 A100, ZeRO-3: one gather", section="collectives", unit="ms", before="220 ms")
def gather() -> Found:
    """Send 102 MB in 17 blocks: 16 residual ones (the first with the stem) and the classifier.

    For each, 7 rounds between hosts over two links of 5 us and 7 inside over two of 10 us: 0.21 ms. Of the bytes 7/64
    pass every NIC at 25 GB/s and 7/8 every NVLink at 197 GB/s: 0.45 + 0.45 ms. 17 x 0.21 + 0.9 = 4.5 ms, about 5.
    """
    placed = _spread("zero-3", _shipped("resnet50"), read(shipped.clusters()["a100x64"]), 64 * 128)
    size = float(sum(layer.parameter_bytes for layer in placed.profile.layers))
    derived = 17 * 7 * (10e-6 + 20e-6) + size * (7 / 64 / 25e9 + 7 / 8 / 197e9)
    return Found(1e3 * PriceList(placed).transfer(UNSHARD_FORWARD, 0, 0, 0).busy, 1e3 * derived)


@figure("VGG-16 over 4 x 4: a ZeRO-1 step in those of data parallelism", section="collectives", unit="x", tolerance=0.1)
def zero_1() -> Found:
    """A reduce-scatter and an all-gather move what an all-reduce does (arXiv 1910.02054, section 7.1).

    2 x 15/16 of the bytes, and both steps wait for the network: 1, but for what is hidden before and behind it.
    """
    steps = [
        simulated_step(_spread(name, _shipped("vgg16"), FOUR_BY_FOUR, 16 * 64)) for name in ("zero-1", "data-parallel")
    ]
    return Found(steps[0] / steps[1], 1.0)


@figure("ZeRO-3's bytes per step in those of data parallelism", section="collectives", unit="x")
def volumes() -> Found:
    """Two gathers and a reduce-scatter of all parameters: 3 where an all-reduce has 2.

    arXiv 1910.02054, section 7.2: 3 x the model's size against 2 x; 1.5.
    """
    moved = {}
    for name in ("zero-3", "data-parallel"):
        prices = PriceList(_spread(name, _shipped("resnet50"), RAILS, 16 * 64))
        ops = (REDUCE_GRAD, UNSHARD_FORWARD, "UNSHARD_B") if name == "zero-3" else (REDUCE_GRAD,)
        flows = [flow for op in ops for flow in prices.transfer(op, 0, 0, 0).flows]
        moved[name] = sum(flow.bytes * sum("switch" in RAILS.link_of(n).between for n in flow.path) for flow in flows)
    return Found(moved["zero-3"] / moved["data-parallel"], 1.5)


# As measured.


@figure("Two GPUs of a DGX-1 reduce 1 GiB", section="collectives", unit="ms", before="8.0 ms")
def measured_pair() -> Found:
    """nccl-tests on two V100s, joined by one NVLink (vtrain_nccl_allreduce_lut.csv): 47.6 ms."""
    cluster = read(shipped.clusters()["dgx1-v100"])
    return Found(1e3 * over(cluster, (("gpu0", "gpu1"),), ALL_REDUCE).seconds(2.0**30), 47.61)


def _from_links(name: str, devices: int) -> Found:
    """Milliseconds of 1 GiB over the first GPUs of a shipped cluster by its links alone, and as nccl-tests measured."""
    cluster = read(shipped.clusters()[name])
    curve = next(curve for curve in cluster.all_reduces if curve.devices == devices)
    bare = msgspec.structs.replace(cluster, all_reduces=())
    group = tuple(device.name for device in cluster.devices[:devices])
    return Found(1e3 * over(bare, (group,), ALL_REDUCE).seconds(2.0**30), 1e3 * dict(curve.points)[2**30])


def _of_dgx1(devices: int) -> Callable[[], Found]:
    def found() -> Found:
        """As many rings as the NVLinks carry, at 22.4 GB/s each: 1, 2, 4, 2, 4 and 6 over 2, 3, 4, 6, 7 and 8 GPUs.

        2 (n - 1) / n x 1.07 GB over them. (Over 5 no ring closes without passing through a sixth GPU.) The derived
        figure is the measurement, vtrain_nccl_allreduce_lut.csv. Below 16 MiB the links alone are up to twice too slow:
        a link's latency is a whole message's, and NCCL's rounds run inside one kernel.
        """
        return _from_links("dgx1-v100", devices)

    return found


def _of_dgx_a100(devices: int) -> Callable[[], Found]:
    def found() -> Found:
        """2 (n - 1) / n x 1.07 GB around a ring over NVSwitch, at 197 GB/s: what two GPUs reach.

        The derived figure is the measurement, vtrain_nccl_allreduce_lut.csv: of more GPUs NCCL reaches up to 229 GB/s,
        so two's bandwidth is up to a fifth too slow, and below 16 MiB two's latency up to three times. Where such
        curves are shipped, they are taken.
        """
        return _from_links("dgx-a100", devices)

    return found


for _n in (2, 3, 4, 6, 7, 8):
    figure(f"{_n} GPUs of a DGX-1, 1 GiB, from the links", section="collectives", unit="ms", tolerance=0.05)(
        _of_dgx1(_n)
    )
for _n in range(2, 9):
    figure(f"{_n} GPUs of a DGX A100, 1 GiB, from the links", section="collectives", unit="ms", tolerance=0.21)(
        _of_dgx_a100(_n)
    )


@figure("Groups of 2 + 2 GPUs on 2 x 8, all at once: bus bandwidth", section="collectives", unit="GB/s")
def strided() -> Found:
    """Pairs across hosts reach 8.13 GB/s each: a NIC each (galvatron_hardware_profile.csv, allreduce_size_2_consec_0).

    Four groups of four then run two rings each: 16.3 GB/s; measured 16.2 (size_4_consec_0). Groups of 8 and 16 were
    measured at 64 and 69 % of four and eight NICs; nothing in the links says why.
    """
    cluster = hosts_of(2, 8, nic=8.13007 * GB, nics=8, pcie=150 * GB)
    groups = tuple(tuple(f"gpu{8 * host + at}" for host in range(2) for at in (g, g + 4)) for g in range(4))
    ring = next(way for way in over(cluster, groups, ALL_REDUCE).collectives if way.name == "ring")
    return Found(2 * 3 / 4 * 1e9 / ring.seconds(1e9) / GB, 16.22)
