"""Many identical layers in a row, counted as three: the first, one for all in between, and the last."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

import torch
from torch import nn

from executor.layer import Layer
from executor.layers import LayeredModel, as_tuple

_SIMPLE = (int, float, str, bool, type(None), torch.dtype)
_KEPT = 3


def fold(layered: LayeredModel, inputs: tuple[torch.Tensor, ...]) -> tuple[LayeredModel, tuple[int, ...]]:
    """Return a model in which rows of identical layers are shortened, and for every layer the index that stands for it.

    Layers are identical that have the same classes, settings and shapes, inside and between. What a layer keeps
    depends on its neighbours, so the first and the last of a row stay. A model whose layers share parameters, or whose
    values jump over layers, is returned as it is.
    """
    everything = layered, tuple(range(len(layered.layers)))
    signatures = [_signature(layer.module) for layer in layered.layers]
    rows = [len(list(row)) for _, row in groupby(signatures)]
    if max(rows) <= _KEPT or layered.tied() or not _in_a_row(layered):
        return everything
    shapes = _shapes(layered, inputs)
    kept: list[int] = []
    standing: list[int] = []
    row = 0
    for i, signature in enumerate(signatures):
        same = i > 0 and signature == signatures[i - 1] and shapes[i - 1] == shapes[i] == shapes[i + 1]
        row = row + 1 if same else 0
        last = i + 1 == len(signatures) or signature != signatures[i + 1] or shapes[i + 1] != shapes[i + 2]
        if row < _KEPT - 1 or last:
            kept.append(i)
        standing.append(len(kept) - 1)
    layers: list[Layer] = []
    for i in kept:
        taken = layers[-1].outputs if layers else layered.layers[i].inputs
        layers.append(dataclasses.replace(layered.layers[i], inputs=taken))
    return dataclasses.replace(layered, layers=tuple(layers)), tuple(standing)


def _in_a_row(layered: LayeredModel) -> bool:
    """Whether every layer takes just what the one before returns."""
    made = layered.inputs
    for layer in layered.layers:
        if layer.inputs != made:
            return False
        made = layer.outputs
    return True


def _shapes(layered: LayeredModel, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    """Shapes before the first layer, between layers, and after the last."""
    found: list[Any] = [[t.shape for t in inputs]]
    values: Any = inputs
    with torch.no_grad():
        for layer in layered.layers:
            values = as_tuple(layer.module(*values))
            found.append([getattr(t, "shape", None) for t in values])
    return found


def _signature(module: nn.Module) -> Any:
    """Everything that decides what a layer does with its inputs, but the values of its parameters."""
    return tuple(
        (
            name,
            type(part),
            part.training,
            tuple(
                sorted((k, v if isinstance(v, _SIMPLE) else _plain(v)) for k, v in vars(part).items() if k[0] != "_")
            ),
            tuple((k, t.shape, t.dtype, t.requires_grad) for k, t in part.named_parameters(recurse=False)),
            tuple((k, t.shape, t.dtype) for k, t in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _plain(value: Any) -> Any:
    """Tuples of numbers compare by value, anything else only with itself."""
    return repr(value) if isinstance(value, (tuple, list)) else id(value)
