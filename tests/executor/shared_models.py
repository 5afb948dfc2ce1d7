"""Model files for replicas that share their work: picked as shared_models.py:NAME."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

batch_size = 16


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 12)
    return inputs, inputs[:, :4].argmax(dim=1)


class Block(nn.Module):
    """A residual block, so that a stage has blocks where one value crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 30), nn.Linear(30, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), Block(), Block(), Block(), nn.Linear(12, 4))


def optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """As nanoGPT has it: no decay of what has one dimension, which a piece of a matrix has, too."""
    named = list(named_parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.5, "lr": 0.01},
            {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
        ],
        eps=1e-3,
    )


def clipped() -> nn.Module:
    return model()


clipped_clip = 0.3


def half() -> nn.Module:
    return model()


half_precision = "bf16"


def fp16() -> nn.Module:
    return model()


fp16_precision = "fp16"
fp16_clip = 0.5


def frozen() -> nn.Module:
    found = model()
    for parameter in found[2].parameters():
        parameter.requires_grad_(False)
    return found


class Tied(nn.Module):
    """The first layer and the last share a matrix; blocks lie between."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.blocks, self.out = nn.Linear(12, 12), nn.Sequential(Block(), Block()), nn.Linear(12, 12)
        self.out.weight = self.into.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.blocks(torch.tanh(self.into(x))))
        return out


def tied() -> nn.Module:
    return Tied()


class Routed(nn.Module):
    """Of its experts each batch uses those that its samples' signs choose; one nobody ever."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0] > 0.8).long() + 2 * (x[:, 1] > 3.5).long()
        out = x.clone()
        for i in torch.unique(chosen).tolist():
            out[chosen == i] = self.experts[i](x[chosen == i])
        return out


def routed() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), Routed(), nn.Linear(12, 4))


class Lars(torch.optim.SGD):
    """Scales every parameter's step by its norm: layer-wise adaptive rates."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(p.detach().norm() / (p.grad.norm() + 1e-9))
        return super().step(closure)


def lars() -> nn.Module:
    return model()


def lars_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return Lars(parameters, lr=0.1)


def adafactor() -> nn.Module:
    return model()


def adafactor_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters)


def muon() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 4, bias=False))


def muon_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters)


def adagrad() -> nn.Module:
    return model()


def adagrad_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.05)


def momentum() -> nn.Module:
    return model()


def momentum_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)
