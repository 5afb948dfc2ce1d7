"""A plan: which layers form which stage, on which devices, under which schedule. A value that a person can edit.

It knows no costs. `planner.programs.lowering` turns it into a program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec

from planner.basis.errors import ARTEFACT, PlanError
from planner.orders import schedules, synchronisation
from planner.orders.edges import Edges, chain
from planner.orders.schedules import Schedule
from planner.orders.synchronisation import USUAL
from planner.values import holding

STEADY_WINDOWS, LONG_WINDOW = 3, 64
"""Steps of an asynchronous plan that are unrolled beyond those that fill and drain its pipeline; one is enough where it
has so many times more micro-batches than stages."""
SETTLING_TURNS, STEADY_TURNS, LONG_TURNS = 2, 6, 8
"""Where replicas take turns: turns of all of them until each turn is like those before, and turns to see that by; of
the latter at most so many micro-batches as this many times the devices."""


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of consecutive layers, by name, and the devices that hold it.

    Replica by replica; within a replica the devices that split the stage's tensors, and for a schedule that keeps two
    copies of every stage (Chimera) one such group per copy.
    """

    layers: tuple[str, ...]
    devices: tuple[str, ...]


class RowRole(NamedTuple):
    """What a row of a program is there for: the stages that it holds, and whether it serves parameters to others."""

    stages: tuple[int, ...]
    serves: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """How one step is trained.

    `microbatches` (M) counts the whole step: with R replicas each takes M / R of them. `batch` is samples per step,
    so a micro-batch has `batch / microbatches`. `sequence` is how many tokens a sample has, where samples are sequences
    of tokens, 0 elsewhere. `threads` are each device's.

    `chunks` (v) is the number of stages per device, `tensor` the number of devices over which each stage's tensors are
    split. `synchronisation` says how replicas agree on parameters (`planner.orders.synchronisation`); `servers` are the
    devices or hosts that keep the parameters where it needs them. Gradients are reduced in buckets of `bucket_bytes`
    as they become ready, 0 meaning all at once. `tied` are groups of stages that share a parameter. With `norm` all
    agree on all gradients' norm before they update: the model clips it, or leaves out what overflows (float16).

    Memory savings: with `recompute` a stage keeps only its inputs and outputs between forward and backward,
    `recompute_layers` forgets single layers, `recompute_blocks` runs of layers, each given by its first and its last:
    every one is a checkpoint of its own, whose forward is repeated in one go before its backward. `offload` swaps saved
    activations to the host and back; `host_optimizer` keeps the optimizer's state on the host and updates there.

    `stage_seconds` are forward, backward-input and backward-weight of each stage per micro-batch, kept with the plan
    when its schedule orders by them, so that a plan alone says what is run.

    `mark` ends the plan's name, where others that it was compared with have the same numbers. `str(plan)` is safe as a
    file name:

    >>> stage = Stage(layers=("a",), devices=("d0",))
    >>> str(Plan(strategy="gpipe", schedule="gpipe", stages=(stage,), microbatches=32, batch=64, recompute=True))
    'gpipe-k1-m32-recompute'
    """

    strategy: str
    schedule: str
    stages: tuple[Stage, ...]
    microbatches: int
    batch: int
    sequence: int = 0
    chunks: int = 1
    tensor: int = 1
    synchronisation: str = USUAL
    servers: tuple[str, ...] = ()
    bucket_bytes: int = 0
    tied: tuple[tuple[int, ...], ...] = ()
    norm: bool = False
    recompute: bool = False
    recompute_layers: tuple[str, ...] = ()
    recompute_blocks: tuple[tuple[str, str], ...] = ()
    offload: bool = False
    host_optimizer: bool = False
    stage_seconds: tuple[tuple[float, float, float], ...] = ()
    threads: int = 1
    mark: str = ""

    def __post_init__(self) -> None:
        if not self.stages or any(not stage.layers or not stage.devices for stage in self.stages):
            raise ValueError("stages: every stage needs layers and devices")
        if min(self.microbatches, self.batch, self.threads, self.chunks, self.tensor) < 1:
            raise ValueError("microbatches, batch, threads, chunks and tensor must be positive")
        if self.sequence < 0:
            raise ValueError(f"sequence: {self.sequence} is below 0, which means that samples are no sequences")
        if len(self.stages) % self.chunks:
            raise ValueError(f"chunks: {len(self.stages)} stages cannot be dealt {self.chunks} to each device")
        if any(len(stage.devices) % (self.tensor * self._schedule.copies) for stage in self.stages):
            raise ValueError(f"stages: devices come in groups of {self.tensor * self._schedule.copies} per replica")
        if self.uneven and (self.chunks > 1 or self._schedule.copies > 1):
            raise ValueError("stages: only plain pipelines can have different numbers of devices per stage")
        entangled = _entangled(self)
        if entangled is not None:
            raise ValueError(f"synchronisation: {entangled}")
        if synchronisation.get(self.synchronisation).server and not self.servers and self.replicas > 1:
            raise ValueError(f"servers: {self.synchronisation} needs devices or hosts that keep the parameters")
        if not self._dealt.once:
            raise ValueError("stages: a device holds more than its share of the stages")
        strangers = set(self.servers) - set(self.device_names)
        if synchronisation.get(self.synchronisation).server == "devices" and strangers:
            raise ValueError(f"servers: {', '.join(sorted(strangers))}: not a device of the plan")
        if self.bucket_bytes < 0:
            raise ValueError(f"bucket_bytes: {self.bucket_bytes} is below 0, which means all at once")
        chosen = (self.recompute, self.recompute_layers, self.recompute_blocks)
        if sum(map(bool, chosen)) > 1:
            raise ValueError("recompute: a plan recomputes whole stages, or blocks, or layers")
        if self.batch % self.microbatches:
            raise ValueError(f"microbatches: {self.microbatches} do not divide a batch of {self.batch}")
        if not self.uneven and self.microbatches % self.replicas:
            raise ValueError(f"microbatches: {self.microbatches} cannot be dealt to {self.replicas} replicas")

    def __str__(self) -> str:
        parts = [self.strategy, f"k{len(self.device_names)}", f"m{self.microbatches}"]
        if self.chunks > 1 and self._schedule.chunks[1] is None:
            parts.append(f"v{self.chunks}")
        if self.tensor > 1:
            parts.append(f"t{self.tensor}")
        if self.uneven:
            parts.append("r" + ".".join(str(len(s.devices) // self.tensor) for s in self.stages))
        elif self.replicas > 1 and len(self.stages) > 1:
            parts.append(f"r{self.replicas}")
        if self.synchronisation not in (USUAL, *parts):
            parts.append(self.synchronisation)
        parts += [name for name in ("recompute", "offload") if getattr(self, name)]
        if self.recompute_layers:
            parts.append(f"recompute{len(self.recompute_layers)}")
        if self.recompute_blocks:
            parts.append("recompute-blocks")
        if self.host_optimizer:
            parts.append("host")
        if self.mark:
            parts.append(self.mark)
        return "-".join(parts)

    @functools.cached_property
    def _schedule(self) -> Schedule:
        return schedules.get(self.schedule)

    @functools.cached_property
    def uneven(self) -> bool:
        """Whether stages have different numbers of replicas."""
        return len({len(stage.devices) for stage in self.stages}) > 1

    @property
    def depth(self) -> int:
        """Devices (or tensor groups) of one pipeline."""
        return len(self.stages) // self.chunks

    @functools.cached_property
    def replicas(self) -> int:
        """Copies of the pipeline, each with its share of the micro-batches; the most of any stage where uneven."""
        return max(len(stage.devices) for stage in self.stages) // (self.tensor * self._schedule.copies)

    @property
    def pipelines(self) -> int:
        """How many whole pipelines there are: one where stages have different numbers of replicas."""
        return 1 if self.uneven else self.replicas

    @functools.cached_property
    def turns(self) -> tuple[int, ...]:
        """How many replicas of each stage take micro-batches in turn: of whole pipelines each has its own."""
        if not self.uneven:
            return (1,) * len(self.stages)
        return tuple(len(stage.devices) // self.tensor for stage in self.stages)

    def versions(self, stage: int) -> int:
        """Return how many versions of its parameters every holder of a stage keeps."""
        return self._schedule.versions(stage, self.turns)

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The devices behind each row of the program: one, or as many as split its tensors.

        Replica by replica, device by device of the pipeline; stage by stage where replicas are uneven.
        Raises `ValueError` when a device's stages are not those that the schedule places there.
        """
        return self._dealt.groups

    @functools.cached_property
    def _dealt(self) -> holding.Dealt:
        own = tuple(stage.devices for stage in self.stages)
        return holding.dealt(self.schedule, own, self.depth, self.tensor, self.uneven)

    def _cut(self, stage: Stage) -> list[tuple[str, ...]]:
        return holding.in_groups(stage.devices, self.tensor)

    @property
    def devices(self) -> tuple[str, ...]:
        """A name for every row of the program: its device, or the first and the last of its group."""
        return tuple(group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in self.groups)

    @functools.cached_property
    def device_names(self) -> tuple[str, ...]:
        """All devices, group by group."""
        return self._dealt.names

    @property
    def samples(self) -> int:
        """Samples per micro-batch."""
        return self.batch // self.microbatches

    @property
    def units(self) -> int:
        """What a step trains on: tokens where samples are sequences of them, else samples."""
        return self.batch * max(1, self.sequence)

    @property
    def recomputes(self) -> bool:
        """Whether any layer's forward is repeated."""
        return self.recompute or bool(self.recompute_layers) or bool(self.recompute_blocks)

    def without_recompute(self) -> Plan:
        """Return the plan with everything kept from forward to backward."""
        return msgspec.structs.replace(self, recompute=False, recompute_layers=(), recompute_blocks=())

    def checkpoints(self, stage: int) -> tuple[range, ...]:
        """Return a stage's checkpoints: runs of its layers (by their place in it) that are repeated in one go.

        All layers of a stage are one; or each chosen layer is its own, neighbours too, as users of torch's checkpoint
        wrap modules; or each block is, as far as it lies in the stage.
        """
        layers = self.stages[stage].layers
        if self.recompute:
            return (range(len(layers)),)
        chosen = {name: i for i, name in enumerate(layers)}
        alone = tuple(range(chosen[n], chosen[n] + 1) for n in self.recompute_layers if n in chosen)
        return tuple(sorted(alone, key=lambda run: run.start)) + self._blocks_of(stage)

    @functools.cached_property
    def blocks(self) -> tuple[range, ...]:
        """The blocks that are recomputed, as places in the model; those of other models are left out."""
        places = {name: i for i, name in enumerate(name for stage in self.stages for name in stage.layers)}
        known = [(places[a], places[b] + 1) for a, b in self.recompute_blocks if a in places and b in places]
        return tuple(range(first, stop) for first, stop in known)

    def _blocks_of(self, stage: int) -> tuple[range, ...]:
        begin, stop = self._extents[stage]
        inside = ((max(run.start, begin) - begin, min(run.stop, stop) - begin) for run in self.blocks)
        return tuple(range(a, b) for a, b in inside if a < b)

    @functools.cached_property
    def _extents(self) -> tuple[tuple[int, int], ...]:
        """Where each stage begins and ends in the model."""
        ends = tuple(accumulate(len(stage.layers) for stage in self.stages))
        return tuple((end - len(stage.layers), end) for stage, end in zip(self.stages, ends, strict=True))

    def loaded(self, stage: int) -> int:
        """Samples that each holder of a stage loads per step: those of its own micro-batches, not the whole batch."""
        return self.samples * -(-self.microbatches // len(self.holders[stage]))

    @functools.cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """Stages that every row holds."""
        if not self.uneven and self._schedule.copies == 1:
            first: list[list[int]] = [[] for _ in range(self.depth)]
            for s in range(len(self.stages)):
                first[self._schedule.homes(s, self.depth)[0]].append(s)
            return tuple(map(tuple, first)) * self.replicas
        rows = {group: row for row, group in enumerate(self.groups)}
        held: list[list[int]] = [[] for _ in self.groups]
        for s, stage in enumerate(self.stages):
            for group in self._cut(stage):
                held[rows[group]].append(s)
        return tuple(map(tuple, held))

    @functools.cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Rows that hold each stage: those that reduce its gradients together."""
        return holding.holders(self.stages_of, len(self.stages))

    @property
    def agrees_on_norm(self) -> bool:
        """Whether devices have to agree on the norm of all gradients: none of them has all of it."""
        shards = synchronisation.get(self.synchronisation).shards
        return self.norm and (
            bool(shards) or self.tensor > 1 or any(len(own) < len(self.stages) for own in self.stages_of)
        )

    @property
    def edges(self) -> Edges:
        """Who sends what to whom: every stage to the next."""
        return chain(len(self.stages))

    @functools.cached_property
    def roles(self) -> tuple[RowRole, ...]:
        """What every row is there for."""
        servers = set(self.servers)
        return tuple(
            RowRole(held, not servers.isdisjoint(group))
            for held, group in zip(self.stages_of, self.groups, strict=True)
        )

    def layer_ranges(self, layers: Sequence[str]) -> tuple[range, ...]:
        """Return each stage's layers as indices into `layers`.

        Raises `PlanError` (exit 4) unless the stages are exactly those layers in that order.
        """
        mine = [name for stage in self.stages for name in stage.layers]
        if mine != list(layers):
            odd = next((m for m, n in zip(mine, layers, strict=False) if m != n), f"{len(mine)} layers")
            raise PlanError(
                what="the plan is for another model",
                where=f"plan {self}, layer '{odd}'",
                why=f"the profile's layers are {', '.join(layers)}",
                fix="plan simulate   (plans the model of the profile)",
                code=ARTEFACT,
            )
        ends = accumulate(len(stage.layers) for stage in self.stages)
        return tuple(range(end - len(stage.layers), end) for stage, end in zip(self.stages, ends, strict=True))


def windows(plan: Plan) -> int:
    """Return how many steps are unrolled: one, or for asynchronous plans enough to fill the pipeline and go on."""
    return full(plan).stop + _filling(plan)


def full(plan: Plan) -> range:
    """Return which of the unrolled steps neither fill nor drain the pipeline.

    Replicas that take turns need some turns of all of them until every turn is like the last, and it takes some more to
    see what a turn takes (`planner.simulate.steady`): so many steps as have these.
    """
    if not asynchronous(plan):
        return range(1)
    begin, steady = _filling(plan), 1 if plan.microbatches >= LONG_WINDOW * plan.depth else STEADY_WINDOWS
    turn, most = whole_turn(plan), LONG_TURNS * len(plan.groups)
    if turn > 1:
        begin += math.ceil(min(SETTLING_TURNS * turn, most) / plan.microbatches)
        seen = min(STEADY_TURNS, max(1, most // turn)) * turn
        steady = max(steady, math.ceil(min(seen, most) / plan.microbatches))
    return range(begin, begin + steady)


def whole_turn(plan: Plan) -> int:
    """Return after how many micro-batches all replicas of all stages begin again; 1 where they do not take turns.

    They do where stages have different numbers of them and parameters change with every micro-batch.
    """
    served = synchronisation.get(plan.synchronisation).server
    each = schedules.get(plan.schedule).updates == "microbatch" and not served
    return math.lcm(*plan.turns) if each else 1


def _filling(plan: Plan) -> int:
    """Return how many steps fill the pipeline of an asynchronous plan, and drain it; 0 for others.

    Workers of a server that begin together need a step more until they come one after the other.
    """
    if not asynchronous(plan):
        return 0
    schedule, spread = schedules.get(plan.schedule), bool(synchronisation.get(plan.synchronisation).server)
    # As many micro-batches as there are stages fill a pipeline; of replicas that take turns as many as there are, and a
    # turn besides until all of them have updated.
    turn = plan.replicas if plan.uneven else int(plan.replicas > 1)
    filling = (len(plan.groups) if plan.uneven else plan.depth) + (turn if schedule.updates == "microbatch" else 0)
    alone = plan.uneven or not schedule.asynchronous
    share = plan.microbatches if alone else plan.microbatches // plan.replicas
    return math.ceil(filling / share) + spread


def actions(plan: Plan) -> int:
    """Return about how many actions a plan's program has: a compute, a send and a receive, each way."""
    return 6 * len(plan.stages) * plan.microbatches * windows(plan)


def asynchronous(plan: Plan) -> bool:
    """Whether steps overlap: no flush, or a parameter server that nobody waits for."""
    return schedules.get(plan.schedule).asynchronous or synchronisation.get(plan.synchronisation).asynchronous


def _entangled(plan: Plan) -> str | None:
    """Return why replicas of a stage that take turns cannot agree as a plan has it, or None where they can.

    In an agreement within the step one replica waits until another has had a later micro-batch. Where the order of
    messages does not know of that, they wait for each other for ever. It knows of reductions beside computing.
    """
    agreed, each = synchronisation.get(plan.synchronisation), schedules.get(plan.schedule).updates == "microbatch"
    if not plan.uneven:
        return None
    if each and agreed.shards:
        does, others = "gathers parameters for every micro-batch", "all-reduce"
    elif "gradients" in agreed.shards:
        does, others = "reduces gradients after every micro-batch", "all-reduce or zero-1"
    else:
        return None
    return (
        f"{agreed.name} {does}, and replicas that take micro-batches in turn would wait for each other for ever; "
        f"choose {others}, or give every stage as many devices"
    )


def shares_without_flush(plan: Plan) -> str | None:
    """Return why stages of a plan cannot share parameters, or None where they can or do not.

    A shared parameter's gradient is there when all its stages have had a micro-batch. Without a flush each stage
    updates as soon as it has its own, long before the first stage has.
    """
    if not (plan.tied and schedules.get(plan.schedule).asynchronous):
        return None
    names = [f"stages {' and '.join(map(str, group))}" for group in plan.tied]
    return (
        f"{', '.join(names)} share parameters, and without a flush ({plan.schedule}) each updates before it has the "
        f"others' gradients"
    )


def norm_without_flush(plan: Plan) -> str | None:
    """Return why the gradients of a plan have no common norm, or None where they have, or none is needed."""
    if not plan.norm:
        return None
    served = synchronisation.get(plan.synchronisation).server
    if asynchronous(plan) or schedules.get(plan.schedule).updates == "microbatch":
        why = "without a flush each stage updates by itself"
    elif served:
        why = "servers update as gradients come in"
    else:
        return None
    return f"all gradients are clipped together, or looked through for what overflows, and {why}"
