"""What devices hold from the first action to the last: parameters, versions, buffers, state, gradients that stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planner.costs.placed import Placed
from planner.costs.stage_memory import StageMemory
from planner.orders import schedules
from planner.orders.schedules.straight import in_flight
from planner.values.plan import Plan, asynchronous
from planner.values.trace import KINDS

Floats = npt.NDArray[np.float64]
_INDEX = {kind: number for number, kind in enumerate(KINDS)}


def keeps_gradients(placed: Placed) -> list[bool]:
    """Return of every stage whether its gradients stay: the buckets that are reduced are the gradients; so are shards.

    Elsewhere the first backward allocates them, and the update or the push lets them go.
    """
    served, asynchronous = bool(placed.synchronisation.server), placed.schedule.asynchronous
    return [len(rows) > 1 and not served and not asynchronous for rows in placed.holders]


def _batches(plan: Plan, stage: int) -> int:
    """How many steps' batches a row keeps parts of: the step's, and those before of which a micro-batch is on its way.

    A batch is one block of memory, of which micro-batches are views.
    """
    holders = len(plan.holders[stage])
    ahead = in_flight(stage, plan.turns) - 1 if schedules.get(plan.schedule).asynchronous else 0
    return 1 + -(-ahead * holders // plan.microbatches) if stage == 0 else 1


def static_bytes(placed: Placed, of: Sequence[StageMemory], rows: int) -> Floats:
    """Return the bytes (rows, kinds) that are always there; `of` are the stages', `rows` those of a program."""
    plan, schedule, shards = placed.plan, placed.schedule, placed.synchronisation.shards
    static = np.zeros((rows, len(KINDS)))
    stay, served = keeps_gradients(placed), bool(placed.synchronisation.server)
    for row, held in enumerate(plan.stages_of[:rows]):
        for stage in held:
            own, n = of[stage], len(placed.holders[stage])
            static[row, _INDEX["parameters"]] += own.parameters / (n if "parameters" in shards else 1)
            static[row, _INDEX["versions"]] += (plan.versions(stage) - 1) * own.parameters
            static[row, _INDEX["buffers"]] += own.buffers
            if schedule.trains and not served and not plan.host_optimizer:
                static[row, _INDEX["optimizer"]] += own.optimizer / (n if "optimizer" in shards else 1)
            if asynchronous(plan):  # each step loads its batch
                inputs, targets = placed.profile.drawn_bytes(plan.loaded(stage))
                first, last = stage == 0, stage == len(plan.stages) - 1
                static[row, _INDEX["input"]] += (inputs * first + targets * last) * _batches(plan, stage)
            if stay[stage] and schedule.trains:
                static[row, _INDEX["gradients"]] += own.gradients / (n if "gradients" in shards else 1)
    if placed.synchronisation.server == "devices" and schedule.trains:
        _serve(placed, static)
    return static


def _serve(placed: Placed, static: Floats) -> None:
    """Add what servers keep beside what they compute with: their parts of the parameters and optimizer state.

    One server has all of it (central), of n each one n-th. Of a program of the first replicas only, each row stands for
    those of the others: it has what the fullest of them has.
    """
    servers, layers = set(placed.plan.servers), placed.whole.counted_once().layers
    serving = {row % len(static) for row, group in enumerate(placed.plan.groups) if servers & set(group)}
    for row in serving:
        static[row, _INDEX["parameters"]] += sum(layer.parameter_bytes for layer in layers) / len(servers)
        static[row, _INDEX["optimizer"]] += sum(layer.optimizer_bytes for layer in layers) / len(servers)
