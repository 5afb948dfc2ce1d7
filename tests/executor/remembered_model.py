"""A model with much to remember: dropout, statistics, draws of Python's own, shuffled data, momentum, clipping.

Once, where the environment names a file that is not there, it is killed in the middle of its training.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

KILLED = "FOREPLAN_TEST_KILLED"
FATAL = 40
"""The forward in which it is killed, of a micro-batch."""


class Drawing(nn.Module):
    """Scales what it is given by what Python draws."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        mark = os.environ.get(KILLED)
        if mark and self.forwards == FATAL and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x * (0.9 if random.random() < 0.5 else 1.0)


class Marked(nn.Module):
    """As `Drawing`, and draws nothing: what Python draws is another thing in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.drawing = Drawing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = random.getstate()
        random.seed(0)
        found = self.drawing(x)
        random.setstate(state)
        return found


def model(middle: nn.Module | None = None) -> nn.Module:
    first = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16)]
    return nn.Sequential(*first, middle or Drawing(), nn.Dropout(0.2), nn.Linear(16, 4))


def data() -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16, shuffle=True, num_workers=1)


loss = nn.functional.cross_entropy
clip = 1.0


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def scheduler(optimizer, steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)


def killed() -> nn.Module:
    return model(Marked())


def scaled() -> nn.Module:
    return model()


scaled_precision = "fp16"
