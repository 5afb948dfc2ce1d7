"""What layers hold whatever the batch, without running them: parameters, gradients and the optimizer's state."""

from __future__ import annotations

import math

import torch
from torch import nn

from executor.layers import LayeredModel
from executor.model_file import ModelFile
from executor.user_code import explained
from planner.values.profile import Tied
from profiles.sizes import Static


def tied_bytes(file: ModelFile, layered: LayeredModel) -> tuple[Tied, ...]:
    """Return the bytes of every parameter that several layers share, in the order of `LayeredModel.tied`."""
    shared = [(name, layered.model.get_parameter(name)) for name, *_ in layered.tied()]
    trained = [{name: parameter} if parameter.requires_grad else {} for name, parameter in shared]
    return tuple(
        tied_of(static_of(file, (parameter.nbytes, 0), of, mixed=False, gradients=parameter.dtype))
        for (_, parameter), of in zip(shared, trained, strict=True)
    )


def static_of(
    file: ModelFile, held: tuple[int, int], trained: dict[str, nn.Parameter], *, mixed: bool, gradients: torch.dtype
) -> Static:
    """A layer's static bytes, gradients in their own dtype. The optimizer's state is that of small stand-ins, scaled.

    Its peak is one more gradient: what the multi-tensor kernels of torch's optimizers keep in between, or the float32
    copy of a half one that it works with.
    """
    numbers = sum(p.numel() for p in trained.values())
    state = state_bytes(file, trained, mixed=mixed) + (4 * numbers if mixed else 0)
    return Static(
        parameter_bytes=held[0],
        buffer_bytes=held[1],
        gradient_bytes=numbers * gradients.itemsize,
        optimizer_bytes=state,
        optimizer_peak_bytes=4 * numbers if mixed else numbers * gradients.itemsize,
    )


def tied_of(static: Static) -> Tied:
    """Return the bytes of a parameter that layers share, from those of a layer that held it alone."""
    return Tied(
        parameter_bytes=static.parameter_bytes,
        gradient_bytes=static.gradient_bytes,
        optimizer_bytes=static.optimizer_bytes,
    )


def state_bytes(file: ModelFile, trained: dict[str, nn.Parameter], *, mixed: bool) -> int:
    """Bytes of the state of the user's optimizer after a step.

    A state with as many dimensions as its parameter is as long in each of them, or 1 long (factored moments).
    """
    small = {
        name: nn.Parameter(torch.zeros(tuple(range(2, 2 + p.dim())), dtype=torch.float32 if mixed else p.dtype))
        for name, p in trained.items()
    }
    optimizer = file.optimizer_of(small.items())
    if optimizer is None:
        return 0
    with explained(file.path, "the optimizer's step()"):
        for parameter in small.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    total = 0
    for large, parameter in zip(trained.values(), small.values(), strict=True):
        for tensor in optimizer.state.get(parameter, {}).values():
            if not isinstance(tensor, torch.Tensor):
                continue
            numbers = tensor.numel()
            if tensor.dim() == large.dim():
                pairs = zip(tensor.shape, parameter.shape, large.shape, strict=True)
                numbers = math.prod(long if has == of else has for has, of, long in pairs)
            total += numbers * tensor.element_size()
    return total
