"""What an evaluation of a model has found, at one moment of its training."""

from __future__ import annotations

import msgspec


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """A model's mean loss and metrics over `samples` of validation data, behind `step` training steps; `seconds` long.

    `metrics` are the model file's, by its names.
    """

    step: int
    loss: float
    metrics: dict[str, float] = {}
    samples: int
    seconds: float
