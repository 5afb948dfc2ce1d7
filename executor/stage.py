"""One stage on one of the ranks that hold it: its layers, what its micro-batches keep until their backward, its update.

    inputs ──► forward ──► outputs ──► sent on              what a micro-batch keeps: `Passing`
    gradients of inputs ◄── backward ◄── gradients of outputs

A rank may hold any number of them. They know nothing of messages, nor of who holds the stages beside them.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from executor.beside import Beside
from executor.boundaries import Boundary
from executor.compiling import compile_layers
from executor.gathering import COMMON, Gathering
from executor.hollow import places
from executor.host_update import HostUpdate
from executor.layer import as_tuple
from executor.layers import LayeredModel
from executor.model_file import ModelFile
from executor.noise import Noise
from executor.reduction import Buckets, start_alike
from executor.repeating import Forgotten
from executor.sharding import Sharding, Shards
from executor.stage_module import StageModule
from executor.surroundings import on
from executor.swapping import Swapped, let_go
from executor.torch_adapter import halves, whole_backward
from executor.updating import own_optimizer
from executor.versions import Versions
from planner.basis.errors import RUN_FAILED, PlanError
from planner.orders.operations import BACKWARD, FORWARD

Tensors = tuple[torch.Tensor, ...]
Judged = Callable[[Any], torch.Tensor]


@dataclass
class Passing:
    """A micro-batch between its forward and its backward: what went in, what came out (on the last stage its loss).

    `weight_half` is what is left of a backward that is done in two halves, `forgotten` what is repeated before them;
    `swapped` is what of it is copied to the host and back.
    """

    inputs: Tensors
    outputs: Tensors
    result: Any = None
    weight_half: Callable[[], object] | None = None
    forgotten: list[Forgotten] | None = None
    swapped: Swapped | None = None


@dataclass
class Sources:
    """What all stages of a rank are made from: the file, its cut model as it runs, and the names of its tensors."""

    file: ModelFile
    layered: LayeredModel
    names: dict[int, str] = field(init=False)
    saved: dict[int, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.names, self.saved = self.layered.parameter_names(), self.layered.saved_names()


class Stage:
    """A stage with the layers of `module`, which pass their boundary's tensors.

    `loss` is the last stage's, from its result and targets. `group` joins the ranks that hold the stage, where there
    are several. Its backwards are done in two halves where the schedule `splits` them.

    Where parameters change while micro-batches are under way it keeps so many `versions` of them, 0 elsewhere.
    Gradients may be reduced `beside` computing.
    """

    def __init__(
        self,
        index: int,
        module: StageModule,
        boundary: Boundary,
        loss: Any,
        group: dist.ProcessGroup | None,
        *,
        splits: bool = False,
        versions: int = 0,
        beside: bool = False,
    ) -> None:
        self.splits, self.most_versions, self.is_beside = splits, versions, beside
        self.index, self.module, self.boundary, self.loss, self.group = index, module, boundary, loss, group
        self._before = [id(tensor) for _, _, tensor in places([module])]
        self.passing: dict[int, Passing] = {}
        self.losses: dict[int, torch.Tensor] = {}
        """Every micro-batch's part of the step's mean loss, on the last stage."""
        self.scale: torch.Tensor | float | None = None
        """What losses are multiplied by for their backward: in float16, and where each micro-batch has an update."""
        self.buckets: Buckets | None = None
        self.shards: Shards | None = None
        self.gathering: Gathering | None = None
        self.beside: Beside | None = None
        self.versions: Versions | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.host_update: HostUpdate | None = None
        self.places: dict[int, tuple[nn.Module, str]] = {}
        self.saved: dict[str, tuple[nn.Module, str]] = {}
        self.named: dict[str, nn.Parameter] = {}

    def settle(
        self,
        sources: Sources,
        taken: set[int],
        device: torch.device,
        bucket_bytes: int,
        sharding: Sharding | None = None,
        *,
        on_host: bool = False,
    ) -> None:
        """Take its place on the device, now that its tensors have values: all ranks that hold it, at the same time.

        A parameter that an earlier stage of this rank holds, too, is copied: each stage has its own gradients, which
        are added up where the program says so. What is `taken` is noted by its identity. `on_host` it is updated on the
        host.
        """
        self._part(taken)
        if sources.file.compiled:
            self.module.layers = compile_layers(self.module.layers)
        on(self.module, device)
        if isinstance(self.loss, nn.Module):
            self.loss = on(self.loss, device)
        for before, (part, name, tensor) in zip(self._before, places([self.module]), strict=True):
            self.places[before] = part, name
            self.saved.update(dict.fromkeys(sources.saved.get(before, ()), (part, name)))
            if isinstance(tensor, nn.Parameter):
                self.named[sources.names[before]] = tensor
        if self.group is not None:
            start_alike(self.module, self.group)
            if sharding is not None:
                self.shards = Shards(self._blocks(sharding), self.group, sharding.shards, sharding.reductions)
                self.gathering = self._gathering(sharding, self.shards)
            reduced = self._replicated().values()
            if self.is_beside:
                self.beside = Beside(reduced, self.group, bucket_bytes)
            elif reduced or sharding is None:
                self.buckets = Buckets(reduced, self.group, bucket_bytes)
        if self.most_versions:
            self.versions = Versions(tuple(self.trained.values()), self.most_versions)
        updated = self.updated
        if on_host:
            self.host_update = HostUpdate(updated)
            updated = self.host_update.masters
        self.optimizer = own_optimizer(sources.file, sources.layered.model, updated)

    def _blocks(self, sharding: Sharding) -> list[dict[str, nn.Parameter]]:
        """The parameters that are sharded, by block; in front of the blocks those that several of them hold."""
        names = {id(parameter): name for name, parameter in self.named.items()}
        held = [
            dict.fromkeys(names[id(p)] for i in block for p in self.module.layers[i].module.parameters())
            for block in sharding.blocks
        ]
        times = Counter(name for block in held for name in block)
        common = [name for name, number in times.items() if number > 1]
        blocks = [common, *([name for name in block if times[name] == 1] for block in held)]
        return [{name: self.named[name] for name in block if name not in sharding.whole} for block in blocks]

    def _gathering(self, sharding: Sharding, shards: Shards) -> Gathering | None:
        """What has parameters whole while they are needed, where each rank keeps a shard of them."""
        if sharding.gathering is None:
            return None
        block_of = [COMMON + 1 + number for number, block in enumerate(sharding.blocks) for _ in block]
        found = Gathering(shards.blocks, sharding.gathering, block_of, self.module.repeated)
        self.module.on_layer = found.reach
        return found

    def whole(self) -> AbstractContextManager[None]:
        """Have all parameters whole for a while, on all ranks that hold the stage at the same time."""
        if self.shards is not None and self.shards.served:
            self.shards.gather()
        return nullcontext() if self.gathering is None else self.gathering.whole()

    def take_over(self) -> None:
        """Keep this rank's shards of what has been written into its parameters while they were whole."""
        for unit in self.shards.units if self.shards is not None else ():
            if unit.values is not None:
                unit.own.copy_(unit.flat.shard(unit.values))

    def watch_waits(self, on_wait: Callable[[], None]) -> None:
        """Have a function called before and after whatever waits for other ranks while a stage computes."""
        for own in (self.shards, self.gathering):
            if own is not None:
                own.on_wait = on_wait

    def _replicated(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank trains whole."""
        if self.shards is None:
            return self.trained
        sharded = {name for unit in self.shards.units for name in unit.flat.named}
        return {name: parameter for name, parameter in self.trained.items() if name not in sharded}

    @property
    def updated(self) -> dict[str, nn.Parameter]:
        """What this rank updates: the parameters that are trained, or its pieces of them, or the newest version."""
        if self.versions is not None:
            return dict(zip(self.trained, self.versions.own, strict=True))
        return {**self._replicated(), **(self.shards.pieces if self.shards is not None else {})}

    @property
    def begins(self) -> dict[str, int]:
        """Behind how many of a parameter's numbers this rank's piece of it begins, for those of which it has one."""
        units = self.shards.units if self.shards is not None else []
        return {name: begin for unit in units for name, begin in unit.flat.begins().items() if name in unit.pieces}

    @property
    def shares(self) -> list[tuple[list[nn.Parameter], int]]:
        """What this rank updates, with how many ranks do the same."""
        every = 1 if self.group is None else dist.get_world_size(self.group)
        pieces = list(self.shards.pieces.values()) if self.shards is not None else []
        return [share for share in ((list(self._replicated().values()), every), (pieces, 1)) if share[0]]

    def reduce(self) -> None:
        """Add up the gradients over the ranks that hold the stage: all of them, or each rank's shard.

        Sharded gradients are reduced after every backward, those that stay whole once.
        """
        if self.shards is not None:
            self.shards.reduce()
        if self.buckets is not None and (self.shards is None or self.shards.complete):
            self.buckets.reduce()

    def _part(self, taken: set[int]) -> None:
        """Make what another stage of this rank holds, too, the stage's own; and note what it holds."""
        if any(id(tensor) in taken for _, _, tensor in places([self.module])):
            around = self.module.surroundings
            self.module = copy.deepcopy(self.module, {id(around): around})
        taken.update(id(tensor) for _, _, tensor in places([self.module]))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by their names in the model."""
        return {name: parameter for name, parameter in self.named.items() if parameter.requires_grad}

    @property
    def is_first(self) -> bool:
        """Whether it takes the batch."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it makes the loss."""
        return not self.module.outputs

    def forward(
        self,
        microbatch: int,
        inputs: Tensors,
        noise: Noise,
        judged: Judged | None = None,
        swapped: Swapped | None = None,
    ) -> None:
        """Compute one micro-batch with its noise; the last stage's result is `judged`: its part of the step's loss.

        What is kept for its backward goes to `swapped`, where it is to be copied to the host. Raises `PlanError` (exit
        6) when what is to be sent on is not what the next stage expects.
        """
        if self.versions is not None:
            self.versions.forward(microbatch)
        flags = (one.gradient for one in self.boundary.taken)
        inputs = tuple(value.requires_grad_(flag) for value, flag in zip(inputs, flags, strict=True))
        self.module.noise, self.module.forgotten = noise, [] if self.splits else None
        if self.gathering is not None:
            self.gathering.enter(FORWARD, microbatch, backwards=False)
        with nullcontext() if swapped is None else swapped.keeping():
            with nullcontext() if self.gathering is None else self.gathering.saving():
                result, forgotten = self.module(*inputs), self.module.forgotten
            self.module.forgotten = None
            if self.is_last:
                noise.at(self.module.first + len(self.module.layers))
                assert judged is not None, "the last stage makes the loss"
                self.losses[microbatch] = loss = judged(result)
        if self.is_last:
            self.passing[microbatch] = Passing(inputs, (loss,), result, forgotten=forgotten, swapped=swapped)
            return
        outputs = as_tuple(result)
        self._check(outputs)
        self.passing[microbatch] = Passing(inputs, outputs, forgotten=forgotten, swapped=swapped)

    def swapped(self, microbatch: int) -> Swapped:
        """Return what is copied to the host of a micro-batch."""
        found = self.passing[microbatch].swapped
        assert found is not None, microbatch
        return found

    def let_go(self, microbatch: int) -> None:
        """Let go of the values of what came out of a micro-batch, which nobody needs any more but its graph."""
        passing = self.passing[microbatch]
        passing.result = None
        if not self.is_last:
            let_go(passing.outputs, (*self.staying, *passing.inputs))

    @property
    def staying(self) -> Tensors:
        """What is there whatever micro-batches keep."""
        parts = [part for part in (self.module, self.loss) if isinstance(part, nn.Module)]
        return tuple(tensor for _, _, tensor in places(parts))

    def _check(self, outputs: Tensors) -> None:
        for i, (value, expected) in enumerate(zip(outputs, self.boundary.made, strict=True)):
            if (value.shape, value.dtype) != (expected.shape, expected.dtype):
                raise PlanError(
                    what="a stage sends something else than the next one expects",
                    where=f"stage {self.index}, value '{self.module.outputs[i]}'",
                    why=f"it is {value.dtype} {tuple(value.shape)} where one micro-batch of batch(n) made "
                    f"{expected.dtype} {tuple(expected.shape)}",
                    fix="make all samples alike: what passes between stages must have one shape",
                    code=RUN_FAILED,
                )

    def backward(self, microbatch: int, gradients: Tensors, on_repeat: Callable[[], None] | None = None) -> Tensors:
        """Compute the gradients of a micro-batch's inputs, and add those of the parameters to what there is.

        `gradients` are those of the outputs that have any. `on_repeat` is called before and after what is recomputed.
        """
        if self.versions is not None:
            self.versions.backward(microbatch)
        passing = self.passing.pop(microbatch)
        self.module.on_repeat = on_repeat
        if self.gathering is not None:
            self.gathering.enter(BACKWARD, microbatch, backwards=True)
        whole_backward(*self._ends(microbatch, passing, gradients))
        self.module.on_repeat = None
        return self._of_inputs(passing)

    def repeat(self, microbatch: int) -> None:
        """Repeat what a micro-batch's forward forgot, for both halves of its backward."""
        for forgotten in self.passing[microbatch].forgotten or ():
            forgotten.repeat()

    def backward_input(self, microbatch: int, gradients: Tensors) -> Tensors:
        """Compute the gradients of a micro-batch's inputs alone; `backward_weight` does the rest."""
        passing = self.passing[microbatch]
        outputs, ends = self._ends(microbatch, passing, gradients)
        # torch's functions let go of what they begin with: what a stage only passes on goes beside them.
        own = {id(value) for value in passing.inputs}
        passed = [(v, g) for v, g in zip(outputs, ends or (), strict=False) if id(v) in own]
        kept = [i for i, value in enumerate(outputs) if id(value) not in own]
        half = halves(
            [outputs[i] for i in kept],
            None if ends is None else [ends[i] for i in kept],
            [value for value in passing.inputs if value.requires_grad],
            list(self.trained.values()),
        )
        half.first()
        passing.weight_half = half.second
        if self.is_last:
            passing.outputs = ()  # a loss that was scaled still holds what only the first half has needed
        for value, gradient in passed:
            value.grad = gradient if value.grad is None else value.grad + gradient
        return self._of_inputs(passing)

    def backward_weight(self, microbatch: int) -> None:
        """Add the gradients of the parameters to what there is, behind `backward_input`."""
        half = self.passing.pop(microbatch).weight_half
        assert half is not None, microbatch
        for reduced in (self.buckets, self.shards):
            if reduced is not None:
                half = functools.partial(reduced.added, half)
        half()

    def _ends(
        self, microbatch: int, passing: Passing, gradients: Tensors
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Where a backward begins: what has a gradient, and these gradients; None for a loss's own."""
        if self.is_last:
            loss = passing.outputs[0]
            self.losses[microbatch] = loss.detach()
            return [loss if self.scale is None else loss * self.scale], None
        flags = (one.gradient for one in self.boundary.made)
        return [value for value, flag in zip(passing.outputs, flags, strict=True) if flag], list(gradients)

    def _of_inputs(self, passing: Passing) -> Tensors:
        """Take the gradients of the inputs that have any: zeros where a value was not used."""
        found = []
        for value in passing.inputs:
            if value.requires_grad:
                found.append(torch.zeros_like(value) if value.grad is None else value.grad)
                value.grad = None
        return tuple(found)

    def update(self, *, usable: bool = True) -> None:
        """Update the parameters, unless their gradients are not usable, and clear the gradients.

        Gradients that are reduced stay in their buckets, as zeros. All are cleared, also those of parameters that the
        user's optimizer leaves out: they would count in the next step's norm.
        """
        if self.optimizer is not None and usable:
            if self.host_update is not None:
                self.host_update.step(self.optimizer)
            elif self.versions is None:
                self.optimizer.step()
            else:
                mean = self.beside.take() if self.beside is not None else None
                self.versions.renew(self.optimizer.step, mean or {p: p.grad for p in self.versions.parameters})
        for reduced in (self.buckets, self.shards, self.beside):
            if reduced is not None:
                reduced.clear()
        if self.group is None:
            self.module.zero_grad()

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters that are always there."""
        if self.shards is None or self.gathering is None:
            served = self.shards.shard_bytes if self.shards is not None else 0
            return sum(p.nbytes for p in self.named.values()) + served
        sharded = {name for unit in self.shards.units for name in unit.flat.named}
        return sum(p.nbytes for name, p in self.named.items() if name not in sharded) + self.shards.shard_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that are there now."""
        own = sum(p.grad.nbytes for p in self._replicated().values() if p.grad is not None)
        own += self.beside.nbytes if self.beside is not None else 0
        return own + (self.shards.gradient_bytes if self.shards is not None else 0)

    def begin(self) -> None:
        """Begin with nothing under way."""
        if self.versions is not None:
            self.versions.begin()

    def forget(self) -> None:
        """Forget what micro-batches of a step that is over have left behind."""
        self.passing.clear()
        self.losses = {}

    def gradients(self) -> dict[str, torch.Tensor]:
        """The parameters' gradients by their names in the model: of shards on all that hold them at the same time."""
        found = {name: p.grad.cpu() for name, p in self._replicated().items() if p.grad is not None}
        return found if self.shards is None else {**found, **self.shards.gradients()}
