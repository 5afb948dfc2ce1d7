"""A forward that keeps only its inputs, and is repeated before a backward that is done in two halves.

    forward      inputs ──► work ──► results          every tensor that autograd would keep is an empty place
    repeat       inputs ──► work ─┤ the last place    fills them, and stops there as torch's checkpoint does
    I half, W half                                    both find them filled; each is let go of with its node

torch's checkpoint repeats once for every call of autograd, of which a weight half makes one for each group of
parameters. Whole backwards use it (`executor.stage_module`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError


class _Place:
    """Where the graph finds a tensor again, once its forward has been repeated."""

    tensor: torch.Tensor | None = None


class _Inputs(torch.autograd.Function):
    """Keeps tensors where autograd keeps them, so that whoever moves what it keeps sees them, too."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return torch.empty(0)


class _FilledError(Exception):
    """Nothing behind this is needed."""


class Forgotten:
    """One run of `work` on `inputs` of which autograd keeps nothing.

    `first` and `again` are what the run and its repetition are entered in (`executor.buffers.Written`). Where the work
    is `compiled`, what looks at its tensors is none of that.
    """

    def __init__(
        self,
        work: Callable[..., Any],
        inputs: tuple[torch.Tensor, ...],
        first: AbstractContextManager[None],
        again: AbstractContextManager[None],
        *,
        compiled: bool = False,
    ) -> None:
        self.work, self.inputs, self.first, self.again, self.compiled = work, inputs, first, again, compiled
        self.kept: Callable[[], list[torch.Tensor]] = list
        self.places: list[tuple[weakref.ref[_Place], torch.Size, torch.dtype]] = []
        self.repeated = False

    def run(self) -> Any:
        """Do the work, and forget what it needs for its backward."""
        flags = [value.requires_grad for value in self.inputs]
        kept = _Inputs.apply(torch.empty(0, requires_grad=True), *self.inputs).grad_fn  # type: ignore[no-untyped-call]
        with self.first, self._watching(self._forget, self._remember):
            result = self.work(*self.inputs)
        self.inputs = ()
        self.kept = lambda: [t.detach().requires_grad_(flag) for t, flag in zip(kept.saved_tensors, flags, strict=True)]
        return result

    def _watching(self, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> saved_tensors_hooks:
        if self.compiled:
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        return saved_tensors_hooks(pack, unpack)

    def _forget(self, tensor: torch.Tensor) -> _Place:
        place = _Place()
        self.places.append((weakref.ref(place), tensor.shape, tensor.dtype))
        return place

    def _remember(self, place: _Place) -> torch.Tensor:
        if not self.repeated:
            self.repeat()
        assert place.tensor is not None, "a place is filled once, and lives as long as its node's tensors"
        return place.tensor

    def repeat(self) -> None:
        """Do the work again as far as a backward needs it; nothing where that has been done, or nothing was kept.

        Raises `CheckpointError` where it comes to other tensors than the first time.
        """
        if self.repeated or not self.places:
            return
        filled = 0

        def fill(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal filled
            reference, shape, dtype = self.places[filled]
            if (shape, dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"a repeated forward came to a tensor of {tuple(tensor.shape)}, {tensor.dtype}, where the first "
                    f"one had {tuple(shape)}, {dtype}"
                )
            place, own = reference(), tensor.detach()
            if place is not None:
                place.tensor = own
            filled += 1
            if filled == len(self.places):
                raise _FilledError
            return own

        try:
            with self.again, torch.enable_grad(), self._watching(fill, lambda own: own):
                self.work(*self.kept())
        except _FilledError:
            pass
        else:
            raise CheckpointError(f"a repeated forward came to {filled} tensors where the first had {len(self.places)}")
        self.repeated = True
        del self.work, self.kept
