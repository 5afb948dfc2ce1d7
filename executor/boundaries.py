"""What passes between stages: the shapes, dtypes and gradient flags of every boundary, found without computing."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from executor.batch import to
from executor.hollow import places
from executor.layer import as_tuple
from executor.layers import LayeredModel, unchanged_buffers
from executor.model_file import ModelFile
from executor.stage_module import StageModule
from executor.surroundings import aim
from executor.torch_adapter import tensors_without_data


class Described(NamedTuple):
    """A tensor that passes: its shape, its dtype, and whether a gradient comes back for it."""

    shape: torch.Size
    dtype: torch.dtype
    gradient: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize

    def empty(self, device: torch.device) -> torch.Tensor:
        """Return a tensor to receive it in."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Boundary(NamedTuple):
    """What goes into a stage and what comes out of it, of one micro-batch; nothing comes out of the last."""

    taken: tuple[Described, ...]
    made: tuple[Described, ...]


def boundaries(
    file: ModelFile, layered: LayeredModel, stages: tuple[range, ...], samples: int, device: torch.device
) -> tuple[Boundary, ...]:
    """Return the boundaries of all stages, given by their layers.

    One micro-batch goes through the whole model, without data unless the model needs some. In a lower precision each
    kind of device chooses dtypes of its own: there it goes through copies of the layers on it.
    """
    values, _ = layered.parted(*file.draw(samples, seed=0))
    there = bool(file.precision) and device.type != "cpu"

    def passed() -> list[tuple[Described, ...]]:
        modules = (_copied(layered, own, device) if there else layered.stage(own) for own in stages)
        return _passed(modules, tuple(to(value, device) for value in values) if there else values)

    try:
        with unchanged_buffers(layered.model), tensors_without_data(layered.model.parameters()):
            found = passed()
    except Exception:  # a layer looks at values: those that there are will do, as they did when it was cut
        with unchanged_buffers(layered.model):
            found = passed()
    finally:
        if layered.surroundings is not None:
            layered.surroundings.made.clear()  # what they hold may be without data, too
    return tuple(Boundary(*pair) for pair in zip(found, (*found[1:], ()), strict=True))


def _passed(modules: Iterable[StageModule], values: tuple[torch.Tensor, ...]) -> list[tuple[Described, ...]]:
    """Say what goes into each of some modules that are run one after another."""
    found: list[tuple[Described, ...]] = []
    with torch.random.fork_rng(devices=[]):
        for module in modules:
            inputs = [v.detach().requires_grad_(v.requires_grad) for v in values]
            found.append(tuple(Described(v.shape, v.dtype, v.requires_grad) for v in inputs))
            values = as_tuple(module(*inputs)) if module.outputs else ()
    return found


def _copied(layered: LayeredModel, run: range, device: torch.device) -> StageModule:
    """Return a run of layers as a module on a device, of copies; without data where tensors are made without."""
    layers = list(layered.layers)
    for i in run:
        module = copy.deepcopy(layers[i].module)
        aim(module, device)
        for part, name, tensor in places([module]):
            there = tensor.detach().to(device)
            whole = isinstance(tensor, torch.nn.Parameter)
            setattr(part, name, torch.nn.Parameter(there, requires_grad=tensor.requires_grad) if whole else there)
        layers[i] = replace(layers[i], module=module)
    return replace(layered, layers=tuple(layers)).stage(run)
