"""Models without storage: every parameter has a shape, a dtype and a device, and takes no memory.

Buffers and everything else of the modules are real, so a constructor may compute with values of its own. What is made
of parameters is without data, too. Such a model can be captured, cut and counted; a part of it that is to run gets
real tensors by `fill`, or for a while by `stored`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from executor.model_file import ModelFile, load
from executor.torch_adapter import (
    copy_hooks,
    own_attributes,
    parameters_without_data,
    watching_parameters,
    without_data,
)
from planner.basis.errors import RUN_FAILED, PlanError

Make = Callable[[torch.Tensor], torch.Tensor]
"""From a tensor without data to a real one of the same shape and dtype."""

_BLOCK = 2**16
"""Numbers that are drawn for `harmless`; a large tensor repeats them."""


def build(file: ModelFile, seed: int) -> nn.Module:
    """Make the user's model without storage for parameters. At most one of them is in memory at a time.

    Raises `PlanError` when `model()` fails, also where only a model with values would do.
    """
    with torch.random.fork_rng(devices=[]), parameters_without_data():
        return file.build(seed)


def real(file: ModelFile, seed: int) -> nn.Module:
    """Make the user's model with storage, also where `model()` keeps what it has made without.

    The file is then imported anew, and with it what it keeps. Raises `PlanError` where that does not help.
    """
    model = file.build(seed)
    if hollow(model):
        model = load(file.path, file.sequence).build(seed)
    if hollow(model):
        raise PlanError(
            what="model() returns modules that it made in a call before",
            where=file.path,
            why="the model is made several times, once without memory for its parameters, and a file that it imports "
            "keeps that one",
            fix="make all modules anew in every call of model()",
            code=RUN_FAILED,
        )
    return model


class _TooLarge(KeyboardInterrupt):
    """Ends `model()` as a Ctrl-C does, which nobody takes for a fault of the model file."""


def built_within(file: ModelFile, seed: int, limit_bytes: float) -> nn.Module:
    """Make the user's model, without storage for its parameters where these take more than a limit.

    No more than the limit, and one parameter, is in memory before that is known. Raises `PlanError` when `model()`
    fails.
    """
    held = 0

    def count(parameter: nn.Parameter) -> None:
        nonlocal held
        held += 0 if torch.nn.parameter.is_lazy(parameter) else parameter.nbytes
        if held > limit_bytes:
            raise _TooLarge

    try:
        with watching_parameters(count):
            return file.build(seed)
    except _TooLarge:
        pass  # and let go of what was made: the exception's frames hold it
    model = build(file, seed)
    return model if held_bytes(model) > limit_bytes else real(file, seed)  # one may be registered several times


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data: made here, or on torch's meta device."""
    return tensor.is_meta or without_data(tensor)


def hollow(module: nn.Module) -> bool:
    """Whether any parameter or buffer of a module has no data."""
    return any(is_hollow(tensor) for _, _, tensor in places([module]))


def places(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Return every parameter and buffer of some modules with the place that holds it, a shared one at each place."""
    return [
        (part, name, tensor)
        for module in modules
        for part in module.modules()
        for named in (part.named_parameters, part.named_buffers)
        for name, tensor in named(recurse=False, remove_duplicate=False)
    ]


def held_bytes(module: nn.Module) -> int:
    """Return what a module's parameters and buffers take, or would take with data; what is shared once."""
    return sum({id(tensor): tensor.nbytes for _, _, tensor in places([module])}.values())


def fill(
    modules: Iterable[nn.Module],
    make: Make,
    *,
    only: Container[int] | None = None,
    made: dict[int, torch.Tensor] | None = None,
) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Give modules real tensors in place of those without data; what they share stays shared.

    A parameter keeps the attributes and hooks that its user has set. With `only`, tensors of these identities are
    replaced; what was `made` before, by the identity of what it replaces, is used again. Returns what was replaced, and
    where.
    """
    replaced = list[tuple[nn.Module, str, torch.Tensor]]()
    made = {} if made is None else made
    for part, name, tensor in places(modules):
        if not is_hollow(tensor) or (only is not None and id(tensor) not in only):
            continue
        if id(tensor) not in made:
            new = make(tensor)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                vars(new).update(own_attributes(tensor))
                copy_hooks(tensor, new)
            made[id(tensor)] = new
        replaced.append((part, name, tensor))
    for part, name, tensor in replaced:
        setattr(part, name, made[id(tensor)])
    return replaced


@contextmanager
def stored(modules: Iterable[nn.Module], make: Make) -> Iterator[None]:
    """Give modules real tensors while inside; then they are without data again, and what was made is let go of."""
    replaced = fill(modules, make)
    try:
        yield
    finally:
        for part, name, tensor in replaced:
            setattr(part, name, tensor)


def harmless(device: torch.device) -> Make:
    """Return a `Make` whose values cost what any others do: no zeros, no denormals, and sums that stay near one.

    Random, the same in every call; matrices are scaled with their inputs, vectors are ones.
    """
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))

    def make(tensor: torch.Tensor) -> torch.Tensor:
        flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=device)
        if tensor.dtype.itemsize > 1 and (tensor.is_floating_point() or tensor.is_complex()):
            scaled = block / math.sqrt(max(1, tensor[0].numel())) if tensor.dim() > 1 else torch.ones(_BLOCK)
            for part in flat.split(_BLOCK):
                part.copy_(scaled[: len(part)])
        return flat.view(tensor.shape)

    return make
