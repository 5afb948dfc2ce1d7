"""What a plan can do to need less memory. The registry is the only list; each is a function from plan to plan."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from planner import schedules, tensor
from planner.errors import PlanError, unknown
from planner.linking import Linked
from planner.lowering import unroll
from planner.memory import MemoryModel
from planner.placement import Question, in_flight, layer_bytes
from planner.plan import Plan
from planner.selection import cheapest
from planner.simulate import capacities
from planner.stage_costs import MEDIAN, layer_table

Saving = Callable[[Question, Plan], Plan]
_REGISTRY: dict[str, Saving] = {}

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("recompute",),
    ("recompute-layers",),
    ("offload",),
    ("host-optimizer",),
    ("recompute", "offload"),
    ("recompute", "host-optimizer"),
    ("offload", "host-optimizer"),
)
"""Which savings a search tries together."""


def saving(name: str) -> Callable[[Saving], Saving]:
    """Register `(question, plan) -> plan` under `name`."""

    def register(function: Saving) -> Saving:
        _REGISTRY[name] = function
        return function

    return register


def names() -> tuple[str, ...]:
    """List the registered savings."""
    return tuple(_REGISTRY)


def apply(q: Question, plan: Plan, wanted: tuple[str, ...]) -> Plan:
    """Return the plan with the savings called `wanted`.

    Raises `PlanError` (exit 2) for an unknown name, or where one of them is not possible or changes nothing.
    """
    for name in wanted:
        if name not in _REGISTRY:
            raise unknown("saving", name, _REGISTRY, where="--saving", fix="choose one of the known savings")
        changed = _REGISTRY[name](q, plan)
        if changed == plan:
            raise PlanError(
                what=f"{name} changes nothing", where=f"plan {plan}", why="it has nothing to save", fix="leave it out"
            )
        plan = changed
    return plan


@saving("recompute")
def recompute(q: Question, plan: Plan) -> Plan:
    """Keep only what stages exchange; repeat a stage's forward before its backward (Chen et al., arXiv 1604.06174)."""
    if not schedules.get(plan.schedule).trains:
        return plan
    return msgspec.structs.replace(plan, recompute=True)


@saving("recompute-layers")
def recompute_layers(q: Question, plan: Plan) -> Plan:
    """Repeat the cheapest layers whose activations make every device fit; nothing where all fit already.

    A layer frees what it saves of each micro-batch in flight. The peak moves as layers are chosen (what is repeated is
    live for a moment), so the choice is made again for what is still missing, a few times.
    """
    profile = tensor.seen(q.profile, plan.groups, q.cluster.take(q.k))
    ranges = plan.layer_ranges([layer.name for layer in profile.layers])
    held = in_flight(plan)
    table = layer_table(profile, q.samples, plan.threads)
    capacity = capacities(plan, q.cluster)
    sizes = layer_bytes(profile, q.samples)
    first = None if plan.uneven else 1  # replicas need alike
    linked = Linked(unroll(plan, replicas=first))
    missing = [0.0] * len(ranges)
    chosen: set[int] = set()
    for _ in range(4):
        trial = msgspec.structs.replace(plan, recompute_layers=tuple(profile.layers[i].name for i in sorted(chosen)))
        peaks = MemoryModel(profile, trial, Linked(unroll(trial, replicas=first)) if chosen else linked).peaks()
        lacks = {row: peak - room for row, (peak, room) in enumerate(zip(peaks, capacity, strict=False)) if peak > room}
        if not lacks:
            return trial
        for row, bytes_ in lacks.items():
            for stage in plan.stages_of[row]:
                missing[stage] = max(missing[stage], missing[stage] + float(bytes_) / len(plan.stages_of[row]))
        chosen = set()
        for stage, layers in enumerate(ranges):
            seconds = [float(table.forward[MEDIAN, i + 1] - table.forward[MEDIAN, i]) for i in layers]
            saved = [held[stage] * (sizes[i].saved - sizes[i].output) for i in layers]
            found = cheapest(seconds, saved, missing[stage]) if missing[stage] > 0 else None
            if missing[stage] > 0 and found is None:
                return plan
            chosen |= {layers.start + i for i in found.layers} if found else set()
    return plan


@saving("offload")
def offload(q: Question, plan: Plan) -> Plan:
    """Swap saved activations to the host and back (Rhu et al., vDNN, arXiv 1602.08124)."""
    return msgspec.structs.replace(plan, offload=True)


@saving("host-optimizer")
def host_optimizer(q: Question, plan: Plan) -> Plan:
    """Keep the optimizer's state on the host and update there (Ren et al., ZeRO-Offload, arXiv 2101.06840)."""
    return msgspec.structs.replace(plan, host_optimizer=True)
