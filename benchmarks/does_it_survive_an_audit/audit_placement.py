"""Where stages go: mappings of ranks, unequal devices, even cuts, PipeDream's partition, savings before the cut."""

from __future__ import annotations

import msgspec
from figure import Found, figure
from hardware import FOUR_BY_FOUR, GB, GBIT, hosts_of

from planner.costs.placed import Placed
from planner.placement.question import Question
from planner.placement.strategies import get
from planner.search.space import space
from planner.simulate.contention import simulated_step
from planner.simulate.evaluate import evaluate
from planner.simulate.predict import simulate
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan, Stage
from planner.values.profile import LayerProfile, LayerSizes, LayerTimes, Profile, ProfileKey, Timing, Value
from profiles import shipped

MODELS = shipped.profiles()
TWO_BY_EIGHT = hosts_of(2, 8, nic=25 * GBIT)


def gnmt(mapping: str) -> Plan:
    """Two stages of 8 replicas, 64 samples per device, two micro-batches per replica."""
    costs = shipped.read(MODELS["gnmt_large"])
    return get("1f1b").spread(Question(costs, TWO_BY_EIGHT, 16, 16, 1024, replicas=8, mapping=mapping))  # type: ignore[arg-type]


@figure("GNMT-16 as 2 stages x 8 replicas on 2 hosts of 8", section="placement", tolerance=0.05, before="1.45 s")
def gnmt_stages_side_by_side() -> Found:
    """Replicas of a stage in one host; 25 Gbit/s per host, 64 samples per device, two micro-batches of 64 per replica.

    Stage 0 computes 263.4 ms per 128 samples and stage 1 257.1 ms, so 131.7 and 128.6 ms per micro-batch. The 26.2 MB
    that cross per 128 samples are 8 x 13.1 MB per micro-batch of all replicas over one NIC of 3.125 GB/s: 33.6 ms each
    way. 1F1B with two micro-batches takes stage 0's forward, the NIC, twice stage 1, the NIC, stage 0's backward:
    131.7 + 2 x 128.6 + 2 x 33.6 = 456 ms (the 0.46 s of the audit). Of the gradients, reduced inside the hosts over
    PCIe (2 x 7/8 / 12 GB/s), the embedding's 132.4 MB are ready last: 19.3 ms more.
    """
    costs = shipped.read(MODELS["gnmt_large"])
    stages = 0.26335 / 2 + 2 * 0.2571 / 2
    derived = stages + 2 * 8 * 26.2144e6 / 2 / 3.125e9 + 2 * 7 / 8 * 132.38e6 / (12 * GB)
    return Found(simulate(costs, gnmt(""), TWO_BY_EIGHT).step_s, derived)


@figure("GNMT-16: the mapping that is taken is the quicker one", section="placement", unit="", tolerance=0)
def gnmt_mapping() -> Found:
    """The step of the plan that is taken over the shorter one of both mappings': 1."""
    costs = shipped.read(MODELS["gnmt_large"])
    steps = {m: simulate(costs, gnmt(m), TWO_BY_EIGHT).step_s for m in ("", "stages", "pipelines")}
    return Found(steps[""] / min(steps.values()), 1.0)


def layer(
    name: str, seconds: float, *, parameters: float = 0.0, saved: float = 0.0, output: float = 1.0
) -> LayerProfile:
    """Return a layer for micro-batches of one sample: a backward takes twice its forward's `seconds`; mixed precision.

    Of 16 bytes per parameter 2 are the parameter's, 2 its gradient's, 12 the optimizer's.
    """

    def timed(own: float) -> tuple[Timing, ...]:
        return (Timing.of(1, [own]),)

    return LayerProfile(
        name=name,
        parameter_bytes=int(2 * parameters),
        buffer_bytes=0,
        gradient_bytes=int(2 * parameters),
        optimizer_bytes=int(12 * parameters),
        optimizer_peak_bytes=0,
        times=(
            LayerTimes(
                threads=1,
                forward=timed(seconds),
                backward=timed(2 * seconds),
                backward_input=timed(seconds),
                backward_weight=timed(seconds),
                recompute=timed(seconds),
                optimizer=Timing.of(1, [0.0]),
            ),
        ),
        sizes=(
            LayerSizes(
                samples=1,
                saved_bytes=int(saved),
                output_bytes=int(output),
                output_saved=True,
                forward_peak_bytes=int(output),
                backward_first_peak_bytes=int(2 * output + 2 * parameters),
                backward_peak_bytes=int(2 * output),
                flop=0,
            ),
        ),
    )


