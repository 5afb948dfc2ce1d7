"""What an evaluation of a model has found, at one moment of its training."""

from __future__ import annotations

import msgspec

from planner.orders import schedules
from planner.values.plan import Plan


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """A model's mean loss and metrics over `samples` of validation data, behind `step` training steps; `seconds` long.

    `metrics` are the model file's, by its names.
    """

    step: int
    loss: float
    metrics: dict[str, float] = {}
    samples: int
    seconds: float


def forward_only(plan: Plan) -> Plan | None:
    """Return the plan that evaluates what a plan trains: the same stages, and forwards alone.

    None where devices hold several stages, whose forwards no schedule has alone.
    """
    if schedules.get(plan.schedule).placement != "straight":
        return None
    return msgspec.structs.replace(
        plan,
        strategy="forward-only",
        schedule="forward-only",
        tied=(),
        norm=False,
        recompute=False,
        recompute_layers=(),
        recompute_blocks=(),
        offload=False,
        host_optimizer=False,
        bucket_bytes=0,
    )
