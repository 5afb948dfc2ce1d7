"""Buffers that a forward writes into, such as batch norm's statistics: a repeated forward must not write them twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from executor.torch_adapter import storage_of


class Written:
    """The buffers of some modules, of which those that a forward writes are known behind the first one."""

    def __init__(self, modules: nn.Module) -> None:
        self.modules = modules
        self.known: list[torch.Tensor] | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what a forward and its repetition run in (`context_fn` of `torch.utils.checkpoint`).

        The repetition begins with the buffers as they were before the forward, and leaves them as it has found them:
        forwards of other micro-batches lie between the two.
        """
        before: list[torch.Tensor] = []
        return self._first(before), self._again(before)

    @contextmanager
    def _first(self, before: list[torch.Tensor]) -> Iterator[None]:
        buffers = list(self.modules.buffers()) if self.known is None else self.known
        before += [buffer.detach().clone() for buffer in buffers]
        yield
        if self.known is None:
            changed = [not torch.equal(old, new) for old, new in zip(before, buffers, strict=True)]
            self.known = [buffer for buffer, wrote in zip(buffers, changed, strict=True) if wrote]
            before[:] = [old for old, wrote in zip(before, changed, strict=True) if wrote]

    @contextmanager
    def _again(self, before: list[torch.Tensor]) -> Iterator[None]:
        now = [buffer.detach().clone() for buffer in self.known or ()]
        self._put(before)
        try:
            yield
        finally:
            self._put(now)

    def _put(self, values: list[torch.Tensor]) -> None:
        for buffer, value in zip(self.known or (), values, strict=True):
            buffer.data.copy_(value)  # what autograd has saved of it is not what it computes with: batch norm's

    def apart(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value that the next forward does not change: a copy where it is a buffer."""
        held = {storage_of(buffer) for buffer in self.modules.buffers()}
        return value.clone() if storage_of(value) in held else value
