"""Zero Bubble (Qi et al., arXiv 2401.10241): bubble rates, throughput and memory from the times that they profiled.

**Bubble rates.** Their simulator's: `(cost - m (F + B + W)) / cost`, where the cost is the *span*, the longest time
from a device's first action to its last. A message takes Tcomm, occupies nobody, and starts when it is sent, whether or
not its receive has been posted: a cluster whose messages are `buffered`. Under our default, rendezvous with receives
posted one compute ahead, 1F1B's rates are up to 0.0011 larger, and the interleaved ones up to 0.037.

**ZB-2p** is `greedy` with what their section 3 assumes and the registered zb-greedy-2p does not: the span counts, not
the makespan, and behind I an activation shrinks to what W needs, so that more W can wait in the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import by_hand
import msgspec
import numpy as np
from by_hand import GIB, Figure, Result, Table, layer

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.orders import operations, schedules
from planner.orders.codes import Order
from planner.orders.schedules import Shape
from planner.orders.schedules.greedy import Rules, greedy
from planner.programs.lowering import lower
from planner.programs.waits import Linked
from planner.values.cluster import Cluster, Device, Host, Link
from planner.values.plan import Plan
from planner.values.profile import LayerProfile, Profile, Value
from planner.values.trace import KINDS
from profiles import hardware

VOCABULARY = 51200
"""Words, padded as Megatron does (50257 of GPT-2's, to a multiple of 1024 here): the embedding's rows."""
SEQ = 1024

PARAMETER_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 4, 12
"""Bytes per parameter of Megatron's mixed precision: fp16 weights; fp32 main gradients, into which the weights'
products add; an fp32 copy and Adam's two moments in fp32. 18 together."""
LINEAR_BYTES, ATTENTION_BYTES = 34, 5
"""A block keeps 34 s b h bytes, and 5 a s^2 b in its attention core (Korthikanti et al., arXiv 2205.05198, section
4.1): no flash attention, no recomputation."""
WEIGHT_BYTES = 32
"""Of these, W needs 32 s b h: the linear layers' inputs and the gradients of their outputs (arXiv 2401.10241)."""
TRANSIENT_SCORES = 4
"""Bytes per attention score that a backward has in between: its gradient before and behind the softmax, in fp16."""
LOGIT_BYTES = 10
"""Bytes per logit on the last stage while its loss is computed: fp16, the fp32 copy, and its fp32 gradient."""

OPTIMIZER_TRAFFIC = 38
"""Bytes per parameter that an update moves: the gradient's norm reads 4; Adam reads gradient, copy and two moments (16)
and writes copy and moments (12); fp16 weights are written (2); the gradients are set to zero (4)."""
SLOWDOWN = 1.035
"""How much longer a pass takes in a measured iteration than when it was profiled. Fitted once, to all 48 rows: what no
profile of single passes has, the host's time between passes and that every device waits for the slowest of all."""

NAMES = {
    "1F1B": "1f1b",
    "1F1B-I": "interleaved",
    "ZB-1p": "zb-greedy",
    "ZB-H1": "zb-h1",
    "ZB-H2": "zb-h2",
}


@dataclass(frozen=True)
class Row:
    """One row of the published tables, in seconds and bytes."""

    model: str
    layers: int
    heads: int
    hidden: int
    stages: int
    samples: int
    microbatches: int
    schedule: str
    seconds: tuple[float, float, float]
    message_s: float
    bubble: float
    throughput: float | None
    memory: float | None

    @property
    def chunks(self) -> int:
        """Stages per device: one block per chunk when interleaved."""
        return (self.layers + 2) // self.stages if self.schedule == "1F1B-I" else 1

    @property
    def weight_share(self) -> float:
        """What W needs of an activation."""
        return WEIGHT_BYTES * self.hidden / (LINEAR_BYTES * self.hidden + ATTENTION_BYTES * self.heads * SEQ)


def rows() -> list[Row]:
    """Read the published table."""
    return [
        Row(
            model=r["model"],
            layers=int(r["layers"]),
            heads=int(r["heads"]),
            hidden=int(r["hidden"]),
            stages=int(r["p_stages"]),
            samples=int(r["microbatch_size"]),
            microbatches=int(r["m_microbatches"]),
            schedule=r["schedule"],
            seconds=(float(r["TF_ms"]) / 1e3, float(r["TB_ms"]) / 1e3, float(r["TW_ms"]) / 1e3),
            message_s=float(r["Tcomm_ms"]) / 1e3,
            bubble=float(r["theoretical_bubble_rate"]),
            throughput=float(r["measured_samples_per_gpu_per_s"]) if r["measured_samples_per_gpu_per_s"] else None,
            memory=float(r["measured_peak_mem_GB"]) if r["measured_peak_mem_GB"] else None,
        )
        for r in by_hand.read("zero_bubble_main.csv")
    ]


def schedule_of(row: Row) -> str:
    """Return the registered schedule of a row; ZB-2p depends on what W needs of an activation."""
    if row.schedule != "ZB-2p":
        return NAMES[row.schedule]
    share = row.weight_share
    name = f"zb-2p-{share:.3f}"
    if name not in schedules.names():

        @schedules.schedule(name, splits=True, limit=lambda shape: 2 * shape.devices)
        def arranged(shape: Shape) -> Order:
            """As many forwards ahead as 2p activations allow, W where nothing else can be done."""
            seconds, homes = np.array(shape.seconds), np.arange(shape.devices)
            rules = Rules(ahead=2.0, gap=0.0, forward_first=True)
            return greedy(shape, seconds, homes, 2 * shape.devices, rules, share=share)[0]

    return name


def layers_of(row: Row) -> list[LayerProfile]:
    """Embedding, blocks, head: each as long as a block, so that every stage takes the published times.

    The published times are one number for all stages; the first and the last have one block fewer for that reason.
    """
    per_stage = (row.layers + 2) // row.stages
    f, b, w = (each / per_stage for each in row.seconds)
    tokens, h = SEQ * row.samples, row.hidden
    scores = row.samples * row.heads * SEQ * SEQ
    _, a100 = hardware.get("a100-80")
    traffic = a100.memory_bytes_per_s * hardware.table().efficiency.memory.at(1e9)

    def made(name: str, parameters: float, saved: float, transient: float) -> LayerProfile:
        sizes = tuple(each * parameters for each in (PARAMETER_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES))
        return layer(
            name,
            row.samples,
            (f, b, w),
            optimizer_s=parameters * OPTIMIZER_TRAFFIC / traffic,
            parameters=(sizes[0], sizes[1], sizes[2]),
            saved=saved,
            output=2 * tokens * h,
            transient=transient,
        )

    kept = LINEAR_BYTES * tokens * h + ATTENTION_BYTES * scores
    return [
        made("embedding", (VOCABULARY + SEQ) * h, tokens * h, 0.0),
        *(made(f"block{i}", 12 * h * h + 13 * h, kept, TRANSIENT_SCORES * scores) for i in range(row.layers)),
        made("head", VOCABULARY * h, 4 * tokens * h, LOGIT_BYTES * tokens * VOCABULARY),
    ]


def cluster_of(row: Row, *, measured: bool = False) -> Cluster:
    """GPUs that talk in Tcomm, as the authors' simulator has it; `measured`: as a run of Megatron-LM does.

    Megatron posts sends and receives in batches and waits for them before it goes on (`batch_isend_irecv`), so every
    message keeps both ends from computing for as long as it takes, and a pass takes `SLOWDOWN` times as long.
    """
    size = 2 * SEQ * row.samples * row.hidden
    return Cluster(
        name="A100",
        hosts=(Host(name="h", cores=1, memory_bytes=1),),
        devices=tuple(
            Device(name=f"d{i}", memory_bytes=80 * GIB, host="h", speed=1 / SLOWDOWN if measured else 1.0)
            for i in range(row.stages)
        ),
        links=(Link(between=("h", "h"), latency_s=0.0, bandwidth_bytes_per_s=size / row.message_s, shared=False),),
        posts=((1, row.message_s),) if measured else (),
        buffered=True,
    )


def planned(row: Row, cluster: Cluster, schedule: str | None = None) -> tuple[Profile, Plan]:
    """A row's profile and plan."""
    layers = layers_of(row)
    per_stage = (row.layers + 2) // (row.stages * row.chunks)
    stages = row.stages * row.chunks
    f, b, w = (each / row.chunks for each in row.seconds)
    plan = by_hand.plan(
        schedule or schedule_of(row),
        layers,
        [per_stage] * stages,
        cluster,
        row.microbatches,
        row.samples,
        chunks=row.chunks,
        stage_seconds=((f, b, w),) * stages,
    )
    profile = by_hand.profile(layers, row.samples, cluster)
    # Megatron's layers halve their own backwards, in the first stage too: as if the input had a gradient.
    given = Value(name="input", source=-1, targets=(0,), bytes_at=((row.samples, 0),), gradient=True)
    return msgspec.structs.replace(profile, values=(given, *profile.values)), plan


def bubble_rate(row: Row, schedule: str | None = None) -> float:
    """Ours, by the authors' definition. The optimizer is no part of it."""
    cluster = cluster_of(row)
    profile, plan = planned(row, cluster, schedule)
    span = by_hand.span(by_hand.priced(profile, plan, cluster), operations.COMPUTES)
    return 1 - row.microbatches * sum(row.seconds) / span


def throughput(row: Row) -> float:
    """Samples per GPU and second of an iteration with everything in it.

    Iterations follow each other without a barrier, so the device that is busy for longest sets the pace: the span.
    """
    cluster = cluster_of(row, measured=True)
    profile, plan = planned(row, cluster)
    span = by_hand.span(by_hand.priced(profile, plan, cluster), (*operations.COMPUTES, operations.OPTIMIZER))
    return row.samples * row.microbatches / row.stages / span


def peak(row: Row) -> float:
    """Bytes at the fullest device. I frees what W does not need, which our memory model keeps until W."""
    cluster = cluster_of(row)
    profile, plan = planned(row, cluster)
    linked = Linked(lower(plan))
    model = MemoryModel(Placed(profile, plan, cluster), linked)
    activations = KINDS.index("activations")
    for stage in range(len(plan.stages)):
        i, w = (
            stage * len(operations.OPS) + operations.NUMBER[op]
            for op in (operations.BACKWARD_INPUT, operations.BACKWARD_WEIGHT)
        )
        freed = (1 - row.weight_share) * -model.change[w, activations]
        model.change[i, activations] -= freed
        model.change[w, activations] += freed
    return float(model.peaks().max())


def run(*, quick: bool = False) -> Result:
    """All rows, or (`quick`) those of the two small models with the fewest micro-batches."""
    chosen = [r for r in rows() if not quick or (r.stages == 8 and r.microbatches == 24)]
    rates = Table("A. Bubble rates (arXiv 2401.10241, table 5)", ("model", "m", "schedule", "published", "ours", "off"))
    speeds = Table(
        "A. Samples per GPU per second (table 4)", ("model", "m", "schedule", "published", "ours", "error", "authors")
    )
    memories = Table("A. Peak memory, GiB (table 4)", ("model", "m", "schedule", "published", "ours", "error"))
    off: dict[str, list[float]] = {}
    wrong: dict[str, list[float]] = {}
    theirs: list[float] = []
    memory: list[float] = []
    for row in chosen:
        key = row.model, row.microbatches, row.schedule
        rate = bubble_rate(row)
        off.setdefault(row.schedule, []).append(abs(round(rate, 4) - row.bubble))
        rates.rows.append((*key, f"{row.bubble:.4f}", f"{rate:.4f}", f"{round(rate, 4) - row.bubble:+.4f}"))
        if row.throughput is not None:
            ours = throughput(row)
            authors = row.samples / row.stages / (sum(row.seconds) / (1 - row.bubble))
            wrong.setdefault(row.schedule, []).append(ours / row.throughput - 1)
            theirs.append(authors / row.throughput - 1)
            cells = f"{row.throughput:g}", f"{ours:.3g}", f"{wrong[row.schedule][-1]:+.1%}", f"{theirs[-1]:+.1%}"
            speeds.rows.append((*key, *cells))
        if row.memory is not None:
            bytes_ = peak(row) / GIB
            memory.append(bytes_ / row.memory - 1)
            memories.rows.append((*key, f"{row.memory:g}", f"{bytes_:.1f}", f"{memory[-1]:+.1%}"))
    figures = [Figure("1F1B bubble rates: largest difference after rounding", max(off["1F1B"]), 0.00001, "")]
    figures += [
        Figure(f"{name} bubble rates: largest difference", max(values), 0.01, "")
        for name, values in off.items()
        if name != "1F1B"
    ]
    figures.append(Figure("throughput: mean error", by_hand.mean_percent([e for v in wrong.values() for e in v]), 4.0))
    figures += [
        Figure(f"throughput: mean error of {name}", by_hand.mean_percent(v), float("inf")) for name, v in wrong.items()
    ]
    figures.append(
        Figure("throughput: mean error of the authors' own model", by_hand.mean_percent(theirs), float("inf"))
    )
    figures.append(Figure("peak memory: largest error", 100 * max(map(abs, memory)), 10.0))
    figures.append(Figure("peak memory: mean error", by_hand.mean_percent(memory), float("inf")))
    return Result([rates, speeds, memories], figures)
