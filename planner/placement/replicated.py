"""PipeDream's partition: where to cut, and how many replicas each stage gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.costs import collectives
from planner.orders import schedules
from planner.placement import partition, savings
from planner.placement.pipeline import bucket, tied
from planner.placement.question import Question
from planner.placement.tables import run_seconds
from planner.values.plan import Plan, Stage

if TYPE_CHECKING:
    from planner.placement.partition import Table


def replicated(q: Question, strategy: str, schedule: str) -> Plan:
    """Cut and choose each stage's replicas as PipeDream does (SOSP 2019): data parallel where that is cheaper.

    A stage of r replicas takes 1 / r of its computing per micro-batch, but not less than its gradients'
    synchronisation, which a step pays once and its micro-batches share.
    """
    import numpy as np

    device = q.devices[0]
    base = run_seconds(q.profile, q.samples, device.threads) / device.speed
    gradients = partition.spans([float(layer.gradient_bytes) for layer in q.profile.layers])
    shares = q.m if schedules.get(schedule).updates != "microbatch" else 1
    names = tuple(d.name for d in q.devices)
    cluster = q.cluster.only(names)

    def seconds(r: int) -> Table:
        if r == 1:
            return base
        per_byte = collectives.all_reduce(cluster, names[:r], 2.0**30) / 2**30
        found: Table = np.maximum(base / r, per_byte * gradients / shares)
        return found

    counts = [r for r in range(1, q.k + 1) if q.m % r == 0 and (q.k <= 16 or r & (r - 1) == 0)]
    found = partition.replicated(seconds, q.k, counts=counts)
    assert found is not None, "one stage is always possible"
    ranges, replicas = found
    layer_names = [layer.name for layer in q.profile.layers]
    stages = []
    first = 0
    for layers, r in zip(ranges, replicas, strict=True):
        stages.append(Stage(layers=tuple(layer_names[i] for i in layers), devices=names[first : first + r]))
        first += r
    if len(set(replicas)) == 1 and replicas[0] > 1 and len(ranges) > 1:
        stages = [
            Stage(layers=s.layers, devices=tuple(names[j * len(ranges) + i] for j in range(replicas[0])))
            for i, s in enumerate(stages)
        ]
    plan = Plan(
        strategy=strategy,
        schedule=schedule,
        stages=tuple(stages),
        microbatches=q.m,
        batch=q.batch,
        bucket_bytes=bucket(q),
        tied=tied(q.profile, ranges),
        threads=device.threads,
    )
    return savings.apply(q, plan, q.savings)