def chain(layers: list[LayerProfile], machine: Cluster, sent: float) -> Profile:
    """Return a model whose layers follow each other, `sent` bytes between any two."""
    return Profile(
        key=ProfileKey(
            model="by hand", source_sha256="0" * 64, device="by hand", dtype="bf16", cores=0, torch="none", python="3"
        ),
        created="by hand",
        model_path="",
        layers=tuple(layers),
        loss=layer("loss", 0.0),
        values=tuple(
            Value(name=f"v{i}", source=i, targets=(i + 1,), bytes_at=((1, int(sent)),), gradient=True)
            for i in range(len(layers) - 1)
        ),
        tied=(),
        whole=(),
        load=(Timing.of(1, []),),
        batch_bytes=((1, 0, 0),),
        batch=1,
        action_s=0.0,
        noise=0.0,
        machine=machine,
    )


def joined(devices: int, *, memory: float, bandwidth: float, speeds: tuple[float, ...] = ()) -> Cluster:
    """Return hosts of one device each on one switch."""
    return Cluster(
        name=f"{devices} devices",
        hosts=tuple(Host(name=f"h{i}", cores=1, memory_bytes=2**40) for i in range(devices)),
        devices=tuple(
            Device(name=f"d{i}", memory_bytes=int(memory), host=f"h{i}", speed=speeds[i] if speeds else 1.0)
            for i in range(devices)
        ),
        switches=("switch",),
        links=tuple(
            Link(between=(f"d{i}", "switch"), latency_s=0.0, bandwidth_bytes_per_s=bandwidth) for i in range(devices)
        ),
    )


@figure("15 layers on 4 devices behind slow links: the longest stage", section="placement", unit="layers", before="8")
def even_cut() -> Found:
    """A message takes longer than 8 of the layers, so every cut has the same bottleneck; the even one has 4, 4, 4, 3.

    The audit's [1, 1, 5, 8] (2951 ms) against [4, 3, 3, 5] (2058 ms) is such a case: of 15 layers in 4 stages, where no
    shipped profile has 15, and a bottleneck that both share can only be a message's.
    """
    machine = joined(4, memory=2**40, bandwidth=1.0)
    costs = chain([layer(f"l{i}", 0.01) for i in range(15)], machine, sent=1.0)
    plan = get("1f1b").spread(Question(costs, machine, 4, 8, 8))
    return Found(max(len(stage.layers) for stage in plan.stages), 4)


BLOCKS, WIDTH, SEQUENCE, HEADS = 128, 25600, 2048, 160
TERA_FLOPS = 8 * 312e12 / 2
"""Eight A100 that split tensors, at half of their peak: one device of the chain below."""


def one_trillion() -> tuple[Profile, Cluster]:
    """Return a GPT of 1T parameters (Narayanan et al., arXiv 2104.04473, table 1) on 64 groups of 8 A100 80 GB.

    A block has 12 h^2 parameters and 24 s h^2 + 4 s^2 h FLOP per sequence and forward (appendix of that paper); it
    keeps s h (34 + 5 a s / h) bytes (Korthikanti et al., arXiv 2205.05198, equation 1). The head has 2 s h V FLOP.
    """
    h, s, words = WIDTH, SEQUENCE, 51200
    block_s = (24 * s * h * h + 4 * s * s * h) / TERA_FLOPS
    sent, saved = 2 * s * h, s * h * (34 + 5 * HEADS * s / h)
    machine = joined(64, memory=8 * 80e9, bandwidth=8 * 25 * GB)
    layers = [
        layer("embedding", 0.0, parameters=words * h, output=sent),
        *(layer(f"block{i}", block_s, parameters=12 * h * h, saved=saved, output=sent) for i in range(BLOCKS)),
        layer("head", 2 * s * h * words / TERA_FLOPS, parameters=words * h, output=2 * s * words),
    ]
    return chain(layers, machine, sent), machine


