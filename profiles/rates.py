"""What a step of the model file's learning-rate scheduler costs."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from executor.devices import Backend
from executor.model_file import ModelFile
from executor.rates import Rates

ROUNDS = 50
"""Steps of the scheduler that are timed: each takes some 10 to 100 microseconds."""


def rate_s(file: ModelFile, backend: Backend, model: nn.Module) -> float:
    """Return the seconds of setting a learning rate, as every stage does behind its update.

    They follow from the optimizer's groups, not from its tensors, so others stand for these: of their shapes, by which
    groups may be made, and with the memory of one number. On a GPU it is host time beside the device's work: 0.
    """
    if file.scheduler is None or backend.name != "cpu":
        return 0.0
    optimizer = file.optimizer_of(
        (name, nn.Parameter(torch.zeros(1, dtype=p.dtype).expand(p.shape)))
        for name, p in model.named_parameters()
        if p.requires_grad
    )
    if optimizer is None:
        return 0.0
    rates, seconds = Rates(file, {0: optimizer}, ROUNDS), []
    optimizer.step()
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        rates.step(0)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
