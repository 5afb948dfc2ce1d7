"""A plan as its rehearsal performs it: the price list and the memory model that predict it, asked for every action."""

from __future__ import annotations

import msgspec
import numpy as np

from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.costs.prices import PriceList
from planner.costs.stage_costs import QUANTILES
from planner.orders.operations import LOAD, NUMBER, OPERATIONS, OPS
from planner.programs.lowering import lower
from planner.programs.waits import Linked
from planner.values.cluster import Cluster
from planner.values.plan import Plan
from planner.values.profile import LayerProfile, LayerTimes, Profile, Timing, Value, value_bytes
from planner.values.rehearsal import Passed, Rehearsal, Row, Shadow
from planner.values.trace import KINDS


def stage_hardware(target: Cluster, here: Cluster, plan: Plan, *, message_scale: float, wake_s: float) -> Cluster:
    """Return this machine with the devices that a plan is for: they wait at their own speed, and send over its links.

    `here` is this machine as it was measured. Waiting needs no core; what really happens does, and going on behind a
    wait, `wake_s` late.
    """
    host = here.hosts[0].name
    devices = tuple(
        msgspec.structs.replace(device, host=host, shares_cores=True, waits=True)
        for device in target.only(plan.device_names).devices
    )
    return msgspec.structs.replace(
        here,
        name=f"{target.name}, rehearsed here",
        devices=devices,
        hosts=tuple(msgspec.structs.replace(one, wake_s=wake_s) for one in here.hosts),
        links=tuple(link for link in here.links if link.between == (host, host)),
        elastic=False,
        message_scale=message_scale,
    )


def rehearsed_profile(profile: Profile, *, jitter: bool) -> Profile:
    """Return a profile as it is rehearsed: nobody makes batches beside; without `jitter` times are medians."""
    found = msgspec.structs.replace(profile, loading=None)
    if jitter:
        return found
    return msgspec.structs.replace(
        found,
        layers=tuple(map(_certain, found.layers)),
        loss=_certain(found.loss),
        load=tuple(map(_median, found.load)),
    )


def _certain(layer: LayerProfile) -> LayerProfile:
    return msgspec.structs.replace(layer, times=tuple(map(_certain_times, layer.times)))


def _certain_times(times: LayerTimes) -> LayerTimes:
    kinds = ("forward", "backward", "backward_input", "backward_weight", "recompute")
    return msgspec.structs.replace(
        times,
        **{kind: tuple(map(_median, getattr(times, kind))) for kind in kinds},
        optimizer=_median(times.optimizer),
        norm=_median(times.norm) if times.norm else None,
    )


def _median(timing: Timing) -> Timing:
    return Timing.of(timing.samples, [timing.median_s])


def rehearsal_of(placed: Placed, *, jitter: bool = False) -> Rehearsal:
    """Return what the ranks of a placed plan wait for and hold."""
    linked = Linked(lower(placed.plan))
    memory, prices = MemoryModel(placed, linked), PriceList(placed, linked.edges)
    return Rehearsal(
        stages=tuple(_shadow(placed, memory, prices, stage) for stage in range(len(placed.ranges))),
        rows=tuple(_row(memory, prices, row) for row in range(linked.devices)),
        quantiles=tuple(QUANTILES.values()),
        jitter=jitter,
        message_scale=placed.cluster.message_scale,
    )


def _shadow(placed: Placed, memory: MemoryModel, prices: PriceList, stage: int) -> Shadow:
    layers = placed.ranges[stage]

    def passed(values: list[Value]) -> tuple[Passed, ...]:
        samples, scale = placed.plan.samples, placed.cluster.message_scale
        return tuple(
            Passed(name=v.name, bytes=max(1, round(scale * value_bytes(v, samples))), gradient=v.gradient)
            for v in values
        )

    def changes(op: str, kind: str) -> int:
        return round(float(memory.change[stage * len(OPS) + NUMBER[op], KINDS.index(kind)]))

    def inside(found: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, int]:
        return {op: round(float(found[stage * len(OPS) + NUMBER[op]])) for op in OPS}

    agreed = placed.synchronisation
    tied = next((group for group in placed.plan.tied if group[0] == stage), ())
    return Shadow(
        taken=passed(placed.profile.crossing(layers.start)) if layers.start else (),
        made=passed(placed.profile.crossing(layers.stop)),
        inside=inside(memory.inside),
        first=inside(memory.inside_first),
        kept={op: changes(op, "activations") for op in OPS if changes(op, "activations") > 0},
        batch=changes(LOAD, "input"),
        gradients=round(float(memory.gradients[stage])),
        reduced=tuple(max(1, round(size)) for size in prices.reduced_bytes(stage)),
        gathered=tuple(max(1, round(size)) for size in prices.gathered_bytes(stage) if agreed.shards or agreed.server),
        tied=round(prices.tied_bytes(tied)) if tied else 0,
    )


def _row(memory: MemoryModel, prices: PriceList, row: int) -> Row:
    linked = memory.linked
    begin, end = int(linked.offsets[row]), int(linked.offsets[row + 1])
    own = {(action.stage, action.op) for action in linked.actions[begin:end] if not OPERATIONS[action.op].posts}
    return Row(
        static={kind: round(float(size)) for kind, size in zip(KINDS, memory.static[row], strict=True) if size},
        seconds={f"{stage}{op}": tuple(map(float, prices.action(op, stage, row))) for stage, op in sorted(own)},
    )
