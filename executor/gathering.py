"""Parameters of which each rank keeps a shard: whole from before a block is used until behind it (ZeRO-3).

    UNSHARD      begin to gather the pass's first block
    pass         | block 0 | block 1 | block 2 |       a block is waited for when its first layer is reached; then the
    gathering      1         2                         next one's gather begins, and the one before is let go of
    RESHARD      let go of the last

Backwards go the other way. What autograd keeps of parameters from a forward is kept as a place in their block, so it is
read from the block as it is gathered for the backward. All ranks gather all blocks in one order, whatever they use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from executor.sharding import Unit

COMMON = 0
"""The block of what several others hold: whole for as long as a pass lasts."""


class _Begun(NamedTuple):
    """A block on its way."""

    block: int
    units: list[tuple[Unit, torch.Tensor, list[dist.Work]]]


class _Place(NamedTuple):
    """Where in a block's unit a saved tensor lies."""

    unit: Unit
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Gathering:
    """The `blocks` of a stage, the first being what is `COMMON`, gathered over `group`.

    `block_of` has the block of every layer. The layers of each of `runs` are repeated together for a backward, which
    needs their blocks together.
    """

    def __init__(
        self,
        blocks: Sequence[list[Unit]],
        group: dist.ProcessGroup,
        block_of: Sequence[int],
        runs: Sequence[range],
    ) -> None:
        self.blocks, self.group, self.block_of = blocks, group, block_of
        self.number = {id(unit): number for number, units in enumerate(blocks) for unit in units}
        self.until = list(range(len(blocks)))
        """Of every block the first one that a repetition needs together with it."""
        for run in runs:
            first, last = block_of[run[0]], block_of[run[-1]]
            for block in range(first, last + 1):
                self.until[block] = min(self.until[block], self.until[first])
        self.ahead: dict[tuple[str, int | None], list[_Begun]] = {}
        self.begun: _Begun | None = None
        self.left: list[int] = []
        self.backwards = False
        self.on_wait: Callable[[], None] = _nothing
        """Called before and after everything inside a pass that waits for other ranks."""
        self.units: dict[int, Unit] = {}
        """Whole units by the address of their memory."""
        for units in blocks:
            for unit in units:
                unit.close()

    def post(self, kind: str, microbatch: int | None, *, backwards: bool) -> None:
        """Begin to gather what a pass needs first."""
        first = len(self.blocks) - 1 if backwards else COMMON + 1
        self.ahead[kind, microbatch] = [self._begin(COMMON), self._begin(first)]

    def enter(self, kind: str, microbatch: int | None, *, backwards: bool) -> None:
        """Begin a pass of which the first blocks have been posted."""
        common, self.begun = self.ahead.pop((kind, microbatch))
        order = range(COMMON + 1, len(self.blocks))
        self.left, self.backwards = list(reversed(order) if backwards else order)[1:], backwards
        self._finish(common)

    def reach(self, layer: int) -> None:
        """Have a layer's block whole; let go of those that the pass has left behind."""
        self._need(self.block_of[layer])

    def _need(self, block: int) -> None:
        if block == COMMON:
            return
        for number in range(COMMON + 1, len(self.blocks)):
            behind = block < self.until[number] if self.backwards else number < block
            if behind:
                self._let_go(number)
        while self.begun is not None and (self.begun.block >= block if self.backwards else self.begun.block <= block):
            self._advance()

    def _advance(self) -> None:
        assert self.begun is not None
        self._finish(self.begun)
        self.begun = self._begin(self.left.pop(0)) if self.left else None

    def leave(self) -> None:
        """End a pass: let go of all blocks, behind those that it has not reached."""
        while self.begun is not None:
            number = self.begun.block
            self._advance()
            self._let_go(number)
        for number in range(len(self.blocks)):
            self._let_go(number)

    def _begin(self, block: int) -> _Begun:
        units = []
        for unit in self.blocks[block]:
            whole = unit.flat.empty()
            unit.flat.shard(whole).copy_(unit.own)
            units.append((unit, whole, unit.flat.gather(whole, self.group)))
        return _Begun(block, units)

    def _finish(self, begun: _Begun) -> None:
        self.on_wait()
        for unit, whole, works in begun.units:
            for work in works:
                work.wait()
            unit.open(whole)
            self.units[whole.untyped_storage().data_ptr()] = unit
        self.on_wait()

    def _let_go(self, block: int) -> None:
        for unit in self.blocks[block]:
            if unit.values is not None:
                del self.units[unit.values.untyped_storage().data_ptr()]
                unit.close()

    def saving(self) -> AbstractContextManager[Any]:
        """Keep places of parameters, not the parameters, for backwards of what is computed now."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Place:
        unit = self.units.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if unit is None:
            return tensor
        return _Place(unit, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: torch.Tensor | _Place) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._need(self.number[id(packed.unit)])
        assert packed.unit.values is not None, "autograd goes through its graph from its end"
        return packed.unit.values.as_strided(packed.shape, packed.stride, packed.offset)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters whole, on all ranks that hold the stage."""
        for block in range(len(self.blocks)):
            self._finish(self._begin(block))
        try:
            yield
        finally:
            for block in range(len(self.blocks)):
                self._let_go(block)

    @property
    def bytes(self) -> int:
        """Bytes of what is whole now, or on its way."""
        begun = [one for posted in self.ahead.values() for one in posted] + ([self.begun] if self.begun else [])
        whole = [unit.values for units in self.blocks for unit in units if unit.values is not None]
        return sum(t.nbytes for t in whole) + sum(t.nbytes for one in begun for _, t, _ in one.units)


def _nothing() -> None:
    """Do nothing."""
