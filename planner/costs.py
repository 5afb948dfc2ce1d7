"""What every action of a plan costs on a cluster, from a profile: seconds alone on its device, bytes on the wire.

How actions disturb each other (shared cores and links) is the simulator's matter.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal

from planner.cluster import Cluster, Device, by_size
from planner.plan import Plan
from planner.profile import LayerProfile, LayerTimes, Profile, Timing, interpolate
from planner.program import (
    BACKWARD,
    FORWARD,
    LOAD,
    OPTIMIZER,
    RECOMPUTE,
    REDUCE_GRAD,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    Program,
)
from planner.trace import Trace

Quantile = Literal["low", "lower", "median", "upper", "high"]
QUANTILES: dict[Quantile, float] = {"low": 0.1, "lower": 0.25, "median": 0.5, "upper": 0.75, "high": 0.9}
"""The percentiles that a profile's `Timing` holds, by the first part of the field's name."""
_SHARES = tuple(QUANTILES.values())
Spread = tuple[float, ...]
"""Seconds at each of `QUANTILES`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """The price list of one program.

    `seconds` holds, per device, what each action computes when it has its cores for itself (posting time for sends
    and receives); `sizes` the bytes of each send; `ways` the links of each ordered pair of devices; `transfers` the
    seconds of each send on undisturbed links and `works` the core seconds it takes from each end; `reductions` the
    seconds of each stage's all-reduce. `spread` has, per device, the quantiles of every stage's operations, whatever
    the micro-batch. `contended` is off when the seconds were measured under contention already.
    """

    cluster: Cluster
    seconds: tuple[dict[Action, float], ...]
    sizes: dict[Action, float]
    ways: dict[tuple[int, int], tuple[int, ...]]
    transfers: dict[Action, float]
    works: dict[Action, float]
    reductions: dict[int, float]
    spread: tuple[dict[tuple[int, str], Spread], ...]
    contended: bool = True

    def replayed(self, trace: Trace) -> Costs:
        """Return the same costs with the computing times of a measured trace: the replay of DESIGN.md section 8.

        What the simulator then still gets wrong is the schedule and communication model alone.
        """
        seconds = tuple(
            {a: measured.get(a, s) for a, s in mine.items()}
            for mine, measured in zip(self.seconds, trace.work, strict=True)
        )
        return dataclasses.replace(self, seconds=seconds, contended=False)

    @property
    def by_operation(self) -> dict[str, float]:
        """Median seconds of each operation per stage, as "1B"; the devices of a stage are alike."""
        return {
            f"{action.stage}{action.op}": seconds
            for mine in self.seconds
            for action, seconds in mine.items()
            if action.op != REDUCE_GRAD
        } | {f"{stage}{REDUCE_GRAD}": seconds for stage, seconds in self.reductions.items()}

    @property
    def certain(self) -> bool:
        """Whether no operation has any spread."""
        return all(spread[0] == spread[-1] for table in self.spread for spread in table.values())

    def at(self, quantile: Quantile) -> Costs:
        """Return the same costs with every operation at one quantile."""
        index = list(QUANTILES).index(quantile)
        return self._with(lambda spread: spread[index])

    def drawn(self, random: Random) -> Costs:
        """Draw every action's seconds from its own spread, independently.

        The quantile function is linear between the measured percentiles and constant beyond them: no draw is outside
        of what was seen.
        """

        def draw(spread: Spread) -> float:
            share = random.random()
            right = bisect.bisect_left(_SHARES, share)
            if right in (0, len(_SHARES)):
                return spread[min(right, len(_SHARES) - 1)]
            part = (share - _SHARES[right - 1]) / (_SHARES[right] - _SHARES[right - 1])
            return spread[right - 1] + part * (spread[right] - spread[right - 1])

        return self._with(draw)

    def _with(self, choose: Callable[[Spread], float]) -> Costs:
        seconds = tuple(
            {a: choose(table[a[:2]]) if a[:2] in table else s for a, s in mine.items()}
            for mine, table in zip(self.seconds, self.spread, strict=True)
        )
        return dataclasses.replace(self, seconds=seconds)


