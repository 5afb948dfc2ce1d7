"""A cut model whose tensors have no data for a while: kinds are found and bytes counted without computing anything.

What counts is the profiler's own code (`profiles.sizes`), so what is saved and sent comes out the same to the byte. A
peak is that of live tensors: what a kernel needs for itself is not seen. A model that looks at values cannot be
counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn

from executor.hollow import is_hollow, places
from executor.layers import LayeredModel
from executor.torch_adapter import pytree, tensors_without_data
from planner.values.profile import LayerSizes
from profiles.chain import Chain
from profiles.counting import Counter
from profiles.sizes import PEAKS, recorded_sizes

T = TypeVar("T")

Counted = tuple[list[LayerSizes], dict[str, tuple[int, bool]]]
"""Every part's bytes at one micro-batch size, the loss last, and each value's (bytes, has a gradient)."""


@contextmanager
def emptied(layered: LayeredModel) -> Iterator[None]:
    """Take the data out of a cut model's parameters and buffers while inside; then it has them again, unchanged."""
    loss = [layered.loss] if isinstance(layered.loss, nn.Module) else []
    held = places([layered.model, *(layer.module for layer in layered.layers), *loss])
    made: dict[int, torch.Tensor] = {}
    surroundings = layered.surroundings
    try:
        if surroundings is not None:
            surroundings.made.clear()  # of constants with data, and behind it of such without
        with tensors_without_data(tensor for _, _, tensor in held):
            for part, name, tensor in held:
                if not is_hollow(tensor):
                    setattr(part, name, made.setdefault(id(tensor), _like(tensor)))
            yield
    finally:
        for part, name, tensor in held:
            setattr(part, name, tensor)
        if surroundings is not None:
            surroundings.made.clear()


def _like(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def without_data(layered: LayeredModel, batch: Any, work: Callable[[Any], T]) -> T | None:
    """Return what some work finds of a cut model and a batch without data; None where it needs some."""
    try:
        with emptied(layered):
            return work(pytree.tree_map_only(torch.Tensor, torch.empty_like, batch))
    except Exception:  # whatever a model's own code says when it looks at values that are not there
        return None


def count(chain: Chain, samples: int) -> Counted | None:
    """Count the bytes of a chain's layers at one micro-batch size without data; None where that is not possible."""
    file = chain.file
    if file.compiled:
        return None
    drawn = file.drawn(samples, seed=samples)

    def counted(batch: Any) -> Counted:
        ready = dataclasses.replace(file, batch=lambda n: batch, data=None)
        return recorded_sizes(Chain(ready, chain.layered, chain.device, resident=False), Counter(), samples)

    return without_data(chain.layered, (drawn.given, drawn.targets), counted)


def following(found: Counted, without: Counted, known: Sequence[LayerSizes]) -> Counted:
    """Return bytes that were counted without data with the peaks that they have where data are known.

    `without` is the count of the `known` number of samples without data: by as much as its peaks are too low, the
    others are.
    """
    sizes = [
        msgspec.structs.replace(
            own, **{peak: _scaled(getattr(own, peak), getattr(less, peak), getattr(real, peak)) for peak in PEAKS}
        )
        for own, less, real in zip(found[0], without[0], known, strict=True)
    ]
    return sizes, found[1]


def _scaled(own: int, less: int, real: int) -> int:
    return round(own * real / less) if less else own
