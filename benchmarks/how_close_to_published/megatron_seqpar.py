"""Sequence parallelism and selective recomputation (Korthikanti et al., arXiv 2205.05198): iteration times of table 5.

Nothing here was measured, and no number is fitted to this table. What one of eight tensor-parallel devices computes
is counted operation by operation on the shapes it has (`megatron_gpt.sharded`) and priced with `profiles.hardware`; so
small matrices reach less of the peak and every kernel is launched, whatever is left in it. Attention is unfused: scores
are written and read by softmax and dropout. Collectives take what nccl-tests measured on eight A100 of one host.
"""

from __future__ import annotations

from typing import NamedTuple

import by_hand
import megatron_gpt
import msgspec
from by_hand import GIB, Figure, Result, Table, layer
from torch import nn
from zero_bubble import OPTIMIZER_TRAFFIC, SLOWDOWN

from executor.model_file import ModelFile
from executor.user_code import default_loss, default_optimizer
from planner.values.cluster import Cluster, Device, Host, Link, by_size
from planner.values.profile import LayerProfile
from profiles import hardware
from profiles.estimate import Work, count

INFINIBAND_BYTES_PER_S = 25e9
"""One HDR port (200 Gbit/s) per GPU, as in Selene's DGX A100 (NVIDIA DGX SuperPOD reference architecture)."""
LOSS_BYTES = 22
"""Bytes moved per logit by Megatron's loss: read in fp16 and written in fp32; largest, difference, exponentials and
their sum; and the gradient, read in fp32 and written in fp16."""

EFFICIENCY = msgspec.structs.replace(hardware.table().efficiency, random=hardware.table().efficiency.memory)
"""Dropout moves bytes as quickly as other kernels. The table's slower `random` was fitted to Zero Bubble's forwards, of
another year's Megatron, and takes in whatever else these have; here it would make a forward longer by a quarter."""

Seconds = tuple[float, float, float]


class Row(NamedTuple):
    """One row of the table."""

    model: str
    hidden: int
    heads: int
    layers: int
    seq: int
    mode: str
    tensor: int
    depth: int
    batch: int
    samples: int
    chunks: int
    seconds: float

    @property
    def microbatches(self) -> int:
        return self.batch // self.samples


def rows() -> list[Row]:
    """Read the published table."""
    return [
        Row(
            r["model"],
            *(int(r[k]) for k in ("hidden", "heads", "layers", "seq")),
            r["mode"],
            *(int(r[k]) for k in ("tp", "pp", "global_batch", "microbatch", "pipeline_interleaving")),
            float(r["measured_iteration_s"]),
        )
        for r in by_hand.read("megatron_seqpar_iteration_time.csv")
    ]


def work_of(model: nn.Sequential, row: Row) -> list[Work]:
    """Count a model's operations, layer by layer, the loss last."""
    file = ModelFile(
        path="megatron_gpt",
        model=lambda: model,
        batch=megatron_gpt.batch(row.seq),
        loss=default_loss,
        optimizer=default_optimizer,
        layers=None,
        batch_size=row.samples,
    )
    return count(file, [row.samples], "bf16").work[row.samples]


def priced(work: Work) -> Seconds:
    """Seconds of forward, backward-input and backward-weight; weights' gradients add up inside their products."""
    _, a100 = hardware.get("a100-80")
    forward, both = a100.total_seconds(work.forward, EFFICIENCY), a100.total_seconds(work.first_backward, EFFICIENCY)
    inputs = min(both, a100.total_seconds(work.backward_input, EFFICIENCY))
    return forward, inputs, both - inputs


def collective_s(row: Row) -> float:
    """Seconds of an all-reduce of a block's output between the eight devices, or of its two halves."""
    points = tuple(
        (int(r["bytes"]), float(r["time_ns_in_place"]) / 1e9) for r in by_hand.read("nccl_all_reduce_a100_8.csv")
    )
    return by_size(points, 2 * row.samples * row.seq * row.hidden)


