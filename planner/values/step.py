"""A training step as it is kept of a long run: five numbers, where a trace would be thousands."""

from __future__ import annotations

import math
from typing import NamedTuple


class Step(NamedTuple):
    """When a step began and ended, in seconds of the ranks' common clock, its mean loss, its rate and its norm.

    `rate` is the learning rate of the optimizer's first group; NaN where nothing is trained. `norm` is the gradients'
    before they are clipped; NaN where they are not.
    """

    begin: float
    end: float
    loss: float
    rate: float
    norm: float = math.nan
