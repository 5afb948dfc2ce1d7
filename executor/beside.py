"""Gradients that are reduced while the next micro-batch is computed: two sets of buckets that take turns.

computing   B0  hand over  F1 B1  hand over, take, update  F2 B2  hand over, take, update
set a       B0  reduced ─────────────────── used           B2
set b                         B1  reduced ──────────────────────────────── used
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from executor.reduction import bucket, filled


@dataclass
class _Set:
    """Room for all gradients; with a number for each parameter: has it a gradient here? See `executor.reduction`."""

    flats: list[torch.Tensor]
    views: dict[nn.Parameter, torch.Tensor]
    numbers: torch.Tensor
    works: list[dist.Work]
    whole: bool = True


class Beside:
    """The gradients of a stage on one of the ranks that hold it, which take micro-batches in turn or in step.

    What is used is the mean over the ranks. What none of them uses has no gradient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int) -> None:
        self.parameters, self.group, self.bucket_bytes = tuple(parameters), group, bucket_bytes
        self.spare = [self._room() for _ in range(2)]
        self.reduced: list[_Set] = []
        self.current: _Set | None = None
        self.reached: set[int] = set()
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._note)
        self._go_on()

    def _room(self) -> _Set:
        groups = list(filled(reversed(self.parameters), self.bucket_bytes)) or [[]]
        count = len(self.parameters)
        made = [bucket(own, count if own is groups[0] else 0) for own in groups]
        views = {parameter: view for _, own in made for parameter, view in own.items()}
        flats = [flat for flat, _ in made]
        return _Set(flats, views, flats[0][-count:] if count else flats[0][:0], [])

    def _note(self, parameter: torch.Tensor) -> None:
        self.reached.add(id(parameter))

    def _go_on(self) -> None:
        """Let backwards add to a set that is free."""
        self.current = self.spare.pop() if self.spare else None
        for parameter in self.parameters:
            parameter.grad = self.current.views[parameter] if self.current is not None else None

    def hand_over(self) -> None:
        """Begin to reduce what backwards have added, and go on with the other set as soon as it has been used."""
        own = self.current
        assert own is not None, "the set before has been used"
        here = [id(parameter) in self.reached for parameter in self.parameters]
        self.reached.clear()
        own.whole = all(here)
        own.numbers.copy_(torch.tensor(here, dtype=own.numbers.dtype))
        for flat in own.flats:
            flat.div_(self.group.size())
        own.works = [dist.all_reduce(flat, group=self.group, async_op=True) for flat in own.flats]
        self.reduced.append(own)
        self._go_on()

    def arrive(self) -> None:
        """Wait until what was handed over first has been reduced."""
        for work in self.reduced[0].works:
            work.wait()

    def take(self) -> dict[nn.Parameter, torch.Tensor | None]:
        """Return what was handed over first: each parameter's gradient, None of what nobody has used."""
        own = self.reduced[0]
        used = [True] * len(self.parameters) if own.whole else (own.numbers > 0).tolist()
        return {p: own.views[p] if there else None for p, there in zip(self.parameters, used, strict=True)}

    def clear(self) -> None:
        """Let go of what has been taken: its set is free."""
        own = self.reduced.pop(0)
        for flat in own.flats:
            flat.zero_()
        self.spare.append(own)
        if self.current is None:
            self._go_on()

    @property
    def nbytes(self) -> int:
        """Bytes of gradients that are not the parameters' own now."""
        return sum(flat.nbytes for own in (*self.reduced, *self.spare) for flat in own.flats)