def costs_of(profile: Profile, plan: Plan, program: Program, cluster: Cluster) -> Costs:
    """Price every action of `program` on the devices of `cluster`, which are the plan's, in its order.

    Raises `PlanError` when the plan is for other layers or two neighbours have no link.
    """
    ranges = plan.layer_ranges([layer.name for layer in profile.layers])
    stages = [StageCosts(profile, layers, plan.samples) for layers in ranges]
    loads = tuple(at(profile.load, plan.batch, quantile) for quantile in QUANTILES)
    spread = tuple(
        {
            (stage, op): loads if op == LOAD else stages[stage].spread(op, device)
            for stage, op in {action[:2] for action in row if action not in program.messages}
        }
        for row, device in zip(program.rows, cluster.devices, strict=True)
    )
    names = plan.devices
    messages = {message.send: message for message in program.messages.values()}
    bytes_of = {
        (stage, op): profile.crossing_bytes(
            ranges[stage].stop if op == SEND_FORWARD else ranges[stage].start,
            plan.samples,
            gradients=op == SEND_BACKWARD,
        )
        for stage, op in {send[:2] for send in messages}
    }
    posts = {kind: cluster.post_seconds(size) for kind, size in bytes_of.items()}
    works = {k: by_size(cluster.transfer_work, b) if cluster.transfer_work else 0.0 for k, b in bytes_of.items()}
    ways = {
        pair: cluster.path(names[pair[0]], names[pair[1]]) for pair in {(m.source, m.target) for m in messages.values()}
    }
    kinds = {(m.source, m.target, *send[:2]) for send, m in messages.items()}
    transfers = {
        (a, b, stage, op): cluster.transfer_seconds(ways[a, b], bytes_of[stage, op]) for a, b, stage, op in kinds
    }
    middle = list(QUANTILES).index("median")
    return Costs(
        cluster=cluster,
        seconds=tuple(
            {
                action: posts[program.messages[action].send[:2]]
                if action in program.messages
                else table[action[:2]][middle]
                for action in row
            }
            for row, table in zip(program.rows, spread, strict=True)
        ),
        sizes={send: bytes_of[send[:2]] for send in messages},
        ways=ways,
        transfers={send: transfers[m.source, m.target, *send[:2]] for send, m in messages.items()},
        works={send: works[send[:2]] for send in messages},
        reductions={
            stage: cluster.all_reduce_seconds(
                tuple(names[d] for d in devices), sum(profile.layers[i].gradient_bytes for i in ranges[stage])
            )
            for stage, devices in program.replicas.items()
            if len(devices) > 1
        },
        spread=spread,
    )


class StageCosts:
    """Seconds of one stage's operations at one micro-batch size.

    A stage runs its layers without the seams that the profiler had to cut between them. The whole model, measured
    beside its layers, says what a seam costs: (sum of the layers - whole) / (number of seams).
    """

    def __init__(self, profile: Profile, layers: range, samples: int) -> None:
        self.profile, self.samples = profile, samples
        self.layers = [profile.layers[i] for i in layers]
        self.parts = list(self.layers)
        if layers.stop == len(profile.layers):
            self.parts.append(profile.loss)

    def spread(self, op: str, device: Device) -> Spread:
        """Seconds of an operation on a device, at every quantile; a reduction's own are the network's."""
        price: dict[str, Callable[[int, Quantile], float]] = {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            RECOMPUTE: self.recompute,
            OPTIMIZER: self.optimizer,
            REDUCE_GRAD: lambda threads, quantile: 0.0,
        }
        return tuple(price[op](device.threads, quantile) / device.speed for quantile in QUANTILES)

    def forward(self, threads: int, quantile: Quantile = "median") -> float:
        """Seconds of one micro-batch's forward, with the loss on the last stage."""
        seconds = self._sum("forward", threads, quantile, self.parts) - self._seams("forward", threads, self.parts)
        return max(0.0, seconds) + self.profile.action_s

    def backward(self, threads: int, quantile: Quantile = "median") -> float:
        """Seconds of one micro-batch's whole backward."""
        seconds = self._sum("backward", threads, quantile, self.parts) - self._seams("backward", threads, self.parts)
        return max(0.0, seconds) + self.profile.action_s

    def recompute(self, threads: int, quantile: Quantile = "median") -> float:
        """Seconds of repeating the forward: the layers without the loss, the last one only as far as it is needed."""
        seconds = self._sum("forward", threads, quantile, self.layers[:-1])
        seconds += self._sum("recompute", threads, quantile, self.layers[-1:])
        return max(0.0, seconds - self._seams("forward", threads, self.layers))

    def optimizer(self, threads: int, quantile: Quantile = "median") -> float:
        """Seconds of updating the stage's parameters."""
        alone = sum(float(getattr(times(layer, threads).optimizer, f"{quantile}_s")) for layer in self.layers)
        whole = [w for w in self.profile.whole if w.layers_optimizer_s > 0]
        return alone * (whole[0].optimizer_s / whole[0].layers_optimizer_s if whole else 1.0)

    def _sum(self, kind: str, threads: int, quantile: Quantile, parts: Sequence[LayerProfile]) -> float:
        return sum(at(getattr(times(part, threads), kind), self.samples, quantile) for part in parts)

    def _seams(self, kind: str, threads: int, parts: Sequence[LayerProfile]) -> float:
        if not self.profile.whole:
            return 0.0
        near = _nearest([w.threads for w in self.profile.whole], threads)
        whole = [w for w in self.profile.whole if w.threads == near]
        nearest = min(whole, key=lambda w: abs(math.log(w.samples / self.samples)))
        all_seams = float(getattr(nearest, f"layers_{kind}_s") - getattr(nearest, f"{kind}_s"))
        return all_seams * (len(parts) - 1) / len(self.profile.layers)


def times(layer: LayerProfile, threads: int) -> LayerTimes:
    """Return the layer's times at the measured number of threads nearest to `threads`."""
    return next(t for t in layer.times if t.threads == _nearest([t.threads for t in layer.times], threads))


def _nearest(known: Sequence[int], threads: int) -> int:
    return min(known, key=lambda t: (abs(math.log(t / threads)), t), default=threads)


def at(timings: Sequence[Timing], samples: int, quantile: Quantile = "median") -> float:
    """Interpolate measured seconds to a micro-batch of `samples`."""
    return interpolate([(float(t.samples), getattr(t, f"{quantile}_s")) for t in timings], samples)
