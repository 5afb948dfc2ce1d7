"""What each of the ranks that hold a stage keeps only its part of: optimizer state, gradients, parameters (ZeRO).

Parameters lie in flat tensors (`executor.flats`), and the user's optimizer gets this rank's pieces of them. Which of
these tensors are whole, and when, is what ZeRO's three stages differ in (arXiv 1910.02054):

    shards                  parameters          gradients
    optimizer               whole               whole; reduced to their owners, once
    ... and gradients       whole               a shard; a block's are whole inside a backward, until it is done
    ... and parameters      a shard             a shard; see `executor.gathering`

Blocks are what one collective takes (`planner.values.blocks`). All ranks reduce them in one order: from the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from executor.flats import Flat, by_kind

SERVED = "served"
"""Beside the kinds of what is sharded: each rank serves its shard, apart from the copy that it computes with."""


class Sharding(NamedTuple):
    """How a stage is sharded: the kinds of what is (`shards`), its layers' blocks by their place in it, the parameters
    that stay `whole` because other stages hold them, too, how often gradients are reduced between two updates, and the
    group that gathers parameters for every use, where they are sharded.
    """

    shards: tuple[str, ...]
    blocks: tuple[range, ...]
    whole: frozenset[str]
    reductions: int
    gathering: dist.ProcessGroup | None = None


class Unit:
    """The parameters of one dtype in one block: this rank's shard of them, and what is whole of them at the moment."""

    def __init__(self, flat: Flat, shards: Sequence[str]) -> None:
        self.flat = flat
        self.parameters = tuple(flat.named.values())
        whole = flat.zeros()
        with torch.no_grad():
            for parameter, view in zip(self.parameters, flat.views(whole), strict=True):
                view.copy_(parameter)
        self.values: torch.Tensor | None = None
        """All parameters; None while only this rank's shard is there."""
        self.apart = "parameters" in shards or SERVED in shards
        """Whether the shard is there beside what is whole."""
        self.own = flat.shard(whole).clone() if self.apart else flat.shard(whole)
        self.open(whole)
        self.trained = self.parameters[0].requires_grad
        self.gradients: torch.Tensor | None = None
        """The gradients of all its parameters, as far as they are whole."""
        self.keeps = self.trained and "gradients" not in shards
        if self.keeps:
            self.gradients = flat.zeros()
        self.gradient = self._shard_of_gradients()
        self.pieces = {name: nn.Parameter(part) for name, part in flat.pieces(self.own).items() if self.trained}
        self.missing: set[int] = set()
        """Parameters whose gradients the running backward has not made yet."""

    def _shard_of_gradients(self) -> torch.Tensor:
        if self.gradients is not None:
            return self.flat.shard(self.gradients)
        return torch.zeros_like(self.own) if self.trained else self.own[:0]

    def open(self, whole: torch.Tensor) -> None:
        """Let its parameters be parts of a tensor."""
        self.values = whole
        for parameter, view in zip(self.parameters, self.flat.views(whole), strict=True):
            parameter.data = view

    def close(self) -> None:
        """Let go of all but this rank's shard."""
        self.values = None
        for parameter in self.parameters:
            parameter.data = self.flat.like.expand(parameter.shape)

    def take(self, parameter: torch.Tensor) -> None:
        """Move a parameter's gradient, as a backward has left it, into its place among those of the unit."""
        if self.gradients is None:
            self.gradients = self.flat.zeros()
        place = next(i for i, own in enumerate(self.parameters) if own is parameter)
        assert parameter.grad is not None
        self.flat.views(self.gradients)[place].add_(parameter.grad)
        parameter.grad = None

    def reduce(self) -> None:
        """Add up the gradients over the ranks: what this one's shard has of them is its alone then."""
        whole = self.flat.zeros() if self.gradients is None else self.gradients
        self.flat.reduce_scatter(whole)
        if not self.keeps:
            self.gradient.add_(self.flat.shard(whole))
            self.gradients = None

    def clear(self) -> None:
        """Set all gradients to zero."""
        if self.keeps:
            assert self.gradients is not None
            self.gradients.zero_()
            for parameter, view in zip(self.parameters, self.flat.views(self.gradients), strict=True):
                parameter.grad = view
        else:
            self.gradient.zero_()
        for piece in self.pieces.values():
            piece.grad = None


