"""What an update needs to know of all gradients, over all stages and replicas: their norm, and whether any overflows.

As `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler` over the whole model's parameters: every parameter
counts once, however many stages or replicas hold it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from executor.scaling import Scaling


def norm_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the L2 norm of the gradients that there are."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def scale(parameters: Iterable[nn.Parameter], most: float, norm: torch.Tensor) -> None:
    """Scale the gradients so that a `norm` of more than `most` becomes that: always a product, as torch has it."""
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)


class AllGradients:
    """The gradients of one rank's stages on their way to an update, as a part of all.

    `most` is the norm to which all are clipped, 0 where they are not; they are divided by the scale of the loss where
    there is `scaling`.
    """

    def __init__(self, most: float, scaling: Scaling | None, device: torch.device) -> None:
        self.most, self.scaling, self.device = most, scaling, device
        self.trained: dict[int, list[nn.Parameter]] = {}
        self.counted: dict[int, list[tuple[list[nn.Parameter], int]]] = {}
        self.squares, self.overflowing = torch.zeros((), device=device), torch.zeros((), device=device)
        self.norm, self.overflown = torch.zeros((), device=device), torch.zeros((), device=device)
        self.waiting: set[int] = set()

    def add(
        self, stage: int, shares: Iterable[tuple[list[nn.Parameter], int]], elsewhere: Iterable[nn.Parameter]
    ) -> None:
        """Add a stage with what this rank updates of it, and how many ranks have the same gradients of that.

        Those that an earlier stage holds, too, are `elsewhere`: they count there.
        """
        others = {id(parameter) for parameter in elsewhere}
        own = [(list(parameters), holders) for parameters, holders in shares]
        self.trained[stage] = [parameter for parameters, _ in own for parameter in parameters]
        self.counted[stage] = [([p for p in parameters if id(p) not in others], holders) for parameters, holders in own]

    def measure(self, stage: int) -> None:
        """Look at a stage's gradients, and divide them by the scale of the loss."""
        if not self.waiting:
            self.squares, self.overflowing = torch.zeros_like(self.squares), torch.zeros_like(self.overflowing)
            self.squares = self.squares.double()
        if self.scaling is not None:
            self.overflowing = self.overflowing + self.scaling.unscale(self.trained[stage]).to(self.device)
        if self.most:
            norms = [(norm_of(counted).to(self.device), holders) for counted, holders in self.counted[stage]]
            for own, holders in norms:
                self.squares = self.squares + own.double() ** 2 / holders
            alone = len(self.trained) == 1 and len(norms) == 1
            self.norm = norms[0][0] if alone else self.squares.sqrt().to(self.norm.dtype)
        self.waiting.add(stage)
        self.overflown = (self.overflowing > 0).float()

    def agree(self) -> None:
        """Make what all ranks have found into what holds for the whole model."""
        found = torch.stack([self.squares, self.overflowing.double()])
        dist.all_reduce(found)
        self.norm, self.overflown = found[0].sqrt().to(self.norm.dtype), (found[1] > 0).float()

    @property
    def found(self) -> torch.Tensor | None:
        """The norm of all gradients of the last step before they were clipped; None where nobody asked for it."""
        return self.norm if self.most else None

    def ready(self, stage: int) -> bool:
        """Clip a stage's gradients; return whether they may be used, or overflow somewhere and are to be left out."""
        if self.most:
            scale(self.trained[stage], self.most, self.norm)
        self.waiting.discard(stage)
        usable = self.scaling is None or not self.overflown.item()
        if self.scaling is not None and not self.waiting:
            self.scaling.update(self.overflown)
        return usable
