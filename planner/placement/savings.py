"""What a plan can do to need less memory. The registry is the only list; each is a function from plan to plan.

Savings change what a stage costs and holds, so they are chosen before the model is cut (`planner.placement.pipeline`).
Those that depend on the cut are applied behind it, and the cut reckons with them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import msgspec

from planner.basis.errors import PlanError, unknown
from planner.basis.units import size
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, layer_table
from planner.orders import schedules, synchronisation
from planner.placement.filling import layer_bytes
from planner.placement.flight import flight
from planner.placement.freeing import worth_a_checkpoint
from planner.placement.question import Question
from planner.placement.repeating import lacks, least_repeated
from planner.placement.selection import cheapest
from planner.programs.lowering import swaps, unroll
from planner.programs.waits import Linked
from planner.values.plan import Plan
from planner.values.profile import Profile

Change = Callable[[Question, Plan], Plan]
Repeated = Callable[[Profile, int], Sequence[range]]
"""From a profile and the samples of a micro-batch to the runs of layers that may be repeated."""


class Saving(NamedTuple):
    """A registered saving. `behind_cut` ones choose layers of the stages that there are; others need no layers.

    `states_on_host` tells that no device keeps optimizer state, `repeats` whether forwards are done again and of which
    layers at most, `swaps` that activations go to the host and back.
    """

    name: str
    change: Change
    behind_cut: bool
    states_on_host: bool
    repeats: Repeated | None
    swaps: bool


_REGISTRY: dict[str, Saving] = {}

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    (),
    ("recompute",),
    ("recompute-blocks",),
    ("recompute-layers",),
    ("offload",),
    ("host-optimizer",),
    ("recompute", "offload"),
    ("recompute", "host-optimizer"),
    ("recompute-blocks", "host-optimizer"),
    ("offload", "host-optimizer"),
)
"""Which savings a search tries together."""


def saving(
    name: str,
    *,
    behind_cut: bool = False,
    states_on_host: bool = False,
    repeats: Repeated | None = None,
    swaps: bool = False,
) -> Callable[[Change], Change]:
    """Register `(question, plan) -> plan` under `name`; see `Saving` for the rest."""

    def register(function: Change) -> Change:
        _REGISTRY[name] = Saving(name, function, behind_cut, states_on_host, repeats, swaps)
        return function

    return register


def names() -> tuple[str, ...]:
    """List the registered savings."""
    return tuple(_REGISTRY)


def states_on_host(wanted: tuple[str, ...]) -> bool:
    """Whether one of these savings moves the optimizer's state off the devices."""
    return any(get(name).states_on_host for name in wanted)


def repeated(wanted: tuple[str, ...], profile: Profile, samples: int) -> list[range]:
    """Return the runs of layers whose forwards these savings may repeat."""
    return [run for name in wanted if (runs := get(name).repeats) is not None for run in runs(profile, samples)]


def keeps(wanted: tuple[str, ...]) -> bool:
    """Whether what layers save stays on the device, but for layers that are chosen behind the cut."""
    return not any(one.swaps or (one.repeats and not one.behind_cut) for one in map(get, wanted))


