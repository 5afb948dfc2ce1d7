"""What an update needs to know of all gradients, over all stages and replicas: their norm, and whether any overflows.

As `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler` over the whole model's parameters: every parameter
counts once, however many stages or replicas hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    """The gradients of one rank's stage on their way to an update, as a part of all.

    `most` is the norm to which all are clipped, 0 where they are not; they are divided by the scale of the loss where
    there is `scaling`. `trained` are the stage's parameters. Those that an earlier stage holds, too, are `elsewhere`:
    they count there. As many ranks as `holders` have the same gradients.
    """

    def __init__(
        self,
        most: float,
        scaling: Scaling | None,
        trained: Sequence[nn.Parameter],
        elsewhere: Iterable[nn.Parameter],
        holders: int,
        device: torch.device,
    ) -> None:
        others = {id(parameter) for parameter in elsewhere}
        self.most, self.scaling, self.trained, self.holders, self.device = most, scaling, trained, holders, device
        self.counted = [parameter for parameter in trained if id(parameter) not in others]
        self.norm, self.overflown = torch.zeros((), device=device), torch.zeros((), device=device)

    def measure(self) -> None:
        """Look at this rank's gradients, and divide them by the scale of the loss."""
        if self.scaling is not None:
            self.overflown = self.scaling.unscale(self.trained).to(self.device)
        if self.most:
            self.norm = norm_of(self.counted).to(self.device)

    def agree(self) -> None:
        """Make what all ranks have found into what holds for the whole model."""
        found = torch.stack([self.norm.double() ** 2 / self.holders, self.overflown.double()])
        dist.all_reduce(found)
        self.norm, self.overflown = found[0].sqrt().to(self.norm.dtype), (found[1] > 0).float()

    @property
    def found(self) -> torch.Tensor | None:
        """The norm of all gradients of the last step before they were clipped; None where nobody asked for it."""
        return self.norm if self.most else None

    def ready(self) -> bool:
        """Clip the gradients; return whether they may be used, or overflow somewhere and are to be left out."""
        if self.most:
            scale(self.trained, self.most, self.norm)
        if self.scaling is None:
            return True
        self.scaling.update(self.overflown)
        return not self.overflown.item()
