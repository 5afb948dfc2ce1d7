"""The scale of the loss in float16, as `torch.amp.GradScaler` has it, for stages that agree on what overflows.

Gradients in float16 vanish below 6e-8, so the loss is multiplied by a scale and gradients divided by it. Where one
of them is infinite or no number the update is left out everywhere and the scale is halved; after many updates it
doubles. All ranks start with the same scale and learn the same of every step, so nobody has to send it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from executor.torch_adapter import next_scale, unscaled

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""`torch.amp.GradScaler`'s defaults."""


class Scaling:
    """The scale on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self.updates = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Divide gradients by the scale; return 1 if any of them is infinite or no number, else 0."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return unscaled(gradients, self.scale.double().reciprocal().float())

    def update(self, overflown: torch.Tensor) -> None:
        """Take the next step's scale, from whether this one's gradients were `overflown` anywhere."""
        next_scale(self.scale, self.updates, overflown, GROWTH, BACKOFF, INTERVAL)