class Shards:
    """This rank's shards of one stage, whose parameters come in `blocks`, by their names in the model.

    `shards` are the kinds of what is sharded, `reductions` how often gradients are reduced between two updates. As
    in `executor.reduction.Buckets`, what no rank has used since the last update has no gradient.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, nn.Parameter]],
        group: dist.ProcessGroup,
        shards: Sequence[str],
        reductions: int,
    ) -> None:
        self.group, self.reductions, self.done = group, reductions, 0
        wanted = [
            {name: p for name, p in block.items() if p.requires_grad or "parameters" in shards} for block in blocks
        ]
        self.blocks = [[Unit(flat, shards) for flat in by_kind(block, group)] for block in wanted]
        self.units = [unit for block in self.blocks for unit in block]
        self.trained = [unit for unit in self.units if unit.trained]
        self.unit_of = {id(p): unit for unit in self.trained for p in unit.parameters}
        self.reached: set[int] = set()
        self.on_wait: Callable[[], None] = _nothing
        """Called before and after everything inside a backward that waits for other ranks."""
        self.left = list(reversed(self.trained))
        """Units whose gradients are to be reduced for this backward, in order."""
        for unit in self.trained:
            unit.missing = {id(p) for p in unit.parameters}
            for parameter in unit.parameters:
                parameter.register_post_accumulate_grad_hook(self._reach)
        self.clear()

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """This rank's pieces of the parameters that are trained, by their names."""
        return {name: piece for unit in self.trained for name, piece in unit.pieces.items()}

    def _reach(self, parameter: torch.Tensor) -> None:
        """A parameter has its gradient of a backward: where gradients are sharded, reduce what is complete."""
        self.reached.add(id(parameter))
        unit = self.unit_of[id(parameter)]
        if unit.keeps:
            return
        unit.take(parameter)
        unit.missing.discard(id(parameter))
        while self.left and not self.left[0].missing:
            self.on_wait()
            self.left.pop(0).reduce()
            self.on_wait()

    def added(self, work: Callable[[], object]) -> None:
        """Do work that adds to gradients behind autograd's back: notice to which."""
        every = [parameter for unit in self.trained for parameter in unit.parameters]
        for parameter in every:
            parameter.grad = None
        work()
        found = [parameter for parameter in reversed(every) if parameter.grad is not None]
        for parameter in found:
            unit = self.unit_of[id(parameter)]
            if unit.keeps:
                unit.take(parameter)
            self._reach(parameter)
        self._place()

    def reduce(self) -> None:
        """Reduce what is not reduced yet; before an update agree on what was used at all."""
        for unit in self.left:
            unit.reduce()
        self.left = list(reversed(self.trained))
        for unit in self.trained:
            unit.missing = {id(p) for p in unit.parameters}
        self.done += 1
        if self.complete and self.trained:
            self._agree()

    @property
    def complete(self) -> bool:
        """Whether all reductions before an update are done."""
        return self.done == self.reductions

    def _agree(self) -> None:
        names = [(name, id(p)) for unit in self.trained for name, p in unit.flat.named.items()]
        used = torch.tensor([p in self.reached for _, p in names], dtype=torch.uint8, device=self.trained[0].own.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        anywhere = {name for (name, _), found in zip(names, used.tolist(), strict=True) if found}
        for unit in self.trained:
            gradients = unit.flat.pieces(unit.gradient)
            for name, piece in unit.pieces.items():
                piece.grad = gradients[name] if name in anywhere else None
        self.used = anywhere

    def clear(self) -> None:
        """Set all gradients to zero."""
        for unit in self.trained:
            unit.clear()
        self.reached.clear()
        self.done, self.used = 0, set[str]()

    def _place(self) -> None:
        for unit in self.trained:
            if unit.keeps and unit.gradients is not None:
                for parameter, view in zip(unit.parameters, unit.flat.views(unit.gradients), strict=True):
                    parameter.grad = view

    def gather(self) -> None:
        """Give all ranks the parameters that each has updated."""
        works: list[dist.Work] = []
        for unit in self.trained:
            if unit.values is not None:
                if unit.apart:
                    unit.flat.shard(unit.values).copy_(unit.own)
                works += unit.flat.gather(unit.values)
        for work in works:
            work.wait()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients of all parameters as they were reduced: on all ranks of the group at the same time."""
        found: dict[str, torch.Tensor] = {}
        for unit in self.trained:
            whole = unit.flat.zeros()
            unit.flat.shard(whole).copy_(unit.gradient)
            for work in unit.flat.gather(whole):
                work.wait()
            found |= dict(zip(unit.flat.named, unit.flat.views(whole), strict=True))
        return {name: gradient for name, gradient in found.items() if name in self.used}

    @property
    def shard_bytes(self) -> int:
        """Bytes of this rank's shards of the parameters, where they are not parts of what is whole."""
        return sum(unit.own.nbytes for unit in self.units if unit.apart)

    @property
    def served(self) -> bool:
        """Whether this rank computes with a copy of what the ranks serve."""
        return any(unit.apart and unit.values is not None for unit in self.trained)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that are there now."""
        return sum((unit.gradient if unit.gradients is None else unit.gradients).nbytes for unit in self.trained)


def _nothing() -> None:
    """Do nothing."""
