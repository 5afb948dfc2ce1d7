"""The answer, as far as a person meets it: the words and figures beside a plan."""

from __future__ import annotations

import msgspec
from figure import Found, figure
from hardware import FOUR_BY_FOUR, TWO_BY_EIGHT

from planner.cli.opened import compared_with
from planner.placement import strategies
from planner.placement.pipeline import Question
from planner.search.answer import Answer
from planner.search.cost import price_per_hour, with_prices
from planner.search.search import Search
from planner.search.space import candidates, space
from planner.simulate.limits import ideal_bubble
from planner.simulate.predict import simulate
from planner.values import cluster_file
from planner.values.cluster import Cluster
from planner.values.plan import Plan, Stage
from profiles import shipped


@figure("ideal bubble, K=4 M=8 R=2", section="answer", unit="share", before="0.273")
def bubble_of_a_replica() -> Found:
    """Each of two pipelines of four stages has 8 / 2 = 4 micro-batches: (4 - 1) / (4 + 4 - 1) = 0.429."""
    stages = tuple(Stage(layers=(f"l{s}",), devices=(f"d{s}", f"d{s + 4}")) for s in range(4))
    plan = Plan(strategy="1f1b", schedule="1f1b", stages=stages, microbatches=8, batch=8)
    return Found(ideal_bubble(plan) or 0.0, 3 / 7)


@figure("VGG-16 data parallel over 4 x 4: share of the step not computing", section="answer", unit="share", before="0")
def waiting_for_reductions() -> Found:
    """A device computes 64 samples' forward and backward and its update; all else of the step is the all-reduce."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    plan = strategies.get("data-parallel").spread(Question(profile, FOUR_BY_FOUR, 16, 16, 1024))
    outcome = simulate(profile, plan, FOUR_BY_FOUR)
    share = 64 / profile.layers[0].times[0].forward[0].samples
    computed = sum(
        (layer.times[0].forward[0].median_s + layer.times[0].backward[0].median_s) * share
        + layer.times[0].optimizer.median_s
        for layer in profile.layers
    )
    return Found(outcome.synchronising, 1 - computed / outcome.step_s)


def _search(name: str, cluster: Cluster, batch: int, **axes: tuple[object, ...]) -> Answer:
    profile = shipped.read(shipped.profiles()[name])
    return Search(profile, cluster, space(profile, cluster, batch, **axes)).run()


@figure("VGG-16 on DGX-1: mechanisms of the best plan", section="answer", unit="", before="3 (zero-3)")
def tie_goes_to_the_simplest() -> Found:
    """ZeRO-3 is 0.4 % quicker than data parallelism, which is within 2 %: the error of the communication model.

    One mechanism, replicas, is the least that eight devices can have: all parts of one model, on each of them.
    """
    cluster = cluster_file.read(shipped.clusters()["dgx1-v100"])
    answer = _search("vgg16", cluster, 1024, strategies=("single", "data-parallel", "zero-1", "zero-3", "1f1b"))
    return Found(answer.leaders[0].mechanisms, 1)


@figure("VGG-16 on DGX-1, K = 1: plans of one micro-batch size", section="answer", unit="", tolerance=0, before="5")
def one_plan_of_one_device() -> Found:
    """With one device every schedule is the same: M micro-batches, one after the other, so one plan."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    cluster = cluster_file.read(shipped.clusters()["dgx1-v100"])
    names = ("single", "naive", "balanced", "data-parallel", "gpipe", "1f1b", "zb-h1", "interleaved", "chimera")
    of = space(profile, cluster, 1024, ks=(1,), ms=(64,), strategies=names, savings=((),))
    return Found(len(list(candidates(of, profile, cluster))), 1)


@figure(
    "GNMT on 2 x 8 at 25 Gbit/s: Chimera over the time of its gradients on the NIC, at least 1",
    section="answer",
    unit="",
    tolerance=0,
    before="no reduction at all",
)
def chimera_reduces() -> Found:
    """One pair of pipelines of 16 stages against each other: both copies of every stage are on different hosts.

    With two of them an all-reduce sends each gradient once each way, so a host sends all 1.1 GB over its 3.125 GB/s:
    a step takes 0.355 s at least, whatever of it hides behind computing.
    """
    profile = shipped.read(shipped.profiles()["gnmt"])
    plan = strategies.get("chimera").spread(Question(profile, TWO_BY_EIGHT, 16, 16, 1024))
    size = sum(layer.gradient_bytes for layer in profile.layers)
    return Found(min(1.0, simulate(profile, plan, TWO_BY_EIGHT).step_s / (size / 3.125e9)), 1.0)


@figure(
    "VGG-16 on 3 of DGX-1's 8 GPUs, 24.48 an hour the host: price of an hour", section="answer", unit="", before="9.18"
)
def hosts_are_rented_whole() -> Found:
    """A host is rented as a whole, however many of its devices a plan uses: 8 devices at 3.06 an hour are 24.48."""
    cluster = with_prices(cluster_file.read(shipped.clusters()["dgx1-v100"]), device=3.06)
    return Found(price_per_hour(cluster, tuple(device.name for device in cluster.devices[:3])), 24.48)


@figure("an H100's profile on a cluster of H100: speed", section="answer", unit="", before="3.7")
def speed_of_its_own_kind() -> Found:
    """What was profiled (or estimated) is what the cluster has: it is as fast as itself."""
    profile = shipped.read(shipped.profiles()["vgg16"])
    own = tuple(msgspec.structs.replace(device, kind="h100") for device in profile.machine.devices)
    estimated = msgspec.structs.replace(profile, machine=msgspec.structs.replace(profile.machine, devices=own))
    cluster, _ = compared_with(cluster_file.read(shipped.clusters()["dgx-h100"]), estimated)
    return Found(cluster.devices[0].speed, 1.0)
