"""A training step as it is kept of a long run: four numbers, where a trace would be thousands."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """When a step began and ended, in seconds of the ranks' common clock, its mean loss, and its learning rate.

    `rate` is of the optimizer's first group; NaN where nothing is trained.
    """

    begin: float
    end: float
    loss: float
    rate: float
