"""What each kind of action and of transfer of a plan costs on a cluster: seconds and bytes, asked for once per kind."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import NamedTuple

import numpy as np

from planner.basis.memo import memoised
from planner.costs import collectives
from planner.costs.flows import Flow, carrying, latency, together
from planner.costs.placed import Placed
from planner.costs.stage_costs import MEDIAN, QUANTILES, Spread, StageCosts, at, layer_table
from planner.costs.stage_memory import of_stage
from planner.orders.edges import Edges
from planner.orders.operations import (
    FETCH,
    LOAD,
    NORM_GRAD,
    OFFLOAD,
    OPERATIONS,
    OPTIMIZER,
    PULL,
    PUSH,
    REDUCE_ASYNC,
    REDUCE_NORM,
    REDUCE_TIED,
    REDUCTIONS,
    UNSHARD_FORWARD,
)
from planner.programs.waits import MESSAGES
from planner.values.blocks import blocks
from planner.values.cluster import by_size
from planner.values.holding import replicas_of
from planner.values.profile import Profile
from planner.values.routes import Path

BY_DEVICE = tuple(op for op, operation in OPERATIONS.items() if operation.group in ("pair", "tied", "host", "server"))
"""Transfers whose price depends on whose they are: each device has its own way to the host or to a server, and each
replica of the pipeline its own devices."""


NORM_BYTES = 16.0
"""Of the square of a norm, and of whether anything overflows, in float64 (`executor.norm`)."""

MANY = 4096
"""Pairs of workers and servers whose flows are added up; beyond, only what links carry is known of them."""


class TransferKind(NamedTuple):
    """Transfers that cost the same: which, between which devices, how much.

    `seconds` until it is done when it has its links for itself; `work` the core seconds it takes from each end's host;
    `flows` its bytes on the links: they run at the same time, and it is done when all are.

    What a device hands to one engine (its network, a copy engine each way) is done in turn: `lane` numbers it, -1 for
    none, and `busy` is how long the transfer keeps it. Of a reduction that overlaps a backward, `early` seconds
    of that lie before its begin; a gather that overlaps a forward keeps its lane after its `seconds`.

    `at_once` is how long it takes when all workers of a server do the same together, as they do where each waits for
    all: the interpreter in which transfers do not meet counts with that.

    A message has the number of its `edge`; its `stage` is the one that receives it.
    """

    op: str
    stage: int
    source: int
    target: int
    bytes: float
    seconds: float
    work: float
    flows: tuple[Flow, ...]
    lane: int = -1
    busy: float = 0.0
    early: float = 0.0
    at_once: float = 0.0
    edge: int = -1


class PriceList:
    """Prices of one plan's operations, asked for once per kind."""

    def __init__(self, placed: Placed, edges: Edges | None = None) -> None:
        self.placed, self.edges = placed, placed.plan.edges if edges is None else edges
        self.profile, self.plan, self.cluster = placed.profile, placed.plan, placed.cluster
        self.ranges, self.holders, self.devices = placed.ranges, placed.holders, placed.devices
        self.groups, self.agreed, self.overlaps = placed.plan.groups, placed.synchronisation, placed.overlaps
        self.stages: dict[tuple[int, float], StageCosts] = {}
        self.seen = cache(placed.seen)
        self.tables: dict[object, object] = {}
        self.choices: dict[tuple[tuple[int, ...], int], collectives.Choice] = {}

    def sort(self, row: int) -> object:
        """All of a row's devices that the seconds of its actions follow from: rows of one sort take as long."""
        speeds, linked = self._speeds(row), len(self._fed(row))
        return (speeds, linked, self.copies_look(row)) if linked else speeds

    def _speeds(self, row: int) -> frozenset[tuple[float, int]]:
        return frozenset((device.speed, device.threads) for device in self.placed.members[row])

    def action(self, op: str, stage: int, row: int, port: int = 0) -> Spread:
        """Seconds that an action keeps a row from computing, at every quantile: of a group its slowest device."""
        if op == LOAD:
            made = [at(self.profile.load, self.plan.loaded(stage), quantile) for quantile in QUANTILES]
            return np.array(made) + self.brought(stage, row)
        if OPERATIONS[op].side:
            size = self.message_bytes(OPERATIONS[op].posts, self.edges.number(op, stage, port))
            return np.full(len(QUANTILES), self.cluster.post_seconds(size))
        if op == REDUCE_ASYNC and not self.overlaps:  # what is sent beside computing needs the cores that compute
            return np.full(len(QUANTILES), self._reduced(op, stage).busy)
        each = [self._costs(stage, speed).spread(op, threads) / speed for speed, threads in self._speeds(row)]
        seconds: Spread = np.maximum.reduce(each)
        if op in (OPTIMIZER, NORM_GRAD):
            if "optimizer" in self.agreed.shards:
                seconds = seconds / len(self.holders[stage])
            if op == OPTIMIZER and self.plan.host_optimizer:
                seconds = np.full(len(QUANTILES), self.on_host(stage, row))
        return seconds

    def _costs(self, stage: int, speed: float) -> StageCosts:
        """A stage's costs as a device of a speed sees them, before they are divided by it."""
        if (stage, speed) not in self.stages:
            own, runs = self.seen(speed), self.placed.checkpoints[stage]
            self.stages[stage, speed] = StageCosts(own, self.ranges[stage], self.plan.samples, runs)
        return self.stages[stage, speed]

    def message_bytes(self, op: str, edge: int) -> float:
        """Bytes of the messages that a receive `op` takes along an edge, by its number."""
        return self.placed.edge_bytes(self.edges[edge], gradients=OPERATIONS[op].side == "leaving")

    def transfer(self, op: str, number: int, source: int, target: int) -> TransferKind:
        """Price one kind of transfer, of a stage's number, or of a message of an edge's."""
        if op in MESSAGES:
            stage, _ = self.edges.place(op, number)
            size = self.message_bytes(op, number)
            # Each of the devices that split a stage's tensors has all of its activations, and sends them to its like.
            pairs = zip(self.groups[source], self.groups[target], strict=True)
            flows = tuple(Flow(self.cluster.path(*pair), size) for pair in pairs)
            seconds = together(self.cluster, flows)
            work = by_size(self.cluster.transfer_work, size) if self.cluster.transfer_work else 0.0
            return TransferKind(op, stage, source, target, size, seconds, work, flows, edge=number)
        stage = number
        if op in (OFFLOAD, FETCH):
            size = of_stage(self.placed, stage).kept
            flows, seconds = self.copied(source, size, back=op == FETCH)
            lane = 3 * source + (1 if op == OFFLOAD else 2)
            return TransferKind(op, stage, source, source, size, seconds, 0.0, flows, lane, seconds)
        if op in (PULL, PUSH):
            return self._served(op, stage, source)
        if op == REDUCE_NORM:
            return self._agreed_norm()
        return self._added_up(stage, source) if op == REDUCE_TIED else self._collective(op, stage)

    def again(self, kind: TransferKind, source: int, target: int) -> TransferKind:
        """Price the same transfer between other devices."""
        return self.transfer(kind.op, kind.stage if kind.edge < 0 else kind.edge, source, target)

    def _collective(self, op: str, stage: int) -> TransferKind:
        if op in REDUCTIONS:
            found = self._reduced(op, stage)
            beside = op == REDUCE_ASYNC and not self.overlaps
            return found._replace(seconds=0.0, busy=0.0, early=0.0, flows=()) if beside else found
        sizes, needed = self._gathered(stage, forward=op == UNSHARD_FORWARD)
        sizes = [self._scaled(size) for size in sizes]
        choice = self._among(self.holders[stage], collectives.HALF)
        each = [choice.seconds(size) for size in sizes]
        return self._in_turn(op, stage, choice, sizes, collectives.lead(needed, each))

    def _reduced(self, op: str, stage: int) -> TransferKind:
        """A reduction of a stage's gradients, most of which may lie before its post: buckets fill in the backward."""
        choice = self._among(self.holders[stage], collectives.HALF if self.agreed.shards else collectives.ALL_REDUCE)
        sizes, ready, end = self._buckets(stage)
        sizes = [self._scaled(size) for size in sizes]
        seconds = collectives.tail(ready, [choice.seconds(size) for size in sizes], end)
        found = self._in_turn(op, stage, choice, sizes, seconds)
        return found._replace(early=found.busy - seconds)

    def _in_turn(
        self, op: str, stage: int, choice: collectives.Choice, sizes: list[float], seconds: float
    ) -> TransferKind:
        """A collective that the stage's first holder does in turn with its others."""
        size, busy = sum(sizes), sum(choice.seconds(each) for each in sizes)
        lane = 3 * self.holders[stage][0] if choice.groups else -1
        flows = choice.flows(size, calls=len(sizes))
        return TransferKind(op, stage, -1, -1, size, seconds, 0.0, flows, lane, busy)

    def _added_up(self, stage: int, source: int) -> TransferKind:
        """An all-reduce of shared parameters' gradients among one replica's rows: those whose stages have them."""
        group = next(group for group in self.plan.tied if group[0] == stage)
        replicas = replicas_of(self.holders, len(self.groups))
        every = dict.fromkeys(row for s in group for row in self.holders[s])
        rows = tuple(row for row in every if replicas[row] == replicas[source])
        choice, size = self._among(rows, collectives.ALL_REDUCE), self.tied_bytes(group)
        seconds, lane = choice.seconds(size), 3 * rows[0] if choice.groups else -1
        return TransferKind(REDUCE_TIED, stage, source, source, size, seconds, 0.0, choice.flows(size), lane, seconds)

    def _agreed_norm(self) -> TransferKind:
        """An all-reduce of two numbers among all devices: it takes latencies, and loads no link."""
        every = tuple(name for group in self.groups for name in group)
        seconds = collectives.over(self.cluster, (every,), collectives.ALL_REDUCE).seconds(NORM_BYTES)
        return TransferKind(REDUCE_NORM, 0, -1, -1, NORM_BYTES, seconds, 0.0, ())

    def _among(self, rows: tuple[int, ...], passes: int) -> collectives.Choice:
        """What these rows can do together: of devices that split tensors each with its like, all at the same time."""
        if (rows, passes) not in self.choices:
            groups = tuple(zip(*(self.groups[row] for row in rows), strict=True))
            self.choices[rows, passes] = collectives.over(self.cluster, groups, passes)
        return self.choices[rows, passes]

    def _buckets(self, stage: int) -> tuple[list[float], list[float], float]:
        """The bytes that a stage reduces at once, when in its last backward they are ready, and when that ends.

        Gradients become ready from the last layer to the first, one that several layers share with the first of them.
        DDP reduces them in buckets as they fill, sharded gradients are reduced block by block; where nothing overlaps,
        all at the end.
        """
        layers = self.ranges[stage]
        each = self.profile.held_bytes(layers, "gradient_bytes", first=True)
        sharded = "gradients" in self.agreed.shards
        if not self.overlaps or not (self.plan.bucket_bytes or sharded):
            return [sum(each)], [0.0], 0.0
        done = [*self._reached(stage, forward=False)[1:], self._pass_seconds(stage)]
        starts = {block.start for block in blocks(self.profile, layers)}
        sizes, ready, full = [0.0], [0.0], False
        for layer, size, end in zip(reversed(layers), reversed(each), done, strict=True):
            if full:
                sizes.append(0.0)
                ready.append(end)
            sizes[-1] += size
            ready[-1] = end
            full = layer in starts if sharded else sizes[-1] >= self.plan.bucket_bytes
        return sizes, ready, self._pass_seconds(stage)

    def _gathered(self, stage: int, *, forward: bool) -> tuple[list[float], list[float]]:
        """The bytes of parameters that a stage gathers at once, and when in a pass they are needed.

        Sharded parameters are gathered block by block before they are used; after a sharded update, and where
        nothing overlaps, all at once.
        """
        layers = self.ranges[stage]
        each = self.profile.held_bytes(layers, "parameter_bytes", first=forward)
        if "parameters" not in self.agreed.shards:
            return [sum(each)], [0.0]
        own = blocks(self.profile, layers)
        sizes = [sum(each[i - layers.start] for i in block) for block in own]
        if not self.overlaps:
            return sizes, [0.0] * len(sizes)
        reached = self._reached(stage, forward=forward)
        if forward:
            return sizes, [reached[block.start - layers.start] for block in own]
        return sizes[::-1], [reached[layers.stop - block.stop] for block in reversed(own)]

    @property
    def _splits(self) -> bool:
        return self.placed.schedule.splits

    def _reached(self, stage: int, *, forward: bool) -> list[float]:
        """Seconds after a pass's begin at which it reaches each of the stage's layers, in its own direction."""
        layers, sums = self.ranges[stage], self._sums(stage, forward=forward)
        reached = sums[layers.start : layers.stop]
        if forward:
            return [float(r) for r in reached - reached[0]]
        ends = sums[layers.start + 1 : layers.stop + 1]
        return [float(e) for e in (ends[-1] - ends)[::-1]]

    def _pass_seconds(self, stage: int) -> float:
        """Seconds of the backward, or of its half, that gradients become ready in."""
        layers, sums = self.ranges[stage], self._sums(stage, forward=False)
        return float(sums[layers.stop] - sums[layers.start])

    def _sums(self, stage: int, *, forward: bool) -> Spread:
        """Seconds of a pass up to each layer, on the slowest of a stage's devices."""
        speed = min(self.devices[row].speed for row in self.holders[stage])
        table = layer_table(self.seen(speed), self.plan.samples, self.plan.threads)
        sums = table.forward if forward else table.backward_weight if self._splits else table.backward
        own: Spread = sums[MEDIAN] / speed
        return own

    def tied_bytes(self, group: tuple[int, ...]) -> float:
        """Bytes of the parameters that a group of stages shares: at most those of the smallest layer that has them."""
        homes = {self.profile.layers[i].name: s for s, layers in enumerate(self.ranges) for i in layers}
        size = {layer.name: layer.gradient_bytes for layer in self.profile.layers}
        shared = [names for _, *names in self.profile.tied if {homes[n] for n in names} == set(group)]
        return self._scaled(sum(min(size[name] for name in names) for names in shared))

    def reduced_bytes(self, stage: int) -> list[float]:
        """Bytes of each of the collectives in which a stage's holders reduce its gradients."""
        return [self._scaled(size) for size in self._buckets(stage)[0]]

    def gathered_bytes(self, stage: int) -> list[float]:
        """Bytes of each of the collectives in which a stage's holders gather its parameters for a forward."""
        return [self._scaled(size) for size in self._gathered(stage, forward=True)[0]]

    def _scaled(self, size: float) -> float:
        """Bytes of a message or collective that carries so many."""
        return self.cluster.message_scale * size

    def _served(self, op: str, stage: int, row: int) -> TransferKind:
        """A pull or push: every server's shard at the same time.

        Whatever a device sends or receives at the same time passes its port, whether or not its links are shared: a
        worker's from all servers, and a server's for all workers. There one message goes after the other, and each has
        its own latency, as each round of a ring has.
        """
        size = sum(self.profile.held_bytes(self.ranges[stage], "parameter_bytes" if op == PULL else "gradient_bytes"))
        if self.agreed.server == "host":
            flows, seconds = self.copied(row, size, back=op == PULL)
            return TransferKind(op, stage, row, row, size, seconds, 0.0, flows)
        each = self._scaled(size) / max(1, len(self.plan.servers))
        ends = self._ends(op, row)
        if not ends:
            return TransferKind(op, stage, row, row, size, 0.0, 0.0, ())
        flows, waiting = self._flows(ends, each), self._latencies(op, stage, row)
        alone = (self.cluster.transfer_seconds(path, each) - self._latency(path) for path in self._paths(ends))
        seconds = waiting + max((*alone, carrying(self.cluster, flows)))
        at_once = (
            self._all_served(op, stage, each, latency(self.cluster, flows, seconds))
            if not self.agreed.asynchronous
            else 0.0
        )
        return TransferKind(op, stage, row, row, size, seconds, 0.0, flows, at_once=at_once)

    def _ends(self, op: str, row: int) -> list[tuple[str, str]]:
        """The source and the target of each of a worker's flows: each of its devices has its own shard already."""
        pairs = [(mine, name) for mine in self.groups[row] for name in self.plan.servers if name != mine]
        return [(name, mine) if op == PULL else (mine, name) for mine, name in pairs]

    def _flows(self, ends: list[tuple[str, str]], size: float) -> tuple[Flow, ...]:
        """Flows of so many bytes between devices that talk to many others at the same time."""
        return tuple(Flow(self.cluster.through_ports(self.cluster.path(*pair), *pair), size) for pair in ends)

    def _paths(self, ends: list[tuple[str, str]]) -> list[Path]:
        return [self.cluster.path(*pair) for pair in ends]

    def _latency(self, path: Path) -> float:
        return self.cluster.transfer_seconds(path, 0.0)

    def _latencies(self, op: str, stage: int, row: int) -> float:
        """Latencies of the messages that pass one link of a worker's, or of a server's of its, one after the other.

        Where workers wait for each other a server's are those of all of them: the worker that is last waits for each.
        """
        server, worker = (0, -1) if op == PULL else (-1, 0)
        paths = self._paths(self._ends(op, row))
        own = self._in_a_row(paths, worker)
        if self.agreed.asynchronous or len(self.plan.servers) * len(self.holders[stage]) > MANY:
            return max(own.values())

        def everybody() -> dict[int, float]:
            every = [path for other in self.holders[stage] for path in self._paths(self._ends(op, other))]
            return self._in_a_row(every, server)

        served = memoised(self, ("messages of servers", op, stage), everybody)
        return max(*own.values(), *(served[path[server]] for path in paths))

    def _in_a_row(self, paths: list[Path], end: int) -> dict[int, float]:
        """The latencies of all messages that pass each link at one end of their paths."""
        found: dict[int, float] = defaultdict(float)
        for path in paths:
            found[path[end]] += self._latency(path)
        return found

    def _all_served(self, op: str, stage: int, each: float, waiting: float) -> float:
        """Seconds until workers that are alike, so that they begin together, all have what they pull, or have pushed.

        Not known (0) where they do not begin together, or are so many that adding up their flows would take long.
        """
        workers = [row for row in self.holders[stage] if self._ends(op, row)]
        equal = self.placed.even and len(set(map(self.placed.served, workers))) == 1
        if not equal or self.placed.schedule.copies > 1 or len(self.plan.servers) * len(workers) > MANY:
            return 0.0
        ends = [pair for row in workers for pair in self._ends(op, row)]
        return waiting + memoised(self, (op, stage), lambda: carrying(self.cluster, self._flows(ends, each)))

    def _host_path(self, device: str, *, back: bool = False) -> Path:
        """Return the links from a device to its host's memory, or back from there."""
        path = self.cluster.routes.to_host(device)
        return self.cluster.routes.back(path) if back else path

    def copied(self, row: int, size: float, *, back: bool = False) -> tuple[tuple[Flow, ...], float]:
        """Return the flows of copies from a row's devices to their hosts' memory, or back, and their seconds alone.

        All copies of a host's devices pass its memory. Devices that split tensors copy at the same time, and wait for
        the last: each has as many bytes.
        """
        flows = self.copying(row, size, back=back)
        paths = {self._copying(device, back=back)[0] for device in self.groups[row]}
        own = (self.cluster.transfer_seconds(path, size) for path in paths)
        return flows, max(*own, carrying(self.cluster, flows))

    def _fed(self, row: int) -> tuple[str, ...]:
        """A row's devices that have a memory apart from their host's: what they compute with is copied to them."""
        return tuple(name for name in self.groups[row] if self.cluster.routes.apart(name))

    def brought(self, stage: int, row: int) -> float:
        """Return the seconds in which a step's inputs and targets, as far as a stage needs them, come from the host.

        The first stage needs the inputs, the last the targets; each of the devices that split a stage's tensors all of
        them. Nothing where the device computes in the host's memory.
        """
        inputs, targets = self.profile.drawn_bytes(self.plan.loaded(stage))
        first, last = self.edges.ends(stage)
        size, fed = inputs * first + targets * last, self._fed(row)
        if not size or not fed:
            return 0.0
        ways = [self._copying(name, back=True) for name in fed]
        flows = tuple(Flow(through, size) for _, through in ways)
        return max(*(self.cluster.transfer_seconds(path, size) for path, _ in ways), carrying(self.cluster, flows))

    def copying(self, row: int, size: float, *, back: bool = False) -> tuple[Flow, ...]:
        """Return the flows of copies between a row's devices and their hosts' memory."""
        return tuple(Flow(self._copying(device, back=back)[1], size) for device in self.groups[row])

    def copies_look(self, row: int) -> object:
        """What a row's copies' seconds follow from: its paths' figures, and which of them meet on what."""
        paths = [self._copying(device, back=False) for device in self._fed(row)]
        numbers: dict[int, int] = {}
        met = tuple(tuple(numbers.setdefault(n, len(numbers)) for n in through) for _, through in paths)
        memories = tuple(self.cluster.bandwidths[through[-1]] for _, through in paths)
        return tuple(self.cluster.figures(path) for path, _ in paths), memories, met

    def _copying(self, device: str, *, back: bool) -> tuple[Path, Path]:
        """A copy's links, and these with its host's memory, kept with the cluster."""

        def make() -> tuple[Path, Path]:
            path = self._host_path(device, back=back)
            return path, (*path, self.cluster.memories[self.cluster.routes.host_of[device]])

        return memoised(self.cluster, ("copying", device, back), make)

    def applying(self, stage: int) -> float:
        """Seconds that the slowest server needs to update its shard of a stage; the host at its memory's speed.

        Servers have all that a stage's devices split between them.
        """
        servers = self.plan.servers
        if self.agreed.server == "host":
            _, _, moved = self._moved(self.placed.whole, stage)
            rates = {host.name: host.memory_bytes_per_s for host in self.cluster.hosts}
            return moved / len(servers) / min(rates[name] for name in servers)
        whole = StageCosts(self.placed.whole, self.ranges[stage], self.plan.samples)
        sorts = {(device.speed, device.threads) for device in self.cluster.devices if device.name in set(servers)}
        return max(float(whole.optimizer(threads)[MEDIAN]) / speed for speed, threads in sorts) / len(servers)

    def on_host(self, stage: int, row: int) -> float:
        """Seconds of an update on a row's host: gradients down, memory-bound arithmetic, parameters up.

        The update reads parameters, gradients and state and writes parameters and state (ZeRO-Offload, arXiv
        2101.06840, finds the CPU's Adam bound by memory). All of that passes the memory, which may be slower than the
        device's link. Devices that split tensors do each of these together, in step.
        """
        gradients, parameters, moved = self._updated(stage)
        arithmetic = carrying(self.cluster, self._memories(row, moved))
        return self.copied(row, gradients)[1] + arithmetic + self.copied(row, parameters, back=True)[1]

    def _memories(self, row: int, moved: float) -> tuple[Flow, ...]:
        """What a row's devices read and write of their hosts' memories, so much each."""
        return tuple(Flow(flow.path[-1:], moved) for flow in self.copying(row, moved))

    def updating(self, stage: int, row: int) -> tuple[Flow, ...]:
        """Return what an update of a stage on a row's host brings over its devices' links and through its memory."""
        gradients, parameters, moved = self._updated(stage)
        down, up = self.copying(row, gradients), self.copying(row, parameters, back=True)
        return (*down, *up, *self._memories(row, moved))

    def _updated(self, stage: int) -> tuple[float, float, float]:
        """Bytes of gradients and parameters that an update needs and makes, and what it reads and writes for that."""
        return memoised(self, ("updated", stage), lambda: self._moved(self.profile, stage))

    def _moved(self, profile: Profile, stage: int) -> tuple[float, float, float]:
        shards = len(self.holders[stage]) if "optimizer" in self.agreed.shards else 1
        parameters, gradients, state = (
            sum(profile.held_bytes(self.ranges[stage], field)) / shards
            for field in ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
        )
        return gradients, parameters, 2 * parameters + gradients + 2 * state