def behind_cut(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of these savings that choose layers once the cut is known."""
    return tuple(name for name in wanted if get(name).behind_cut)


def get(name: str) -> Saving:
    """Return a saving. Raises `PlanError` with the nearest name for an unknown one."""
    if name not in _REGISTRY:
        raise unknown("saving", name, _REGISTRY, where="--saving", fix="choose one of the known savings")
    return _REGISTRY[name]


def apply(q: Question, plan: Plan, wanted: tuple[str, ...]) -> Plan:
    """Return the plan with the savings called `wanted`, cut where it is.

    Raises `PlanError` (exit 2) for an unknown name, or where one of them is not possible or changes nothing.
    """
    for chosen in map(get, wanted):
        changed = chosen.change(q, plan)
        if changed == plan:
            raise PlanError(
                what=f"{chosen.name} changes nothing",
                where=f"plan {plan}",
                why="it has nothing to save",
                fix="leave it out",
            )
        plan = changed
    return plan


def without(plan: Plan) -> Plan:
    """Return the plan without savings, cut where it is."""
    return msgspec.structs.replace(plan.without_recompute(), offload=False, host_optimizer=False)


def _every_layer(profile: Profile, samples: int) -> Sequence[range]:
    return [range(len(profile.layers))]


@saving("recompute", repeats=_every_layer)
def recompute(q: Question, plan: Plan) -> Plan:
    """Keep only what stages exchange; repeat a stage's forward before its backward (Chen et al., arXiv 1604.06174)."""
    if not schedules.get(plan.schedule).trains:
        return plan
    return msgspec.structs.replace(plan, recompute=True)


@saving("recompute-blocks", repeats=worth_a_checkpoint)
def recompute_blocks(q: Question, plan: Plan) -> Plan:
    """Make every block of the model a checkpoint of its own, as users wrap a transformer's blocks.

    One block is repeated at a time, so a stage needs the activations of one block and of the blocks' outputs. Blocks
    that free little stay as they are (`freeing.worth_a_checkpoint`).
    """
    if not schedules.get(plan.schedule).trains:
        return plan
    names = [layer.name for layer in q.profile.layers]
    worth = worth_a_checkpoint(q.profile, q.samples)
    return msgspec.structs.replace(plan, recompute_blocks=tuple((names[b[0]], names[b[-1]]) for b in worth))


@saving("recompute-layers", behind_cut=True, repeats=_every_layer)
def recompute_layers(q: Question, plan: Plan) -> Plan:
    """Repeat the cheapest layers whose activations make every device fit; nothing where all fit already.

    A layer frees what it saves of each micro-batch in flight. Devices decide by themselves, each asking the memory
    model what its choice still lacks; all ask at once. Raises `PlanError` (exit 2) where no choice is enough.
    """
    placed = Placed(q.profile, plan, q.cluster)
    if float("inf") in least_repeated(placed):
        raise _not_enough(plan, max(float(one.lacking.max()) for one in lacks(placed)))
    profile, ranges = placed.profile, placed.ranges
    held = flight(plan).resident
    table = layer_table(profile, q.samples, plan.threads)
    capacity = placed.capacities
    sizes = layer_bytes(profile, q.samples)
    programs: dict[frozenset[int], Linked] = {}

    def lack_of(chosen: set[int]) -> dict[tuple[int, ...], float]:
        """Bytes that the worst device with the same stages lacks; below 0 where it fits."""
        trial = msgspec.structs.replace(plan, recompute_layers=tuple(profile.layers[i].name for i in sorted(chosen)))
        stages = frozenset(s for s, own in enumerate(ranges) if chosen & set(own))
        if stages and not placed.schedule.splits:
            # Of every device that lacks memory: a RECOMPUTE of nothing holds nothing, nor one before a whole backward.
            stages = frozenset(s for held_by in missing for s in held_by)
        if stages not in programs:
            programs[stages] = Linked(unroll(trial, replicas=None if plan.uneven else 1))  # replicas need alike
        found: dict[tuple[int, ...], float] = {}
        peaks = MemoryModel(placed.with_plan(trial), programs[stages]).peaks().tolist()
        for held_by, peak, room in zip(plan.stages_of, peaks, capacity, strict=False):
            found[held_by] = max(found.get(held_by, -room), peak - room)
        return found

    missing = {stages: lack for stages, lack in lack_of(set()).items() if lack > 0}
    asking, chosen = {}, dict[tuple[int, ...], set[int]]()
    for stages, lack in missing.items():
        layers = [(i, held[s], sizes[i].saved - sizes[i].output) for s in stages for i in ranges[s]]
        seconds = [float(table.recompute[MEDIAN, i + 1] - table.recompute[MEDIAN, i]) for i, _, _ in layers]
        choice = _choose(seconds, [saved * n for _, n, saved in layers], [saved for *_, saved in layers], lack)
        asking[stages] = choice, [i for i, _, _ in layers]
    left: dict[tuple[int, ...], float] = {}
    while asking:
        for stages, (choice, names) in list(asking.items()):
            try:
                chosen[stages] = {names[i] for i in (choice.send(left[stages]) if left else next(choice))}
            except StopIteration as done:
                if done.value is None:
                    raise _not_enough(plan, missing[stages]) from None
                chosen[stages] = {names[i] for i in done.value}
                del asking[stages]
        left = lack_of(set().union(*chosen.values())) if asking else {}
    every = sorted(set().union(*chosen.values()))
    return msgspec.structs.replace(plan, recompute_layers=tuple(profile.layers[i].name for i in every))


_Choice = Generator[tuple[int, ...], float, tuple[int, ...] | None]
GOOD_ENOUGH = 1.005
"""A choice that costs less than this times what it must cost at least is not improved."""
TRIALS = 60
"""Most choices that one device's peak is computed for to find one that fits, and then to find a cheaper one."""
LOOKED_AT = 20_000
"""Most choices that are looked at to find a cheaper one."""


def _choose(seconds: list[float], freed: list[float], saved: list[float], lack: float) -> _Choice:
    """Yield choices, are told what each still lacks, and return the cheapest that lacks nothing, or None.

    What is repeated is live for a moment, one layer after the other: a choice needs as many bytes more as its largest
    layer saves. So the cheapest is looked for among all layers, then without the largest, and so on. That takes every
    layer's bytes for equally useful; but what the last layers free is needed again when the peak comes. So a
    cheaper choice is then looked for among all, from the cheapest on.
    """
    least = cheapest(seconds, freed, lack)
    enough = GOOD_ENOUGH * least.seconds if least is not None else 0.0
    best, cost = None, float("inf")
    trials = 0
    for limit in sorted(set(saved), reverse=True):
        usable = [own if size <= limit else float("inf") for own, size in zip(seconds, saved, strict=True)]
        needed = lack
        while trials < TRIALS and (found := cheapest(usable, freed, needed)) is not None and found.seconds < cost:
            trials += 1
            left = yield found.layers
            if left <= 0:
                best, cost = found.layers, found.seconds
            needed = found.freed + left
        every = tuple(i for i, size in enumerate(saved) if size <= limit)
        if best is None and (yield every) <= 0:
            best, cost = every, sum(seconds[i] for i in every)
        if cost <= enough:
            break
    if best is not None and cost > enough:
        for trial in itertools.islice(_ascending(seconds, freed, lack, cost), TRIALS):
            if (yield trial) <= 0:
                return trial
    return best


def _ascending(seconds: list[float], freed: list[float], lack: float, cost: float) -> Iterator[tuple[int, ...]]:
    """Yield the choices that free enough and take less than `cost`, the cheapest first and of equals the earliest.

    Ends after `LOOKED_AT` choices. A choice follows from a cheaper one: its dearest layer is exchanged for the next
    dearer one, or that one is added.
    """
    order = sorted(range(len(seconds)), key=lambda i: (seconds[i], i))
    waiting: list[tuple[float, tuple[int, ...]]] = [(seconds[order[0]], (0,))] if order else []
    for _ in range(LOOKED_AT):
        if not waiting or waiting[0][0] >= cost * (1 - 1e-9):
            return
        total, chosen = heapq.heappop(waiting)
        layers = tuple(sorted(order[at] for at in chosen))
        if sum(freed[i] for i in layers) >= lack:
            yield layers
        *others, last = chosen
        if last + 1 < len(order):
            dearer = seconds[order[last + 1]]
            heapq.heappush(waiting, (total + dearer, (*chosen, last + 1)))
            heapq.heappush(waiting, (total - seconds[order[last]] + dearer, (*others, last + 1)))


def _not_enough(plan: Plan, lack: float) -> PlanError:
    return PlanError(
        what="recomputing single layers is not enough",
        where=f"plan {plan}",
        why=f"a device lacks at least {size(lack)}, and no choice of layers frees them",
        fix="recompute whole stages (recompute), or take more devices",
    )


@saving("offload", swaps=True)
def offload(q: Question, plan: Plan) -> Plan:
    """Swap saved activations to the host and back (Rhu et al., vDNN, arXiv 1602.08124).

    Nothing where every micro-batch's backward comes too soon behind its forward.
    """
    if not schedules.get(plan.schedule).trains or not swaps(plan):
        return plan
    return msgspec.structs.replace(plan, offload=True)


@saving("host-optimizer", states_on_host=True)
def host_optimizer(q: Question, plan: Plan) -> Plan:
    """Keep the optimizer's state on the host and update there (Ren et al., ZeRO-Offload, arXiv 2101.06840)."""
    if synchronisation.get(plan.synchronisation).server and plan.replicas > 1:
        return plan  # the servers update already
    return msgspec.structs.replace(plan, host_optimizer=True)