@figure("GPT of 1T parameters, recompute, 64 stages, M = 512", section="placement", before="265 s against 109 s")
def one_trillion_recomputed() -> Found:
    """Equal stages have two blocks each, whose forward runs twice: 2 x 4 x 26.7 ms = 0.213 s per micro-batch.

    Memory would allow for much less evenness, or none: what is kept of 64 micro-batches in flight does not fit unless
    it is recomputed, so a cut that does not know it will be gives the first stages one block and the last ones many.
    1F1B takes M + 63 times the stage; the head's 4.3 ms forward comes on top of the last stage: M times 3 of them.
    """
    costs, machine = one_trillion()
    plan = get("1f1b").spread(Question(costs, machine, 64, 512, 512, savings=("recompute",)))
    h, s = WIDTH, SEQUENCE
    block = (24 * s * h * h + 4 * s * s * h) / TERA_FLOPS
    head = 2 * s * h * 51200 / TERA_FLOPS
    return Found(evaluate(Placed(costs, plan, machine)).step_s, (512 + 63) * 8 * block + 512 * 3 * head)


@figure("GPT of 1T parameters: blocks of the longest stage", section="placement", unit="blocks", before="7")
def one_trillion_even() -> Found:
    """128 blocks over 64 stages: two each."""
    costs, machine = one_trillion()
    plan = get("1f1b").spread(Question(costs, machine, 64, 512, 512, savings=("recompute",)))
    return Found(max(sum(name.startswith("block") for name in stage.layers) for stage in plan.stages), 2)


@figure("One stage takes the fastest device", section="placement", before="12 s")
def fastest() -> Found:
    """Four layers of a second forward and two backward on speeds 1, 1 and 3: 12 / 3 s; the first device takes 12."""
    machine = joined(3, memory=2**40, bandwidth=1e12, speeds=(1.0, 1.0, 3.0))
    costs = chain([layer(f"l{i}", 1.0) for i in range(4)], machine, sent=1.0)
    plan = get("single").spread(Question(costs, machine, 1, 1, 1))
    return Found(simulate(costs, plan, machine).step_s, 12 / 3)


@figure("A pipeline's longest layer is on its fastest device", section="placement", before="193 s")
def ordered() -> Found:
    """Layers of 1, 8 and 1 s forward on speeds 4, 1, 1: in the order 1, 4, 1 every micro-batch takes 3, 6 and 3 s.

    With eight micro-batches 1F1B's middle stage is the slowest: 8 x 6 s. Before it lies a forward of 1 s, behind it a
    backward of 2 s of the first stage; and once it waits 1 s for the last stage's first backward, whose forward began
    with the middle stage's second: 52 s. In the devices' own order the 8 s are on a slow device: 8 x 24 s and more.
    """
    machine = joined(3, memory=2**40, bandwidth=1e12, speeds=(4.0, 1.0, 1.0))
    costs = chain([layer("a", 1.0), layer("b", 8.0), layer("c", 1.0)], machine, sent=0.0)
    plan = get("1f1b").spread(Question(costs, machine, 3, 8, 8))
    return Found(simulate(costs, plan, machine).step_s, 8 * 6 + 1 + 2 + 1)


def pipedream(model: str, cluster: Cluster) -> tuple[int, ...]:
    """Return PipeDream's replicas of every stage, for 64 samples per device and 16 micro-batches."""
    costs = shipped.read(MODELS[model])
    question = Question(costs, cluster, len(cluster.devices), 16, 64 * len(cluster.devices))
    return tuple(len(stage.devices) for stage in get("pipedream-replicated").spread(question).stages)


@figure("PipeDream's VGG-16 on 4 x 4: replicas of the first stage", section="placement", unit="replicas")
def pipedream_vgg() -> Found:
    """Narayanan et al., SOSP 2019, table 1: VGG-16 on 4 x 4 V100 at 10 Gbit/s is split 15-1.

    The convolutions compute and have few parameters, the large linear layers the other way round; their gradients of
    494 MB would take 0.74 s over a NIC, and one device of 16 is as quick as 15 are with the rest.
    """
    replicas = pipedream("vgg16", FOUR_BY_FOUR)
    assert len(replicas) == 2
    assert sum(replicas) == 16
    return Found(replicas[0], 15)


