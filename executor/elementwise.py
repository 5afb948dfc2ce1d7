"""Whether the user's optimizer can update parts of parameters: tried on small ones, whole and in parts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from executor.model_file import ModelFile
from executor.seeding import seeded
from executor.updating import own_optimizer
from planner.basis.errors import PlanError

STEPS = 3
_MOST = 256
"""Numbers along a dimension of a parameter that is tried: more than optimizers ask for before they factor it."""
_RATE = 0.1
"""The learning rate of the trial: a schedule may begin with none."""


def check_elementwise(file: ModelFile, model: nn.Module, synchronisation: str) -> None:
    """Raise `PlanError` when updates of parts of parameters are not the parts of an update of the whole ones.

    Of every group of the optimizer one parameter of each number of dimensions is tried, with values and gradients of a
    trial's own. LARS, LAMB, Adafactor, Shampoo and Muon fail: they look at a whole parameter at once.
    """
    shapes = _shapes(file, model)
    if not shapes:
        return
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = [{n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(STEPS)]
    whole = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    halves = [
        {name: nn.Parameter(value.reshape(-1).tensor_split(2)[i].clone()) for name, value in values.items()}
        for i in range(2)
    ]
    try:
        _train(file, model, whole, gradients)
        for i, half in enumerate(halves):
            parts = [{n: g.reshape(-1).tensor_split(2)[i] for n, g in step.items()} for step in gradients]
            _train(file, model, half, parts)
        joined = {name: torch.cat([half[name].detach() for half in halves]) for name in shapes}
        other = [n for n in shapes if not torch.allclose(joined[n], whole[n].detach().reshape(-1), 1e-4, 1e-5)]
        why = f"it looks at more than one number of {other[0]} at a time" if other else ""
    except Exception as error:
        why = f"it cannot update a part of a parameter: {type(error).__name__}: {error}".splitlines()[0]
    if why:
        optimizer = own_optimizer(file, model, whole)
        raise PlanError(
            what=f"{type(optimizer).__name__} cannot be sharded",
            where=f"{file.path}, optimizer(), with {synchronisation}",
            why=f"each replica updates its part of every parameter, and {why}",
            fix="use an optimizer that treats every number alike (Adam, AdamW, SGD), or synchronise by all-reduce",
        )


def _shapes(file: ModelFile, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The smallest trained parameter of every group and number of dimensions, and its shape as it is tried."""
    every = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = file.optimizer_of(every.items())
    names = {id(parameter): name for name, parameter in every.items()}
    found: dict[tuple[int, int], str] = {}
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        for parameter in sorted((p for p in group["params"] if p.numel() > 1), key=lambda p: p.numel()):
            found.setdefault((number, parameter.dim()), names[id(parameter)])
    return {name: tuple(min(size, _MOST) for size in every[name].shape) for name in found.values()}


def _train(
    file: ModelFile, model: nn.Module, own: Mapping[str, nn.Parameter], gradients: list[dict[str, torch.Tensor]]
) -> None:
    optimizer = own_optimizer(file, model, own)
    assert optimizer is not None, "there are parameters"
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float):
            group["lr"] = _RATE
    for step, given in enumerate(gradients):
        for name, parameter in own.items():
            parameter.grad = given[name].clone()
        with seeded(step):
            optimizer.step()
