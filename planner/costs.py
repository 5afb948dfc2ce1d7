"""What every action and every transfer of a program costs on a cluster, from a profile: seconds and bytes.

How they disturb each other (shared cores and links) is the simulator's matter.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from planner import codes, collectives, schedules, synchronisation
from planner.cluster import Cluster, Device, by_size
from planner.codes import (
    FETCH,
    LOAD,
    OFFLOAD,
    OPTIMIZER,
    PULL,
    PUSH,
    RECV_BACKWARD,
    RECV_FORWARD,
    REDUCE_GRAD,
    REDUCE_TIED,
    SEND_BACKWARD,
    SEND_FORWARD,
    UNSHARD_FORWARD,
)
from planner.compiled import kernel
from planner.errors import DEVICE, PlanError
from planner.linking import MESSAGES, Linked, Numbers
from planner.plan import Plan
from planner.profile import Profile
from planner.program import Program
from planner.stage_costs import MEDIAN, QUANTILES, Quantile, Spread, StageCosts, at, layer_table
from planner.stage_memory import of_plan
from planner.trace import Trace

Floats = npt.NDArray[np.float64]
_SHARES = tuple(QUANTILES.values())
_BY_DEVICE = (*MESSAGES, OFFLOAD, FETCH, PULL, PUSH)
"""Transfers whose price depends on whose they are: each device has its own way to the host or to a server."""


class TransferKind(NamedTuple):
    """Transfers that cost the same: which, between which devices, how much.

    `seconds` until it is done when it has its links for itself; `work` the core seconds it takes from each end's host;
    `ways` the links that each of its parts passes, at the same time.

    What a device hands to one engine (its network, a copy engine each way) is done in turn: `lane` numbers it, -1 for
    none, and `busy` is how long the transfer keeps it. Of a reduction that overlaps a backward, `early` seconds
    of that lie before its begin; a gather that overlaps a forward keeps its lane after its `seconds`.
    """

    op: str
    stage: int
    source: int
    target: int
    bytes: float
    seconds: float
    work: float
    ways: tuple[tuple[int, ...], ...]
    lane: int = -1
    busy: float = 0.0
    early: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """The price list of one program, whose rows are performed by `devices`, of a group of them the first.

    `seconds` holds what each action (of `linked.flat`) computes when it has its cores for itself, posting time for
    sends and receives; `spread` the quantiles of every kind of action and `kind` which one each action is. `kinds` are
    the transfers' prices, `transfer_kind` which one each transfer has (-1 where there is none). `applying` is what a
    parameter server needs to update each stage. `contended` is off when the seconds were measured under contention.
    """

    cluster: Cluster
    devices: tuple[Device, ...]
    linked: Linked
    seconds: Floats
    spread: Floats
    kind: Numbers
    kinds: tuple[TransferKind, ...]
    transfer_kind: Numbers
    applying: dict[int, float]
    contended: bool = True

    def replayed(self, trace: Trace) -> Costs:
        """Return the same costs with the computing times of a measured trace: the replay of DESIGN.md section 8.

        What the simulator then still gets wrong is the schedule and communication model alone.
        """
        reducing = codes.has(self.linked.flat, REDUCE_GRAD)
        seconds = [
            seconds if reduces else trace.work[row].get(action, seconds)
            for action, row, seconds, reduces in zip(
                self.linked.actions, self.linked.row.tolist(), self.seconds.tolist(), reducing.tolist(), strict=True
            )
        ]
        return dataclasses.replace(self, seconds=np.array(seconds), contended=False)

    @property
    def by_operation(self) -> dict[str, float]:
        """Median seconds of each operation per stage, as "1B"; the devices of a stage are alike."""
        first = np.unique(codes.kinds(self.linked.flat), return_index=True)[1]
        found = {f"{self.linked.actions[i].stage}{self.linked.actions[i].op}": float(self.seconds[i]) for i in first}
        return found | {f"{k.stage}{k.op}": k.seconds for k in self.kinds if k.op == REDUCE_GRAD}

    @property
    def certain(self) -> bool:
        """Whether no operation has any spread."""
        return bool((self.spread[:, 0] == self.spread[:, -1]).all())

    def at(self, quantile: Quantile) -> Costs:
        """Return the same costs with every operation at one quantile."""
        index = list(QUANTILES).index(quantile)
        return dataclasses.replace(self, seconds=self.spread[self.kind, index])

    def drawn(self, random: np.random.Generator) -> Costs:
        """Draw every action's seconds from its own spread, independently.

        The quantile function is linear between the measured percentiles and constant beyond them: no draw is outside
        of what was seen.
        """
        share = random.random(len(self.kind))
        right = np.clip(np.searchsorted(_SHARES, share), 1, len(_SHARES) - 1)
        low, high = np.array(_SHARES)[right - 1], np.array(_SHARES)[right]
        part = np.clip((share - low) / (high - low), 0.0, 1.0)
        below, above = self.spread[self.kind, right - 1], self.spread[self.kind, right]
        return dataclasses.replace(self, seconds=below + part * (above - below))


class Prices(NamedTuple):
    """The price list of a plan before it is written beside every action.

    An action's kind is a number made of its device's class, stage and operation: `shift[row] + stage x ops + op`.
    `place` says where each kind stands in `spread` (kinds, quantiles), the rest is as in `Costs`.
    """

    shift: npt.NDArray[np.int64]
    place: Numbers
    spread: Floats
    kinds: tuple[TransferKind, ...]
    transfer_kind: Numbers
    applying: dict[int, float]

    @property
    def by_number(self) -> Floats:
        """Median seconds of every kind's number."""
        return np.ascontiguousarray(self.spread[:, MEDIAN])[self.place]


