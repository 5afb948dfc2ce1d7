"""Training and evaluation modes: switched for a while, and every module gets its own back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode while inside.

    Behind it each part is in the mode that it had: what its author keeps in evaluation mode (a frozen batch norm) while
    the rest trains stays there, which `train()` would not do.
    """
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training
