"""Parameters that are updated on the host: gradients come down, the optimizer steps there, parameters go up again.

    device   gradients ──►          ──► parameters
    host     gradients, masters, optimizer's state: the update

The state never is on the device (ZeRO-Offload, Ren et al., arXiv 2101.06840). On a CPU both are in one memory, and the
update has the same digits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class HostUpdate:
    """What a rank updates of a stage, and its `masters` on the host, by name: of these the optimizer is made."""

    def __init__(self, updated: Mapping[str, nn.Parameter]) -> None:
        self.updated = dict(updated)
        self.masters = {name: nn.Parameter(_host_like(p).copy_(p.detach())) for name, p in self.updated.items()}
        self.begun = False
        self.gradients: dict[str, torch.Tensor] = {}

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Bring the gradients down, update the masters, and bring them up.

        Masters are read from the device before the first update: values may have come there after they were made.
        """
        for name, parameter in self.updated.items():
            master = self.masters[name]
            if not self.begun:
                master.detach().copy_(parameter.detach())
            if parameter.grad is None:
                master.grad = None
                continue
            if name not in self.gradients:
                self.gradients[name] = _host_like(parameter.grad)
            master.grad = self.gradients[name].copy_(parameter.grad, non_blocking=True)
        self.begun = True
        _wait(self.updated)
        optimizer.step()
        for name, parameter in self.updated.items():
            parameter.detach().copy_(self.masters[name].detach(), non_blocking=True)


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the host for a tensor, pinned where the tensor is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _wait(updated: Mapping[str, nn.Parameter]) -> None:
    """Wait until what was copied from a device is there."""
    for device in {parameter.device for parameter in updated.values() if parameter.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
