"""A rank of a rehearsal: the same walk over the same program, with stages that wait instead of computing.

Processes, messages, collectives and the order of allocations are real; layers, batches and losses are not there. What
it waits for and holds is in `planner.values.rehearsal`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from executor.beside import Beside
from executor.boundaries import Boundary, Described
from executor.devices import Backend
from executor.flats import gather, reduce_scatter
from executor.groups import among
from executor.noise import Noise
from executor.rank import Rank
from executor.reduction import add_up
from executor.stage import Judged, Passing, Stage, Tensors
from executor.stage_module import StageModule
from executor.swapping import Swapped
from executor.waiting import Waits, untouched
from planner.orders import schedules
from planner.orders.action import Action
from planner.orders.operations import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    LOAD,
    NORM_GRAD,
    OPTIMIZER,
    RECOMPUTE,
)
from planner.values.plan import Plan
from planner.values.rehearsal import Passed, Rehearsal, Shadow


class RehearsedRank(Rank):
    """What one process of a rehearsal holds and does. All ranks must be made at the same time."""

    def __init__(self, rehearsal: Rehearsal, plan: Plan, backend: Backend, rank: int, *, seed: int) -> None:
        self._take_part(plan, backend, rank, seed)
        own = rehearsal.rows[rank]
        self.waits = Waits(own, rehearsal.quantiles, jitter=rehearsal.jitter, seed=seed * len(rehearsal.rows) + rank)
        self.waiting = {
            index: WaitingStage(
                index,
                rehearsal.stages[index],
                self.waits,
                self.groups.holding[index],
                splits=schedules.get(plan.schedule).splits,
                beside=schedules.get(plan.schedule).updates == "microbatch",
            )
            for index in plan.stages_of[rank]
        }
        self.stages = dict(self.waiting)
        self.gathering: dict[tuple[int, str, int | None], list[dist.Work]] = {}
        self.tied = self._tied(rehearsal)
        apart = sum(flat.nbytes for stage in self.waiting.values() for flat in stage.flats)
        self.static = own.static
        self.held = [untouched(size - (apart if kind == "gradients" else 0)) for kind, size in own.static.items()]

    def _tied(self, rehearsal: Rehearsal) -> dict[int, tuple[torch.Tensor, dist.ProcessGroup | None]]:
        """Make what is added up over stages that share parameters, as `executor.rank` does. Makes process groups."""
        found = {}
        for tied in self.plan.tied:
            for replica in range(self.plan.pipelines):
                rows = {row for s in tied for row in self.plan.holders[s] if self.groups.replicas[row] == replica}
                group = among(rows)
                if replica == self.replica and dist.get_rank() in rows:
                    found[tied[0]] = torch.zeros(_floats(rehearsal.stages[tied[0]].tied)), group
        return found

    def load(self, action: Action) -> None:
        """Wait for as long as a batch takes, and hold its bytes."""
        stage = self.waiting[action.stage]
        with self.waits.waiting(action.stage, LOAD):
            untouched(stage.shadow.inside[LOAD])
            self.inputs = {**self.inputs, -1 - action.stage: untouched(stage.shadow.batch)}

    def forward(self, action: Action) -> None:
        """Let a micro-batch pass through a stage that waits."""
        stage, m = self.stages[action.stage], self.microbatch(action)
        self._await_gathers(action.stage, FORWARD, m)
        noise = Noise(self.seed, *self.course.place(m), self.backend.device)
        inputs = () if stage.is_first else self._arrived(stage, m)
        stage.forward(m, inputs, noise, swapped=self._swapped(stage, m))

    def reduce_gradients(self, action: Action) -> None:
        """Add up as many bytes over the ranks that hold a stage as its gradients have."""
        stage = self.waiting[action.stage]
        for flat in stage.flats:
            if stage.gathers and stage.group is not None:
                reduce_scatter(flat, stage.group)
            else:
                add_up(flat, stage.group)

    def gather(self, action: Action) -> None:
        """Gather as many bytes as a stage's parameters have; for a forward begin to."""
        works = self.waiting[action.stage].begin_gathers()
        self.gathering[action.stage, FORWARD, action.microbatch] = works
        if action.microbatch is None:
            self._await_gathers(action.stage, FORWARD, None)

    def gather_backward(self, action: Action) -> None:
        """Begin to gather as many bytes as a stage's parameters have."""
        self.gathering[action.stage, BACKWARD, action.microbatch] = self.waiting[action.stage].begin_gathers()

    def pull(self, action: Action) -> None:
        """Gather as many bytes as a stage's parameters have."""
        for work in self.waiting[action.stage].begin_gathers():
            work.wait()

    def push(self, action: Action) -> None:
        """Reduce as many bytes as a stage's gradients have to their servers."""
        self.reduce_gradients(action)
        self.waiting[action.stage].gradients_held = ()

    def let_go(self, action: Action) -> None:
        """Let go of nothing: what was gathered was nothing."""

    def _await_gathers(self, stage: int, op: str, microbatch: int | None) -> None:
        works = self.gathering.pop((stage, op, microbatch), [])
        self.waited.append(self._stamp())
        for work in works:
            work.wait()
        self.waited.append(self._stamp())

    def backward(self, action: Action) -> None:
        """Let a micro-batch pass back through a stage that waits, behind the gather that it wants."""
        self._await_gathers(action.stage, BACKWARD, action.microbatch)
        super().backward(action)

    def add_up_gradients(self, action: Action) -> None:
        """Add up as many bytes as stages share."""
        flat, group = self.tied[action.stage]
        if group is not None:
            add_up(flat, group)

    def measure_norm(self, action: Action) -> None:
        """Wait for as long as a norm takes."""
        with self.waits.waiting(action.stage, NORM_GRAD):
            pass

    def agree_on_norm(self, action: Action) -> None:
        """Add up two numbers over all ranks."""
        dist.all_reduce(torch.zeros(2, dtype=torch.float64))

    def optimize(self, action: Action) -> None:
        """Wait for as long as an update takes."""
        self.stages[action.stage].update()

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes that are known by name between two actions."""
        known = super().bytes_by_kind()
        return known | self.static | {"gradients": self.static.get("gradients", 0) + known["gradients"]}


class WaitingStage(Stage):
    """A stage that waits: what goes in and out is as large as the profile says, and so is what it keeps."""

    def __init__(
        self,
        index: int,
        shadow: Shadow,
        waits: Waits,
        group: dist.ProcessGroup | None,
        *,
        splits: bool,
        beside: bool = False,
    ) -> None:
        names = [tuple(value.name for value in values) for values in (shadow.taken, shadow.made)]
        boundary = Boundary(tuple(map(_described, shadow.taken)), tuple(map(_described, shadow.made)))
        super().__init__(index, StageModule((), *names), boundary, None, group, splits=splits)
        self.shadow, self.waits = shadow, waits
        ranks = 1 if group is None else dist.get_world_size(group)
        self.flats = [torch.zeros(_floats(size, ranks)) for size in shadow.reduced] if group is not None else []
        """What the stage's holders reduce: as many bytes in as many collectives, without gradients in them."""
        self.gathers = [torch.zeros(_floats(size, ranks)) for size in shadow.gathered] if group is not None else []
        self.gradients_held: Tensors = ()
        if beside and group is not None:
            self.beside = _ReducedBeside(self.flats, group)

    def begin_gathers(self) -> list[dist.Work]:
        """Begin to gather as many bytes as the stage's parameters have."""
        assert self.group is not None, "nobody else holds the stage"
        return [work for flat in self.gathers for work in gather(flat, self.group)]

    def forward(
        self,
        microbatch: int,
        inputs: Tensors,
        noise: Noise,
        judged: Judged | None = None,
        swapped: Swapped | None = None,
    ) -> None:
        """Wait, and make what is sent on; what only passes through is passed on."""
        with self.waits.waiting(self.index, FORWARD):
            untouched(self.shadow.inside[FORWARD])
            there = dict(zip(self.module.inputs, inputs, strict=True))
            new = [one for one in self.shadow.made if one.name not in there]
            there |= {one.name: _described(one).empty(_CPU) for one in new}
            kept = untouched(self.shadow.kept.get(FORWARD, 0) - sum(one.bytes for one in new))
        outputs = tuple(there[one.name] for one in self.shadow.made)
        held = kept if swapped is None else swapped.hold(kept)
        self.passing[microbatch] = Passing(inputs, outputs, held, swapped=swapped)

    def let_go(self, microbatch: int) -> None:
        """Keep what was sent: there is no graph behind it that would give it back."""

    def backward(self, microbatch: int, gradients: Tensors, on_repeat: Callable[[], None] | None = None) -> Tensors:
        """Wait, let go of what the micro-batch has kept, and return the gradients of its inputs."""
        passing = self.passing.pop(microbatch)
        if on_repeat is not None and not self.splits and f"{self.index}{RECOMPUTE}" in self.waits.seconds:
            on_repeat()
            with self.waits.waiting(self.index, RECOMPUTE):
                pass
            on_repeat()
        with self.waits.waiting(self.index, BACKWARD):
            self._add_gradients(BACKWARD)
            del passing
            return self._of_inputs_made()

    def repeat(self, microbatch: int) -> None:
        """Wait for as long as a micro-batch's forward is repeated, and keep what it had forgotten."""
        with self.waits.waiting(self.index, RECOMPUTE):
            untouched(self.shadow.inside[RECOMPUTE])
            passing = self.passing[microbatch]
            passing.result = passing.result, untouched(self.shadow.kept.get(RECOMPUTE, 0))

    def backward_input(self, microbatch: int, gradients: Tensors) -> Tensors:
        """Wait, and return the gradients of a micro-batch's inputs."""
        with self.waits.waiting(self.index, BACKWARD_INPUT):
            passing = self.passing[microbatch]
            untouched(self.shadow.inside[BACKWARD_INPUT])
            passing.result = passing.result, gradients
            return self._of_inputs_made()

    def backward_weight(self, microbatch: int) -> None:
        """Wait, and let go of what the micro-batch has kept."""
        with self.waits.waiting(self.index, BACKWARD_WEIGHT):
            self._add_gradients(BACKWARD_WEIGHT)
            del self.passing[microbatch]

    def _add_gradients(self, op: str) -> None:
        if self.shadow.gradients and not self.gradients_held:
            untouched(self.shadow.first[op])
            self.gradients_held = untouched(self.shadow.gradients)
        else:
            untouched(self.shadow.inside[op])

    def _of_inputs_made(self) -> Tensors:
        return tuple(one.empty(_CPU) for one in self.boundary.taken if one.gradient)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that are there now, beside those that always are."""
        return sum(part.nbytes for part in self.gradients_held)

    def update(self, *, usable: bool = True) -> None:
        """Wait, and let go of the gradients."""
        with self.waits.waiting(self.index, OPTIMIZER):
            untouched(self.shadow.inside[OPTIMIZER])
            self.gradients_held = ()


class _ReducedBeside(Beside):
    """As many bytes as gradients have, averaged while a stage waits for something else."""

    nbytes = 0

    def __init__(self, flats: list[torch.Tensor], group: dist.ProcessGroup) -> None:
        self.flats, self.group = flats, group
        self.works: list[list[dist.Work]] = []

    def hand_over(self) -> None:
        """Begin to reduce."""
        copies = [torch.zeros_like(flat) for flat in self.flats]
        self.works.append([dist.all_reduce(flat, group=self.group, async_op=True) for flat in copies])

    def arrive(self) -> None:
        """Wait for what was begun first."""
        for work in self.works.pop(0):
            work.wait()


_CPU = torch.device("cpu")


def _described(value: Passed) -> Described:
    return Described(torch.Size([value.bytes]), torch.uint8, value.gradient)


def _floats(size: int, ranks: int = 1) -> int:
    """How many numbers of four bytes there are, a multiple of the ranks that share them."""
    return ranks * max(1, size // 4 // ranks)
