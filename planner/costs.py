"""What every action of a plan costs on a cluster, from a profile: seconds alone on its device, bytes on the wire.

How actions disturb each other (shared cores and links) is the simulator's matter.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
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
    SENDS,
    Action,
    Program,
)
from planner.trace import Trace

Quantile = Literal["low", "lower", "median", "upper", "high"]
QUANTILES: dict[Quantile, float] = {"low": 0.1, "lower": 0.25, "median": 0.5, "upper": 0.75, "high": 0.9}
"""The percentiles that a profile's `Timing` holds, by the first part of the field's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """The price list of one program.

    `seconds` holds, per device, what each action computes when it has its cores for itself (posting time for sends
    and receives); `sizes` the bytes of each send; `ways` the links of each ordered pair of devices; `transfers` the
    seconds of each send on undisturbed links and `works` the core seconds it takes from each end; `reductions` the
    seconds of each stage's all-reduce. `contended` is off when the seconds were measured under contention already.
    """

    cluster: Cluster
    seconds: tuple[dict[Action, float], ...]
    sizes: dict[Action, float]
    ways: dict[tuple[int, int], tuple[int, ...]]
    transfers: dict[Action, float]
    works: dict[Action, float]
    reductions: dict[int, float]
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


def sampled(costs: Mapping[Quantile, Costs], random: Random) -> Costs:
    """Draw every action's seconds from its own spread, independently.

    The quantile function is linear between the measured percentiles and constant beyond them: no draw is outside of
    what was seen.
    """
    shares = list(QUANTILES.values())

    def draw(seconds: Sequence[float]) -> float:
        share = random.random()
        right = bisect.bisect_left(shares, share)
        if right in (0, len(shares)):
            return seconds[min(right, len(shares) - 1)]
        part = (share - shares[right - 1]) / (shares[right] - shares[right - 1])
        return seconds[right - 1] + part * (seconds[right] - seconds[right - 1])

    tables = [costs[quantile].seconds for quantile in QUANTILES]
    seconds = tuple(
        {action: draw([table[device][action] for table in tables]) for action in row}
        for device, row in enumerate(tables[0])
    )
    return dataclasses.replace(costs["median"], seconds=seconds)


def costs_of(
    profile: Profile, plan: Plan, program: Program, cluster: Cluster, *, quantile: Quantile = "median"
) -> Costs:
    """Price every action of `program` on the devices of `cluster`, which are the plan's, in its order.

    Raises `PlanError` when the plan is for other layers or two neighbours have no link.
    """
    ranges = plan.layer_ranges([layer.name for layer in profile.layers])
    stages = [StageCosts(profile, layers, plan.samples, quantile=quantile) for layers in ranges]
    sizes = {
        action: profile.crossing_bytes(
            ranges[action.stage].stop if action.op == SEND_FORWARD else ranges[action.stage].start,
            plan.samples,
            gradients=action.op == SEND_BACKWARD,
        )
        for action in program.where
        if action.op in SENDS
    }
    seconds = tuple(
        {
            action: cluster.post_seconds(sizes[program.messages[action].send])
            if action in program.messages
            else _seconds(action, profile, plan, stages, device, quantile)
            for action in row
        }
        for row, device in zip(program.rows, cluster.devices, strict=True)
    )
    pairs = {(m.source, m.target) for m in program.messages.values()}
    names = plan.devices
    ways = {(a, b): cluster.path(names[a], names[b]) for a, b in pairs}
    transfers = {
        action: cluster.transfer_seconds(ways[message.source, message.target], sizes[action])
        for action, message in program.messages.items()
        if action.op in SENDS
    }
    works = {
        send: by_size(cluster.transfer_work, size) if cluster.transfer_work else 0.0 for send, size in sizes.items()
    }
    reductions = {
        stage: cluster.all_reduce_seconds(
            tuple(names[d] for d in devices), sum(profile.layers[i].gradient_bytes for i in ranges[stage])
        )
        for stage, devices in program.replicas.items()
        if len(devices) > 1
    }
    return Costs(
        cluster=cluster,
        seconds=seconds,
        sizes=sizes,
        ways=ways,
        transfers=transfers,
        works=works,
        reductions=reductions,
    )


