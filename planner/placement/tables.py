"""Seconds and memory of every run of layers as a stage of a plan, for `planner.placement.partition`.

The plan is a trial: its layers do not matter yet, but its devices, schedule, synchronisation and savings do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from planner.basis.memo import memoised
from planner.costs import collectives
from planner.costs.placed import weakest
from planner.costs.stage_costs import MEDIAN, layer_table
from planner.orders import schedules, synchronisation
from planner.placement import partition
from planner.placement.filling import crossing, freeable_bytes, holding, repeated_blocks, stage_bytes
from planner.placement.flight import flight
from planner.placement.question import Question
from planner.values.cluster import Device
from planner.values.plan import Plan
from planner.values.profile import Profile
from planner.values.routes import Path

if TYPE_CHECKING:
    from planner.placement.partition import Table


class Rates(NamedTuple):
    """How many replicas a stage has, and their seconds per byte of an all-reduce, or of half of one."""

    replicas: int
    all_reduce: float
    half: float


class _Joint(NamedTuple):
    """How a stage's replicas reduce, the links to the stage before it, and what tells how quick these are."""

    rates: Rates
    path: Path
    figures: tuple[object, ...]


class StageTables:
    """Seconds and share of memory of every run of layers as a stage of `plan`.

    A stage takes a micro-batch's forward and backward, what is recomputed in between, the posting of its messages and
    its part of what a step pays once (reductions that its last backward does not hide, the update); and at least as
    long as its gathers and reductions take where each micro-batch has some, or as the slower of its two links needs for
    one message. What it fills is `planner.placement.filling`'s. Where layers are to be `chosen` for recomputing once
    the cut is known, a run takes as many seconds more as it lacks memory: the cheapest layers' share of all.
    """

    def __init__(self, q: Question, plan: Plan, *, chosen: bool = False) -> None:
        self.q, self.plan, self.chosen = q, plan, chosen
        self.flight = flight(plan)
        self.names = {device.name: device for device in q.devices}
        self.alike = len({(device.speed, device.threads, device.memory_bytes) for device in q.devices}) == 1
        self.device = [self.weakest(stage.devices) for stage in plan.stages]
        self.cluster = q.cluster.only(plan.device_names)
        self.schedule = schedules.get(plan.schedule)
        self.agreed = synchronisation.get(plan.synchronisation)
        self.tables: dict[tuple[object, ...], Table] = {}
        self.joints = self._joints()
        self.most_held = max(map(len, plan.stages_of[: plan.depth]))

    def weakest(self, names: Sequence[str]) -> Device:
        """Return the first of a stage's devices, as slow and as small as any of them: replicas wait for each other."""
        return self.names[names[0]] if self.alike else weakest([self.names[name] for name in names])

    def figures(self, stage: int) -> tuple[object, ...]:
        """What a stage's tables follow from, its devices' and links' names aside."""
        device = self.device[stage]
        return device.speed, device.memory_bytes, device.threads, self.rates(stage), self.joints[stage].figures

    def _joints(self) -> tuple[_Joint, ...]:
        """What every stage's tables need of its links, kept with the cluster: many plans have the same."""
        own = tuple(stage.devices for stage in self.plan.stages)
        sharded = None if self.agreed.server else bool(self.agreed.shards)
        key = "joints", own, self.plan.tensor, sharded
        return memoised(
            self.cluster, key, lambda: tuple(_Joint(self._rates(s), *self._link(s)) for s in range(len(own)))
        )

    def _link(self, stage: int) -> tuple[Path, tuple[object, ...]]:
        """The links to the stage before, of the first one to the next, and their figures."""
        name = self.device[stage].name
        other = self.plan.stages[stage - 1 if stage else 1 % len(self.plan.stages)].devices[0]
        path = self.cluster.path(name, other) if other != name else ()
        links = map(self.cluster.link_of, path)
        return path, tuple((link.latency_s, link.bandwidth_bytes_per_s, link.points) for link in links)

    def seconds(self, stage: int) -> Table:
        """Seconds per micro-batch on the stage's device."""
        _, path, figures = self.joints[stage]
        computing = self.computing(stage)
        return self._once(("seconds", id(computing), figures), lambda: self._seconds(computing, path, figures))

    def computing(self, stage: int) -> Table:
        """Seconds per micro-batch without waiting for links: what is evened out where links are the bottleneck."""
        return self.computing_on(stage, self.device[stage])

    def computing_on(self, stage: int, device: Device) -> Table:
        """Seconds per micro-batch of a stage if it were on a device."""
        rates = self.rates(stage)
        key = "computing", device.speed, device.threads, device.shares_cores, rates, stage if self.chosen else 0
        return self._once(
            key, lambda: self._computing(device, rates, self._short(stage, device) if self.chosen else None)
        )

    def rates(self, stage: int) -> Rates:
        """Return how many replicas a stage has, and how quick they reduce."""
        return self.joints[stage].rates

    def _rates(self, stage: int) -> Rates:
        names = tuple(self.plan.stages[stage].devices[:: self.plan.tensor])
        if len(names) == 1 or self.agreed.server:
            return Rates(len(names), 0.0, 0.0)
        whole = 2.0**30
        all_reduce = 0.0 if self.agreed.shards else collectives.all_reduce(self.cluster, names, whole) / whole
        half = collectives.half(self.cluster, names, whole) / whole if self.agreed.shards else 0.0
        return Rates(len(names), all_reduce, half)

    def filled(self, stage: int) -> Table:
        """Share of the stage's device that its layers would fill."""
        return self.filled_on(stage, self.device[stage])

    def filled_on(self, stage: int, device: Device) -> Table:
        """Share of a device that a stage's layers would fill."""
        own = "filled", holding(self.plan, stage, self.flight), self._room(device), stage if self.chosen else 0
        return self._once(own, lambda: self._filled(stage, device))

    def _filled(self, stage: int, device: Device) -> Table:
        whole = self._bytes(stage)
        if self.chosen:
            free, moment = freeable_bytes(self.q.profile, self.plan, self.flight.resident[stage])
            import numpy as np

            whole = np.where(whole > self._room(device), whole - free + moment, whole)
        return whole / self._room(device)

    def _room(self, device: Device) -> float:
        """A stage's share of a device that holds several."""
        return device.memory_bytes / self.most_held

    def _bytes(self, stage: int) -> Table:
        own = holding(self.plan, stage, self.flight)
        return self._once(("bytes", own), lambda: stage_bytes(self.q.profile, self.plan, own))

    def _short(self, stage: int, device: Device) -> Table:
        """What part of its layers every run has to recompute: bytes it lacks over bytes that this would free."""
        import numpy as np

        free, moment = freeable_bytes(self.q.profile, self.plan, self.flight.resident[stage])
        lacks = self._bytes(stage) - self._room(device)
        short: Table = np.minimum(np.where(lacks > 0, (lacks + moment) / np.maximum(free, 1.0), 0.0), 1.0)
        return short

    def _computing(self, device: Device, rates: Rates, short: Table | None) -> Table:
        import numpy as np

        profile, plan, samples = self.q.profile, self.plan, self.q.samples
        layers = layer_table(profile, samples, device.threads)
        seconds = run_seconds(profile, samples, device.threads)
        again, once = np.diff(layers.recompute[MEDIAN])[:-1], np.diff(layers.forward[MEDIAN])[:-1]
        if plan.recompute:  # the last layer only as far as it is needed
            seconds = seconds + partition.spans(once.tolist(), leaving=[0.0, *(again - once).tolist()])
        if blocks_of := repeated_blocks(profile, plan):
            own = [
                0.0 if i not in blocks_of else float((again if i == blocks_of[i][-1] else once)[i])
                for i in range(len(once))
            ]
            seconds = seconds + partition.spans(own)
        if short is not None:
            seconds = (
                seconds + memoised(profile, ("again", samples, device.threads), lambda: partition.spans(again)) * short
            )
        seconds = seconds / device.speed
        every = self.schedule.updates == "microbatch"
        share = 1 if every else -(-plan.microbatches // plan.replicas)
        if not self.agreed.server and not plan.host_optimizer:
            shards = rates.replicas if "optimizer" in self.agreed.shards else 1
            update = np.diff(layers.optimizer[MEDIAN]) / device.speed / shards / share
            seconds = seconds + partition.spans(update.tolist())
        if rates.replicas == 1 or self.agreed.server:
            return seconds
        hidden = partition.spans((np.diff(layers.backward[MEDIAN])[:-1] / device.speed).tolist())
        each, at_end = self._agreeing(rates)
        overlaps = not device.shares_cores
        seconds = np.maximum(seconds, each) if overlaps else seconds + each
        found: Table = seconds + np.maximum(0.0, at_end - hidden * overlaps) / share
        return found

    def _agreeing(self, rates: Rates) -> tuple[Table, Table]:
        """Seconds of every run's gathers and reductions: per micro-batch, and once between two updates."""
        gradients, parameters = byte_spans(self.q.profile)
        if not self.agreed.shards:
            per_update = rates.all_reduce * gradients
            each = per_update if self.schedule.updates == "microbatch" else 0 * gradients
            return each, per_update - each
        half = rates.half
        if "parameters" in self.agreed.shards:
            return half * (2 * parameters + gradients), 0 * gradients
        if "gradients" in self.agreed.shards:
            return half * gradients, half * parameters
        return 0 * gradients, half * (gradients + parameters)

    def _seconds(self, computing: Table, path: tuple[int, ...], figures: object) -> Table:
        import numpy as np

        if not path:
            return computing
        q = self.q
        sizes = crossing(q.profile, q.samples)

        def make() -> tuple[Table, Table]:
            posts, wires = np.zeros(len(sizes)), np.zeros(len(sizes))
            for i, (forward, backward) in list(enumerate(sizes))[1:-1]:
                posts[i] = self.cluster.post_seconds(forward) + self.cluster.post_seconds(backward)
                wires[i] = max(self.cluster.transfer_seconds(path, size) for size in (forward, backward))
            return partition.spans([0.0] * len(q.profile.layers), posts, posts), np.maximum.outer(wires, wires)

        posting, wiring = memoised(q.profile, ("wires", q.samples, q.cluster.identity, figures), make)
        found: Table = np.maximum(computing + posting, wiring)
        return found

    def _once(self, key: tuple[object, ...], make: Callable[[], Table]) -> Table:
        """Return the table of all stages that are alike."""
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]


