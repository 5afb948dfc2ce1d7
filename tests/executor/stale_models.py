"""Model files for runs without flush: dropout, recompute-able layers, optimizers with state, a rate that changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

batch_size = 16


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 12)
    return inputs, inputs[:, :4].argmax(dim=1)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.Dropout(0.3), nn.Linear(24, 16), nn.LayerNorm(16), nn.Linear(16, 16),
        nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4),
    )  # fmt: skip


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.8, nesterov=True)


def scheduler(of: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(of, lambda step: 0.9**step)


def evaluate() -> torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(21, 12, generator=generator)
    return torch.utils.data.TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


adam = model


def adam_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