def _seconds(
    action: Action,
    profile: Profile,
    plan: Plan,
    stages: Sequence[StageCosts],
    device: Device,
    quantile: Quantile,
) -> float:
    stage = stages[action.stage]
    if action.op == REDUCE_GRAD:
        return 0.0
    if action.op == LOAD:
        return at(profile.load, plan.batch, quantile)
    price: dict[str, Callable[[int], float]] = {
        FORWARD: stage.forward,
        BACKWARD: stage.backward,
        RECOMPUTE: stage.recompute,
        OPTIMIZER: stage.optimizer,
    }
    return price[action.op](device.threads) / device.speed


class StageCosts:
    """Seconds of one stage's actions at one micro-batch size, by number of threads.

    A stage runs its layers without the seams that the profiler had to cut between them. The whole model, measured
    beside its layers, says what a seam costs: (sum of the layers - whole) / (number of seams).
    """

    def __init__(
        self, profile: Profile, layers: range, samples: int, *, quantile: Quantile = "median", with_loss: bool = True
    ) -> None:
        self.profile, self.samples, self.quantile = profile, samples, quantile
        self.layers = [profile.layers[i] for i in layers]
        self.parts = list(self.layers)
        if with_loss and layers.stop == len(profile.layers):
            self.parts.append(profile.loss)

    def _sum(self, kind: str, threads: int, parts: Sequence[LayerProfile]) -> float:
        return sum(at(getattr(times(part, threads), kind), self.samples, self.quantile) for part in parts)

    def _seams(self, kind: str, threads: int, parts: int) -> float:
        whole = sorted(
            (w for w in self.profile.whole if w.threads == _nearest([w.threads for w in self.profile.whole], threads)),
            key=lambda w: w.samples,
        )
        if not whole or not self.profile.layers:
            return 0.0
        points = [(float(w.samples), float(getattr(w, f"layers_{kind}_s") - getattr(w, f"{kind}_s"))) for w in whole]
        nearest = min(points, key=lambda p: abs(math.log(p[0] / self.samples)))
        return nearest[1] * (parts - 1) / len(self.profile.layers)

    @cache  # noqa: B019 - lives as long as the few stages of one simulation
    def forward(self, threads: int) -> float:
        """Seconds of one micro-batch's forward, with the loss on the last stage."""
        seconds = self._sum("forward", threads, self.parts) - self._seams("forward", threads, len(self.parts))
        return max(0.0, seconds) + self.profile.action_s

    @cache  # noqa: B019
    def backward(self, threads: int) -> float:
        """Seconds of one micro-batch's whole backward."""
        seconds = self._sum("backward", threads, self.parts) - self._seams("backward", threads, len(self.parts))
        return max(0.0, seconds) + self.profile.action_s

    @cache  # noqa: B019
    def recompute(self, threads: int) -> float:
        """Seconds of repeating the forward: the layers without the loss, the last one only as far as it is needed."""
        seconds = self._sum("forward", threads, self.layers[:-1]) + self._sum("recompute", threads, self.layers[-1:])
        return max(0.0, seconds - self._seams("forward", threads, len(self.layers)))

    @cache  # noqa: B019
    def optimizer(self, threads: int) -> float:
        """Seconds of updating the stage's parameters."""
        alone = sum(float(getattr(times(layer, threads).optimizer, f"{self.quantile}_s")) for layer in self.layers)
        whole = [w for w in self.profile.whole if w.layers_optimizer_s > 0]
        return alone * (whole[0].optimizer_s / whole[0].layers_optimizer_s if whole else 1.0)


def times(layer: LayerProfile, threads: int) -> LayerTimes:
    """Return the layer's times at the measured number of threads nearest to `threads`."""
    return next(t for t in layer.times if t.threads == _nearest([t.threads for t in layer.times], threads))


def _nearest(known: Sequence[int], threads: int) -> int:
    return min(known, key=lambda t: (abs(math.log(t / threads)), t), default=threads)


def at(timings: Sequence[Timing], samples: int, quantile: Quantile = "median") -> float:
    """Interpolate measured seconds to a micro-batch of `samples`."""
    return interpolate([(float(t.samples), getattr(t, f"{quantile}_s")) for t in timings], samples)
