"""Whether this machine's memory holds what a run brings into it, whatever the plan: the model, and a step's batch."""

from __future__ import annotations

from collections.abc import Iterable

from planner.basis.errors import DEVICE, PlanError
from planner.basis.units import size
from planner.values.cluster import Cluster
from planner.values.profile import Profile


def check_hosts(profile: Profile, cluster: Cluster, batches: Iterable[int]) -> None:
    """Raise `PlanError` (exit 5) where the machine that was profiled cannot hold the model, or a batch of such a size.

    Of other hardware nobody says how its hosts come by either.
    """
    if profile.estimated or cluster.hosts != profile.machine.hosts or not cluster.hosts:
        return
    memory = sum(host.memory_bytes for host in cluster.hosts)
    layers = profile.counted_once().layers
    needed = sum(layer.parameter_bytes + layer.buffer_bytes for layer in layers)
    if needed > memory:
        raise PlanError(
            what="the model is too large for this host's memory",
            where=profile.model_path or profile.key.model,
            why=f"its parameters and buffers take {size(needed)}, and the host has {size(memory)}: a run's first rank "
            "makes the initial weights there",
            fix="simulate other hardware (--cluster), or let model() make it in a smaller dtype",
            code=DEVICE,
        )
    for batch in batches:
        taken = sum(profile.drawn_bytes(batch))
        if taken > memory:
            raise PlanError(
                what="a step's batch is too large for this host's memory",
                where=f"a batch of {batch:,} samples",
                why=f"its inputs and targets alone take {size(taken)}, and the host has {size(memory)}",
                fix=f"--batch {fitting(memory * batch / taken)}",
                code=DEVICE,
            )


def fitting(samples: float) -> int:
    """Return a batch that fits where so many samples fill everything: a power of two, and at most a quarter.

    >>> fitting(1000.0), fitting(0.5)
    (128, 1)
    """
    return 1 << max(0, int(samples / 4).bit_length() - 1)