def byte_spans(profile: Profile) -> tuple[Table, Table]:
    """Return the bytes of gradients and of parameters of every run of layers, kept with the profile.

    Of a run with several layers that share a parameter each but one say it too much.
    """
    place = {layer.name: i for i, layer in enumerate(profile.layers)}

    def spans(field: str) -> Table:
        found = partition.spans([float(getattr(layer, field)) for layer in profile.layers])
        for (_, *names), size in zip(profile.tied, profile.tied_bytes, strict=False):
            for one, other in pairwise(sorted(place[name] for name in names)):
                found[: one + 1, other + 1 :] -= getattr(size, field)
        return found

    def make() -> tuple[Table, Table]:
        return spans("gradient_bytes"), spans("parameter_bytes")

    return memoised(profile, "byte spans", make)


def run_seconds(profile: Profile, samples: int, threads: int) -> Table:
    """Return the seconds of a micro-batch's forward and backward for every run of layers, kept with the profile."""

    def make() -> Table:
        table = layer_table(profile, samples, threads)
        both = (table.forward[MEDIAN] + table.backward[MEDIAN]).tolist()
        weights = [b - a for a, b in pairwise(both)]
        *weights, loss = weights
        weights[-1] += loss  # the loss is the last layer's
        return partition.spans(weights)

    return memoised(profile, ("runs", samples, threads), make)
