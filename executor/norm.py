"""The norm of all gradients, over all stages and replicas, and what follows from it before an update: clipping.

As `torch.nn.utils.clip_grad_norm_` over the whole model's parameters: every parameter counts once, however many stages
or replicas hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn


def norm_of(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the L2 norm of the gradients that there are."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def scale(parameters: Iterable[nn.Parameter], most: float, norm: torch.Tensor) -> None:
    """Scale the gradients so that a `norm` of more than `most` becomes that: always a product, as torch has it."""
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)


class Clipping:
    """The gradients of one rank's stage on their way to an update.

    `trained` are its parameters. Those that an earlier stage holds, too, are `elsewhere`: they count there. As many
    ranks as `holders` have the same gradients.
    """

    def __init__(
        self,
        most: float,
        trained: Sequence[nn.Parameter],
        elsewhere: Iterable[nn.Parameter],
        holders: int,
        device: torch.device,
    ) -> None:
        others = {id(parameter) for parameter in elsewhere}
        self.most, self.trained, self.holders, self.device = most, trained, holders, device
        self.counted = [parameter for parameter in trained if id(parameter) not in others]
        self.norm = torch.zeros((), device=device)

    def measure(self) -> None:
        """Take the norm of this rank's gradients."""
        self.norm = norm_of(self.counted).to(self.device)

    def agree(self) -> None:
        """Make the norms of all ranks into that of the whole model."""
        square = self.norm.double() ** 2 / self.holders
        dist.all_reduce(square)
        self.norm = square.sqrt().to(self.norm.dtype)

    def apply(self) -> None:
        """Clip the gradients."""
        if self.most:
            scale(self.trained, self.most, self.norm)