def prices_of(profile: Profile, plan: Plan, program: Program, cluster: Cluster, linked: Linked) -> Prices:
    """Price every kind of action and transfer; as `costs_of`."""
    devices = row_devices(plan, cluster)[: linked.devices]
    prices = _Prices(profile, plan, cluster.take(len(plan.device_names)))
    classes = {device: number for number, device in enumerate(dict.fromkeys(map(_class, devices)))}
    examples = {classes[_class(device)]: device for device in reversed(devices)}
    width = linked.stages * len(codes.OPS)
    shift = width * np.array([classes[_class(device)] for device in devices], np.int64)
    place = np.full(width * len(classes), -1, np.int32)
    _occurring(len(linked.flat), linked.flat, linked.offsets, shift, len(codes.OPS), place)
    found = np.flatnonzero(place >= 0)
    place = np.zeros(len(place), np.int32)
    place[found] = np.arange(len(found))
    spread = np.array(
        [
            prices.action(codes.OPS[n % len(codes.OPS)], n % width // len(codes.OPS), examples[n // width])
            for n in found.tolist()
        ]
    )
    kinds, transfer_kind = _transfers(linked, prices)
    server = synchronisation.get(plan.synchronisation).server
    applying = {s: prices.applying(s) for s in range(linked.stages)} if server else {}
    return Prices(shift, place, spread, kinds, transfer_kind, applying)


def costs_of(profile: Profile, plan: Plan, program: Program, cluster: Cluster, linked: Linked | None = None) -> Costs:
    """Price every action and transfer of `program`, which is the plan's or that of its first replicas, on `cluster`.

    Raises `PlanError` when the plan is for other layers, two neighbours have no link, or a device none to its host.
    """
    linked = linked or Linked(program)
    if cluster.buffered:
        linked = linked.buffered()
    prices = prices_of(profile, plan, program, cluster, linked)
    kind, seconds = np.empty(len(linked.flat), np.int32), np.empty(len(linked.flat))
    _price(
        len(linked.flat),
        *(linked.flat, linked.offsets, prices.shift, len(codes.OPS), prices.place),
        *(np.ascontiguousarray(prices.spread[:, MEDIAN]), kind, seconds),
    )
    return Costs(
        cluster=cluster.take(len(plan.device_names)),
        devices=row_devices(plan, cluster)[: linked.devices],
        linked=linked,
        seconds=seconds,
        spread=prices.spread,
        kind=kind,
        kinds=prices.kinds,
        transfer_kind=prices.transfer_kind,
        applying=prices.applying,
    )


@kernel
def _occurring(flat, offsets, shift, ops, place):  # type: ignore[no-untyped-def]
    """Mark the kinds of actions that occur."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            place[shift[d] + (flat[i] >> 32 & 0xFFFFFF) * ops + (flat[i] >> 56)] = 0
    return 0


@kernel
def _price(flat, offsets, shift, ops, place, medians, kind, seconds):  # type: ignore[no-untyped-def]
    """Write every action's kind and its median beside it."""
    for d in range(len(offsets) - 1):
        for i in range(offsets[d], offsets[d + 1]):
            own = place[shift[d] + (flat[i] >> 32 & 0xFFFFFF) * ops + (flat[i] >> 56)]
            kind[i] = own
            seconds[i] = medians[own]
    return 0


def _class(device: Device) -> tuple[float, int]:
    return device.speed, device.threads


def _transfers(linked: Linked, prices: _Prices) -> tuple[tuple[TransferKind, ...], Numbers]:
    """Price transfers kind by kind: those of one stage between the same two devices cost the same."""
    numbers, firsts = np.full(linked.transfers, -1, np.int32), np.empty(linked.transfers, np.int32)
    kinds: list[TransferKind] = []
    for op, base in linked.planes:
        count = _group(
            linked.slots,
            *(base, linked.stages, linked.microbatches, op in _BY_DEVICE, len(kinds)),
            *(linked.parties, linked.source, linked.target, firsts, numbers),
        )
        for first in firsts[len(kinds) : count].tolist():
            ends = (int(linked.source[first]), int(linked.target[first])) if op in _BY_DEVICE else (-1, -1)
            kinds.append(prices.transfer(op, (first - base) // linked.microbatches, *ends))
    return tuple(kinds), numbers


@kernel
def _group(base, stages, last, messages, count, parties, source, target, firsts, numbers):  # type: ignore[no-untyped-def]
    """Number the kinds of one plane from `count` on; `firsts` are the first transfers of each. Returns the new count.

    Of messages the devices count; those of a stage come in runs, so that the last one's kind is looked at first.
    """
    for stage in range(stages):
        begin = count
        latest = -1
        for t in range(base + stage * last, base + (stage + 1) * last):
            if parties[t] == 0:
                continue
            if latest < 0 or (
                messages and (source[t] != source[firsts[latest]] or target[t] != target[firsts[latest]])
            ):
                latest = count
                for known in range(begin, count):
                    if source[t] == source[firsts[known]] and target[t] == target[firsts[known]]:
                        latest = known
                        break
                if latest == count:
                    firsts[count] = t
                    count += 1
            numbers[t] = latest
    return count


class _Prices:
    """Prices of one plan's operations, asked for once per kind."""

    def __init__(self, profile: Profile, plan: Plan, cluster: Cluster) -> None:
        self.profile, self.plan, self.cluster = profile, plan, cluster
        self.ranges = plan.layer_ranges([layer.name for layer in profile.layers])
        names = {layer.name: i for i, layer in enumerate(profile.layers)}
        chosen = frozenset(names[n] for n in plan.recompute_layers) if plan.recompute_layers else None
        self.stages = [StageCosts(profile, layers, plan.samples, chosen) for layers in self.ranges]
        self.holders = holders(plan)
        self.way = synchronisation.get(plan.synchronisation)
        self.groups = plan.groups
        self.devices = row_devices(plan, cluster)

    def action(self, op: str, stage: int, device: Device) -> Spread:
        """Seconds that an action keeps its device from computing, at every quantile."""
        if op == LOAD:
            return np.array([at(self.profile.load, self.plan.batch, quantile) for quantile in QUANTILES])
        posts = {SEND_FORWARD: (stage + 1, True), RECV_FORWARD: (stage, True)}
        posts |= {SEND_BACKWARD: (stage - 1, False), RECV_BACKWARD: (stage, False)}
        if op in posts:
            target, forward = posts[op]
            return np.full(len(QUANTILES), self.cluster.post_seconds(self.message_bytes(target, forward=forward)))
        seconds = self.stages[stage].spread(op, device)
        if op == OPTIMIZER:
            if "optimizer" in self.way.shards:
                seconds = seconds / len(self.holders[stage])
            if self.plan.host_optimizer:
                seconds = np.full(len(QUANTILES), self.on_host(stage, device))
        return seconds

    def message_bytes(self, stage: int, *, forward: bool) -> float:
        """Bytes of the message that `stage` receives."""
        cut = self.ranges[stage].start if forward else self.ranges[stage].stop
        return self.profile.crossing_bytes(cut, self.plan.samples, gradients=not forward)

    def transfer(self, op: str, stage: int, source: int, target: int) -> TransferKind:
        """Price one kind of transfer."""
        if op in MESSAGES:
            size = self.message_bytes(stage, forward=op == RECV_FORWARD)
            way = self.cluster.path(self.groups[source][0], self.groups[target][0])
            seconds = self.cluster.transfer_seconds(way, size)
            work = by_size(self.cluster.transfer_work, size) if self.cluster.transfer_work else 0.0
            return TransferKind(op, stage, source, target, size, seconds, work, (way,))
        if op in (OFFLOAD, FETCH):
            size = of_plan(self.profile, self.plan, self.ranges[stage]).kept
            way = host_way(self.cluster, self.groups[source][0])
            seconds = self.cluster.transfer_seconds(way, size)
            lane = 3 * source + (1 if op == OFFLOAD else 2)
            return TransferKind(op, stage, source, source, size, seconds, 0.0, (way,), lane, seconds)
        if op in (PULL, PUSH):
            return self._served(op, stage, source)
        return self._collective(op, stage)

    def _collective(self, op: str, stage: int) -> TransferKind:
        layers = self.ranges[stage]
        devices = tuple(self.groups[row][0] for row in self.holders[stage])
        if op == REDUCE_TIED:
            group = next(group for group in self.plan.tied if group[0] == stage)
            rows = dict.fromkeys(row for s in group for row in self.holders[s])
            devices = tuple(self.groups[row][0] for row in rows)
            size = self.tied_bytes(group)
            busy = seconds = collectives.all_reduce(self.cluster, devices, size)
        elif op == REDUCE_GRAD:
            per_layer = [float(self.profile.layers[i].gradient_bytes) for i in layers]
            size = sum(per_layer)
            busy, seconds = self._reduced(stage, devices, per_layer)
        else:
            per_layer = [float(self.profile.layers[i].parameter_bytes) for i in layers]
            size = sum(per_layer)
            gathers = [collectives.half(self.cluster, devices, bytes_) for bytes_ in per_layer]
            busy = sum(gathers)
            seconds = busy
            if "parameters" in self.way.shards:
                needed = self._reached(stage, forward=op == UNSHARD_FORWARD)
                ordered = gathers if op == UNSHARD_FORWARD else gathers[::-1]
                seconds = collectives.lead(needed, ordered)
        ways = tuple(dict.fromkeys(collectives.ring_ways(self.cluster, devices))) if len(devices) > 1 else ()
        early = busy - seconds if op == REDUCE_GRAD else 0.0
        lane = 3 * self.holders[stage][0] if len(devices) > 1 else -1
        return TransferKind(op, stage, -1, -1, size, seconds, 0.0, ways, lane, busy, early)

    def _reduced(self, stage: int, devices: tuple[str, ...], per_layer: list[float]) -> tuple[float, float]:
        """Seconds that a stage's reduction takes, and what of them its last backward does not hide.

        Gradients become ready from the last layer to the first. DDP reduces them in buckets as they fill, sharded
        gradients layer by layer.
        """
        whole = collectives.all_reduce if not self.way.shards else collectives.half
        sharded = "gradients" in self.way.shards
        if not self.plan.bucket_bytes and not sharded:
            at_once = whole(self.cluster, devices, sum(per_layer))
            return at_once, at_once
        times = self._reached(stage, forward=False)
        table = layer_table(self.profile, self.plan.samples, self.plan.threads)
        op = table.backward_weight if self._splits else table.backward
        layers = self.ranges[stage]
        end = float(op[MEDIAN, layers.stop] - op[MEDIAN, layers.start])
        ready: list[float] = []
        sizes: list[float] = []
        for index, size in enumerate(reversed(per_layer)):
            done = times[index + 1] if index + 1 < len(times) else end
            if sizes and not sharded and sizes[-1] < self.plan.bucket_bytes:
                sizes[-1] += size
                ready[-1] = done
            else:
                sizes.append(size)
                ready.append(done)
        seconds = [whole(self.cluster, devices, size) for size in sizes]
        return sum(seconds), collectives.tail(ready, seconds, end)

    @property
    def _splits(self) -> bool:
        return schedules.get(self.plan.schedule).splits

    def _reached(self, stage: int, *, forward: bool) -> list[float]:
        """Seconds after a pass's begin at which it reaches each of the stage's layers, in its own direction."""
        layers = self.ranges[stage]
        table = layer_table(self.profile, self.plan.samples, self.plan.threads)
        sums = table.forward if forward else table.backward_weight if self._splits else table.backward
        reached = sums[MEDIAN, layers.start : layers.stop]
        if forward:
            return [float(r) for r in reached - reached[0]]
        ends = sums[MEDIAN, layers.start + 1 : layers.stop + 1]
        return [float(e) for e in (ends[-1] - ends)[::-1]]

    def tied_bytes(self, group: tuple[int, ...]) -> float:
        """Bytes of the parameters that a group of stages shares: at most those of the smallest layer that has them."""
        homes = {self.profile.layers[i].name: s for s, layers in enumerate(self.ranges) for i in layers}
        size = {layer.name: layer.gradient_bytes for layer in self.profile.layers}
        shared = [names for _, *names in self.profile.tied if {homes[n] for n in names} == set(group)]
        return float(sum(min(size[name] for name in names) for names in shared))

    def _served(self, op: str, stage: int, row: int) -> TransferKind:
        """A pull or push: every server's shard at the same time, all workers through the servers' own links."""
        size = float(sum(self.profile.layers[i].parameter_bytes for i in self.ranges[stage]))
        if self.way.server == "host":
            ways = [host_way(self.cluster, self.groups[row][0])]
        else:
            mine = self.groups[row][0]
            ways = [self.cluster.path(mine, name) for name in self.plan.servers if name != mine]
        each = size / max(1, len(self.plan.servers))
        seconds = max((self.cluster.transfer_seconds(way, each) for way in ways), default=0.0)
        return TransferKind(op, stage, row, row, size, seconds, 0.0, tuple(ways))

    def applying(self, stage: int) -> float:
        """Seconds that the servers need to update a stage: each its shard; the host at its memory's speed."""
        device = self.devices[self.holders[stage][0]]
        if self.way.server == "host":
            return self.on_host(stage, device, copies=False)
        return float(self.stages[stage].optimizer(device.threads)[MEDIAN]) / device.speed / len(self.plan.servers)

    def on_host(self, stage: int, device: Device, *, copies: bool = True) -> float:
        """Seconds of an update on the host: gradients down, memory-bound arithmetic, parameters up.

        The update reads parameters, gradients and state and writes parameters and state (ZeRO-Offload, arXiv
        2101.06840, finds the CPU's Adam bound by memory).
        """
        layers = [self.profile.layers[i] for i in self.ranges[stage]]
        parameters = float(sum(layer.parameter_bytes for layer in layers))
        gradients = float(sum(layer.gradient_bytes for layer in layers))
        state = float(sum(layer.optimizer_bytes for layer in layers))
        host = next(host for host in self.cluster.hosts if host.name == device.host)
        shards = len(self.holders[stage]) if "optimizer" in self.way.shards else 1
        moved = (2 * parameters + gradients + 2 * state) / shards
        seconds = moved / host.memory_bytes_per_s
        if copies:
            way = host_way(self.cluster, device.name)
            seconds += sum(self.cluster.transfer_seconds(way, size / shards) for size in (gradients, parameters))
        return seconds


def row_devices(plan: Plan, cluster: Cluster) -> tuple[Device, ...]:
    """Return the device of every row of the plan's program, of a group its first."""
    by_name = {device.name: device for device in cluster.take(len(plan.device_names)).devices}
    return tuple(by_name[group[0]] for group in plan.groups)


def holders(plan: Plan) -> list[tuple[int, ...]]:
    """Return the rows that hold each stage: those that reduce its gradients together."""
    found: list[list[int]] = [[] for _ in plan.stages]
    for row, held in enumerate(plan.stages_of):
        for stage in held:
            found[stage].append(row)
    return [tuple(rows) for rows in found]


def host_way(cluster: Cluster, device: str) -> tuple[int, ...]:
    """Return the link from a device to its host's memory.

    Raises `PlanError` (exit 5) where there is none: a CPU's memory is its host's already.
    """
    ways = _host_ways(cluster)
    host, way = ways.get(device, ("its host", ()))
    if not way:
        raise PlanError(
            what=f"{device} has no link to its host's memory",
            where=f"cluster '{cluster.name}'",
            why="swapping, a host's optimizer and central storage copy between a device and its host",
            fix=f'add a [[links]] entry with between = ["{device}", "{host}"], or plan without them',
            code=DEVICE,
        )
    return way


def _host_ways(cluster: Cluster) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every device's host, and the link to it where there is one; kept with the cluster."""
    if "host ways" not in cluster.tables:
        links = {frozenset(link.between): (i,) for i, link in reversed(list(enumerate(cluster.links)))}
        cluster.tables["host ways"] = {
            d.name: (d.host, links.get(frozenset((d.name, d.host)), ())) for d in cluster.devices
        }
    return cast("dict[str, tuple[str, tuple[int, ...]]]", cluster.tables["host ways"])