@figure("PipeDream's ResNet-50 on 4 x 4: replicas", section="placement", unit="replicas")
def pipedream_resnet() -> Found:
    """The same table: data parallel over 16, as its 102 MB of gradients hide behind the computing."""
    replicas = pipedream("resnet50", FOUR_BY_FOUR)
    return Found(replicas[0], 16)


@figure("PipeDream's round robin: M = 16 over 15 replicas", section="placement")
def pipedream_round_robin() -> Found:
    """The plan above without a flush goes on at the pace of its slowest part, 16 times per step of 1,024 samples.

    Stage 0 computes 318 ms per micro-batch of 64, in turns of 15 replicas, which have no common divisor with M. All
    agree on gradients once per turn: the 60 ms over a NIC pass beside the next turn's computing, which the update waits
    for, and nobody waits for the replica that comes last. Behind its forward a replica waits for the 25.7 MB of its
    gradient, 20.6 ms: the last stage gets its messages in bursts of 15, and in the one order of messages those stand
    before what it sends back. The links are nobody else's here: SimPy adds that reductions and messages meet on the
    NICs (0.40 s).
    """
    costs = shipped.read(MODELS["vgg16"])
    plan = get("pipedream-replicated").spread(Question(costs, FOUR_BY_FOUR, 16, 16, 1024))
    start = len(plan.stages[0].layers)
    message = costs.crossing_bytes(start, 64)
    seconds = sum(
        float(x.times[0].forward[0].median_s + x.times[0].backward[0].median_s) / 2 for x in costs.layers[:start]
    )
    alone = evaluate(Placed(costs, plan, FOUR_BY_FOUR)).step_s
    return Found(alone, 16 / 15 * (seconds + message / (10 * GBIT)))


def taking_turns(replicas: tuple[int, ...], seconds: tuple[float, ...], m: int) -> Placed:
    """Return PipeDream's plan of a stage per layer with so many replicas each, on quick links; `seconds` per pass."""
    machine = joined(sum(replicas), memory=2**40, bandwidth=1e15)
    layers = [layer(f"layer{s}", own) for s, own in enumerate(seconds)]
    each_way = [msgspec.structs.replace(own.times[0], backward=own.times[0].forward) for own in layers]
    layers = [msgspec.structs.replace(own, times=(times,)) for own, times in zip(layers, each_way, strict=True)]
    costs = chain(layers, machine, sent=0.0)
    names = iter(device.name for device in machine.devices)
    stages = tuple(
        Stage(layers=(f"layer{s}",), devices=tuple(next(names) for _ in range(r))) for s, r in enumerate(replicas)
    )
    plan = Plan(strategy="own", schedule="pipedream", stages=stages, microbatches=m, batch=m)
    return Placed(costs, plan, machine)


@figure("PipeDream, replicas (1, 3) that take turns: per micro-batch", section="placement", before="2.67 s")
def one_and_three() -> Found:
    """Passes of 1 s on one device, of 3 s on each of three: both stages take 2 s per micro-batch.

    Waited for behind every backward, the reduction would make the three replicas begin together: 2.67 s.
    """
    return Found(simulated_step(taking_turns((1, 3), (1.0, 3.0), 12)) / 12, 2.0)


@figure("PipeDream, replicas (2, 3) that take turns: per micro-batch", section="placement", before="5.33 s")
def two_and_three() -> Found:
    """Passes of 4 s on each of two devices, of 6 s on each of three: both stages take 4 s per micro-batch."""
    return Found(simulated_step(taking_turns((2, 3), (4.0, 6.0), 12)) / 12, 4.0)


@figure("M over the divisors of a share", section="placement", unit="values of M", tolerance=0)
def divisors() -> Found:
    """96 samples per replica have 12 divisors, and of 3 replicas M is 3 times each of them; 288 alone has 18."""
    costs = shipped.read(MODELS["vgg16"])
    cluster = hosts_of(1, 3, nic=10 * GBIT)
    found = [m for m in space(costs, cluster, 288).ms if m % 3 == 0]
    return Found(len(found), 12)
