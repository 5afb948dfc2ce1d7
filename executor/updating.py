"""The user's optimizer, made of the whole model and left with what one stage trains of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from executor.model_file import ModelFile
from planner.basis.errors import PlanError


def own_optimizer(
    file: ModelFile, model: nn.Module, trained: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer | None:
    """Make the optimizer of the whole model, and leave to it what one stage trains; None where that is nothing.

    `trained` are the stage's own parameters by their names in the model.
    What a group is, and its learning rate, may follow from all parameters: how many there are, or a place among them.
    Groups without any parameter here stay, so that a scheduler finds as many as in a plain loop. An optimizer that
    cannot be made of parameters without data, or has state of them at once, is made of the stage's own.
    """
    every = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {id(parameter): trained[name] for name, parameter in every.items() if name in trained}
    try:
        optimizer = file.optimizer_of(every.items())
    except PlanError:
        return _of_its_own(file, trained)
    if optimizer is None:
        return None
    if any(own.get(id(p), p) is not p for p in optimizer.state):  # made with the optimizer, of parameters as they are
        return _of_its_own(file, trained)
    for group in optimizer.param_groups:
        group["params"] = [own[id(parameter)] for parameter in group["params"] if id(parameter) in own]
    for parameter in [p for p in optimizer.state if isinstance(p, torch.Tensor) and own.get(id(p)) is not p]:
        del optimizer.state[parameter]
    return optimizer if any(group["params"] for group in optimizer.param_groups) else None


def _of_its_own(file: ModelFile, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer | None:
    return file.optimizer_of(trained.items()) if trained else None
