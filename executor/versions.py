"""The versions of a stage's parameters that its micro-batches read, where they change while these are under way.

    update    0        1        2        3          most = 3: version 0 is overwritten when nobody reads it any more
    slot      a        b        c        a
    reads     0 1 2    3        4                   a micro-batch's forward and its backward read one version

The stage computes with the model's own parameters. Which storage they have is set before each forward and backward:
autograd keeps a parameter itself, and finds in it what it has then. The optimizer updates parameters of its own in a
storage that nobody reads, so that what autograd has kept is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

Storages = list[torch.Tensor]
NEWEST = 1 << 62
"""Whatever the newest version will be."""


class Versions:
    """At most so many versions of some parameters, numbered by the updates before them; the `newest` is in use.

    `own` are what the optimizer updates: these parameters, in the newest version.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], most: int) -> None:
        self.parameters, self.most, self.newest = tuple(parameters), most, 0
        self.own = [nn.Parameter(parameter.data) for parameter in self.parameters]
        self.slots: dict[int, Storages] = {0: [parameter.data for parameter in self.parameters]}
        self.spare: list[Storages] = []
        self.reads: Callable[[int, int], int] = lambda microbatch, newest: newest
        self.following: Callable[[int], int | None] = lambda microbatch: microbatch + 1
        self.under_way: dict[int, int] = {}
        """The version that each micro-batch between its forward and its backward reads."""
        self.needed = 0
        """The oldest version that a later forward reads."""

    def begin(self) -> None:
        """Begin to count at the newest version; nothing is under way."""
        assert not self.under_way, self.under_way
        self.spare += [slot for version, slot in self.slots.items() if version != self.newest]
        self.slots, self.newest, self.needed = {0: self.slots[self.newest]}, 0, 0

    def forward(self, microbatch: int) -> None:
        """Let a micro-batch read its version: before its forward."""
        version = self.under_way[microbatch] = self.reads(microbatch, self.newest)
        after = self.following(microbatch)
        self.needed = NEWEST if after is None else self.reads(after, NEWEST)
        self._use(version)

    def backward(self, microbatch: int) -> None:
        """Let a micro-batch read its version again, for the last time: before its backward."""
        self._use(self.under_way.pop(microbatch))

    def latest(self) -> None:
        """Use the newest version: who saves the model or evaluates it reads that."""
        self._use(self.newest)

    def _use(self, version: int) -> None:
        for parameter, storage in zip(self.parameters, self.slots[version], strict=True):
            parameter.data = storage

    def renew(self, step: Callable[[], object], gradients: Mapping[nn.Parameter, torch.Tensor | None]) -> None:
        """Make the next version with an optimizer's step; what nobody reads any more is overwritten first."""
        read = set(self.under_way.values())
        for version in [v for v in self.slots if v not in read and v < min(self.needed, self.newest)]:
            self.spare.append(self.slots.pop(version))
        if self.newest in read or self.needed <= self.newest:
            slot = self._free()
            for to, now in zip(slot, self.slots[self.newest], strict=True):
                to.copy_(now)
        else:
            slot = self.slots.pop(self.newest)
        for own, storage, parameter in zip(self.own, slot, self.parameters, strict=True):
            own.data, own.grad = storage, gradients.get(parameter)
        step()
        for own in self.own:
            own.grad = None
        self.newest += 1
        self.slots[self.newest] = slot
        self.latest()

    def _free(self) -> Storages:
        if self.spare:
            return self.spare.pop()
        assert len(self.slots) < self.most, f"{len(self.slots)} versions are read of {self.most}"
        return [torch.empty_like(parameter) for parameter in self.parameters]

    @property
    def nbytes(self) -> int:
        """Bytes of all versions but the one in use."""
        storages = [storage for slot in (*self.slots.values(), *self.spare) for storage in slot]
        return sum(storage.nbytes for storage in storages) - sum(parameter.nbytes for parameter in self.parameters)
