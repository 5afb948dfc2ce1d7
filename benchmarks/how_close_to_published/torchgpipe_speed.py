"""torchgpipe (Kim et al., arXiv 2004.09910): throughput of AmoebaNet-D(18, 256) on 2, 4 and 8 P40s.

Batch sizes, micro-batches, cuts and checkpointing are those of its benchmark (`data/torchgpipe_configs.csv`). Layers
are counted and priced for a P40 (`amoebanet`, `profiles.estimate`). One scale is fitted to all nine rows, so that the
largest error is as small as can be: the efficiencies are those of an A100, which nobody measured on a P40.

What torchgpipe does and a plan cannot say is done to the program: one micro-batch is not checkpointed (`except_last`),
the one whose backward comes first; and a stage recomputes while it waits for the gradient, not behind it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import amoebanet
import by_hand
import numpy as np
import torch
from by_hand import Figure, Result, Table

from planner.costs.placed import Placed
from planner.costs.priced import costs_of
from planner.orders import codes, operations
from planner.programs.lowering import lower
from planner.programs.program import Program
from planner.programs.waits import Linked
from planner.simulate.longest_path import walk
from planner.values.cluster import Cluster
from planner.values.profile import Profile
from profiles import hardware
from profiles.estimate import profile_of


class Row(NamedTuple):
    """One experiment."""

    devices: int
    microbatches: int
    batch: int
    balance: tuple[int, ...]
    checkpoint: str
    throughput: float

    @property
    def samples(self) -> int:
        return self.batch // self.microbatches


def rows() -> list[Row]:
    """Read the published tables."""
    configs = {
        (int(r["n"]), int(r["chunks"])): r
        for r in by_hand.read("torchgpipe_configs.csv")
        if r["benchmark"] == "AmoebaNet-D(18,256) speed"
    }
    found = []
    for r in by_hand.read("torchgpipe_speed_amoebanet.csv"):
        n, m = int(r["n_partitions_or_gpus"]), int(r["m_microbatches"])
        own = configs[n, m]
        balance = tuple(map(int, own["balance"].split()))
        speed = float(r["throughput_samples_per_s"])
        found.append(Row(n, m, int(own["batch_size"]), balance, own["checkpoint"], speed))
    return found


@cache
def estimated(samples: int) -> Profile:
    """The network on a P40, in float32, at one micro-batch size."""
    return profile_of(
        amoebanet.amoebanet(18, 256),
        amoebanet.batch(),
        hardware="p40",
        dtype=None,
        sizes=[samples],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )


def throughput(row: Row) -> float:
    """Samples per second, before the scale."""
    profile = estimated(row.samples)
    _, p40 = hardware.get("p40")
    cluster: Cluster = p40.cluster("p40").take(row.devices)
    args = ("gpipe", profile.layers, row.balance, cluster, row.microbatches, row.samples)
    plan = by_hand.plan(*args, recompute=True)
    order = lower(plan).order
    if row.checkpoint == "except_last":
        order = tuple(r[~(codes.has(r, operations.RECOMPUTE) & (codes.microbatches(r) == 0))] for r in order)
    program = Program(order)
    linked = Linked(program)
    linked.waits = np.where(codes.has(linked.flat, operations.RECOMPUTE), -1, linked.waits)
    return row.batch / walk(costs_of(Placed(profile, plan, cluster), linked)).step_s


def run(*, quick: bool = False) -> Result:
    """All nine rows, or (`quick`) those of two devices."""
    chosen = [r for r in rows() if not quick or r.devices == 2]
    ours = [throughput(row) for row in chosen]
    ratios = [r.throughput / o for r, o in zip(chosen, ours, strict=True)]
    scale = 2 / (1 / min(ratios) + 1 / max(ratios))
    errors = [scale * o / r.throughput - 1 for r, o in zip(chosen, ours, strict=True)]
    table = Table(
        f"D. AmoebaNet-D(18, 256) on P40s, samples per second (torchgpipe); ours times {scale:.3f}",
        ("n", "m", "batch", "published", "ours", "error"),
    )
    for row, o, error in zip(chosen, ours, errors, strict=True):
        cells = f"{row.throughput:.1f}", f"{scale * o:.1f}", f"{error:+.1%}"
        table.rows.append((row.devices, row.microbatches, row.batch, *cells))
    wrong = by_hand.disorder([r.throughput for r in chosen], ours, [(r.devices, r.microbatches) for r in chosen])
    return Result(
        [table],
        [
            Figure("torchgpipe: pairs in a row or a column in another order", wrong, 0, "pairs"),
            Figure("torchgpipe: largest error after one scale", 100 * max(map(abs, errors)), 15.0),
            Figure("torchgpipe: mean error after one scale", by_hand.mean_percent(errors), float("inf")),
        ],
    )
