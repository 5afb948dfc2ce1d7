"""What plans keep in their hosts' memory: swapped activations, an optimizer's state, parameters that a host serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.costs.placed import Placed
from planner.costs.stage_memory import StageMemory
from planner.orders import codes
from planner.orders.operations import BACKWARD, BACKWARD_INPUT, FETCH, OFFLOAD
from planner.programs.waits import Linked

Floats = npt.NDArray[np.float64]


def by_row(placed: Placed, linked: Linked, of: Sequence[StageMemory]) -> Floats:
    """Return the most bytes that each row of a program keeps on its host at once.

    Activations are there from the copy's begin until the backward that they were fetched for. With a host's optimizer
    its state stays there, with the parameters and the gradients that it reads and writes (ZeRO-Offload, arXiv
    2101.06840, section 4.1).
    """
    found = np.zeros(linked.devices)
    kept = np.array([stage.kept for stage in of])
    shards = placed.synchronisation.shards
    for row, held in enumerate(placed.plan.stages_of[: linked.devices]):
        if placed.plan.host_optimizer:
            for stage in held:
                own, n = of[stage], len(placed.holders[stage]) if "optimizer" in shards else 1
                found[row] += (own.parameters + own.gradients + own.optimizer) / n
        if placed.plan.offload:
            actions = linked.flat[linked.offsets[row] : linked.offsets[row + 1]]
            found[row] += _swapped(actions, kept)
    return found


def _swapped(row: codes.Codes, kept: Floats) -> float:
    """Return the most bytes of activations that a row has away from its device."""
    fetched = row[codes.has(row, FETCH)]
    back = codes.has(row, BACKWARD, BACKWARD_INPUT) & np.isin(codes.with_op(row, FETCH), fetched)
    size = kept[codes.stages(row)]
    change = np.where(codes.has(row, OFFLOAD), size, 0.0) - np.where(back, size, 0.0)
    return float(np.cumsum(change).max(initial=0.0))


def by_host(placed: Placed, rows: Floats) -> dict[str, float]:
    """Return the most bytes that the plan keeps on each host: its rows', and the parameters that the host serves.

    `rows` are those of `by_row`, for each of the devices that split a row's tensors; of a program of the first replicas
    only, each row stands for those of the others.
    A host that serves parameters has them and the optimizer's state once (TensorFlow's CentralStorageStrategy).
    """
    found = {host.name: 0.0 for host in placed.cluster.hosts}
    for row, members in enumerate(placed.members if len(rows) else ()):
        for device in members:
            found[device.host] += float(rows[row % len(rows)])
    if placed.synchronisation.server == "host":
        layers = placed.whole.counted_once().layers
        served = float(sum(layer.parameter_bytes + layer.optimizer_bytes for layer in layers))
        for name in placed.plan.servers:
            found[name] = found.get(name, 0.0) + served / len(placed.plan.servers)
    return found