def layers_of(row: Row) -> tuple[list[LayerProfile], tuple[str, ...]]:
    """The layers as one device sees them, and those that are recomputed.

    A block has two all-reduces forward and two backward (arXiv 1909.08053). Sequence parallelism makes each of them a
    reduce-scatter and an all-gather of the same bytes, and gathers two inputs again in the backward (arXiv 2205.05198,
    section 4.2.2), which overlaps computing. Full recomputation repeats the whole forward with its collectives,
    selective recomputation the attention core.
    """
    parallel = row.mode == "seqsel"
    model = megatron_gpt.sharded(row.hidden, row.heads, row.tensor, row.seq, sequence_parallel=parallel)
    embedding, block, head, _ = work_of(model, row)
    _, a100 = hardware.get("a100-80")
    traffic = a100.memory_bytes_per_s * hardware.table().efficiency.memory.at(1e9)
    twice = 2 * collective_s(row)
    f, b, w = priced(block)
    h, n = row.hidden, row.samples
    size = 2.0 * row.samples * row.seq * row.hidden

    def made(name: str, seconds: Seconds, parameters: float, recompute: float | None = None) -> LayerProfile:
        update = parameters / row.tensor * OPTIMIZER_TRAFFIC / traffic
        return layer(name, n, seconds, optimizer_s=update, output=size, recompute=recompute)

    logits = row.samples * row.seq * megatron_gpt.VOCABULARY / row.tensor
    loss = logits * LOSS_BYTES / traffic
    hf, hb, hw = priced(head)
    first = made("embedding", priced(embedding), megatron_gpt.VOCABULARY * h)
    last = made("head", (hf + loss / 2, hb + loss / 2 + twice / 2, hw), megatron_gpt.VOCABULARY * h)
    parameters = 12.0 * h * h
    if not parallel:
        blocks = [made(f"block{i}", (f + twice, b + twice, w), parameters) for i in range(row.layers)]
        return [first, *blocks, last], tuple(own.name for own in blocks)
    core = megatron_gpt.core(h, row.heads, row.tensor, row.seq)
    cf, cb, cw = priced(work_of(core, row)[2])
    pairs = [
        own
        for i in range(row.layers)
        for own in (
            made(f"core{i}", (cf, cb, cw), 0.0),
            made(f"block{i}", (f - cf + twice, b - cb + twice, w - cw), parameters),
        )
    ]
    return [first, *pairs, last], tuple(f"core{i}" for i in range(row.layers))


def cluster_of(row: Row) -> Cluster:
    """One device per tensor-parallel group; a message passes InfiniBand in eight parts, one from each of its devices.

    Without sequence parallelism the parts are gathered again over NVLink (arXiv 2104.04473, section 4.1). A message
    keeps both its ends from computing, and passes take `SLOWDOWN` times as long, as in Zero Bubble's measurements.
    """
    size = 2 * row.samples * row.seq * row.hidden
    seconds = size / row.tensor / (hardware.LINK_EFFICIENCY * INFINIBAND_BYTES_PER_S)
    if row.mode == "full":
        seconds += collective_s(row) / 2
    return Cluster(
        name="selene",
        hosts=(Host(name="h", cores=1, memory_bytes=1),),
        devices=tuple(
            Device(name=f"d{i}", memory_bytes=80 * GIB, host="h", speed=1 / SLOWDOWN) for i in range(row.depth)
        ),
        links=(Link(between=("h", "h"), latency_s=0.0, bandwidth_bytes_per_s=size / seconds, shared=False),),
        posts=((1, seconds),),
        buffered=True,
    )


def iteration_s(row: Row) -> float:
    """Seconds of one iteration."""
    layers, recomputed = layers_of(row)
    cluster = cluster_of(row)
    stages = row.depth * row.chunks
    per_stage = (len(layers) - 2) // stages
    balance = [per_stage + (s == 0) + (s == stages - 1) for s in range(stages)]
    schedule = "interleaved" if row.chunks > 1 else "1f1b"
    plan = by_hand.plan(
        *(schedule, layers, balance, cluster, row.microbatches, row.samples),
        chunks=row.chunks,
        recompute_layers=recomputed,
    )
    return by_hand.makespan(by_hand.profile(layers, row.samples, cluster), plan, cluster)


def run(*, quick: bool = False) -> Result:
    """All rows, or (`quick`) those of the smallest model."""
    table = Table("B. Iteration time, s (arXiv 2205.05198, table 5)", ("model", "mode", "published", "ours", "error"))
    errors = []
    for row in rows()[: 2 if quick else None]:
        ours = iteration_s(row)
        errors.append(ours / row.seconds - 1)
        table.rows.append((row.model, row.mode, f"{row.seconds:g}", f"{ours:.2f}", f"{errors[-1]:+.1%}"))
    return Result([table], [Figure("iteration time: mean error", by_hand.mean_percent(errors), 5.0)])
