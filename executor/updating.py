"""The user's optimizer, made of the whole model and left with what one stage trains of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from executor.model_file import ModelFile
from planner.basis.errors import PlanError


def own_optimizer(
    file: ModelFile, model: nn.Module, names: dict[int, str], trained: Sequence[nn.Parameter]
) -> torch.optim.Optimizer | None:
    """Make the optimizer of the whole model, and leave to it what one stage trains; None where that is nothing.

    What a group is, and its learning rate, may follow from all parameters: how many there are, or a place among them.
    Groups without any parameter here stay, so that a scheduler finds as many as in a plain loop. An optimizer that
    cannot be made of parameters without data is made of the stage's own.
    """
    own = {id(parameter) for parameter in trained}
    try:
        optimizer = file.optimizer_of((n, p) for n, p in model.named_parameters() if p.requires_grad)
    except PlanError:
        optimizer = file.optimizer_of((names[id(p)], p) for p in trained)
    if optimizer is None:
        return None
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
    for parameter in [p for p in optimizer.state if isinstance(p, torch.Tensor) and id(p) not in own]:
        del optimizer.state[parameter]
    return optimizer if any(group["params"] for group in optimizer.param_groups) else None
