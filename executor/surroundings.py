"""What layers take of nobody: the batch size, and tensors that follow from it and from constants alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from executor.graph_layers import SAMPLES
from executor.layer import as_tuple
from executor.torch_adapter import replace_tensors


class Surroundings:
    """What layers take of nobody: the batch size, and tensors that follow from it and from constants.

    `batched` says of values which of their dimensions is which multiple of the batch size; `make` returns a module from
    the batch size to ambient tensors, which `fill` then gives the data that its tensors lack.
    """

    def __init__(self, batched: dict[str, tuple[int, int]], make: Callable[[tuple[str, ...]], nn.Module]) -> None:
        self.batched, self.make = batched, make
        self.fill: Callable[[nn.Module], object] = lambda module: None
        self.made: dict[tuple[tuple[str, ...], torch.device], nn.Module] = {}

    def around(self, names: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
        """Return the ambient tensors of these names, and the batch size, for a micro-batch of which some values are."""
        if not names:
            return {}
        known = next(name for name in values if name in self.batched)
        dim, factor = self.batched[known]
        samples, device = values[known].shape[dim] // factor, values[known].device
        self.ready(names, device)
        tensors = _tensors_among(names)
        results = as_tuple(self.made[tensors, device](samples)) if tensors else ()
        return {**dict(zip(tensors, results, strict=True)), SAMPLES: samples}

    def ready(self, names: tuple[str, ...], device: torch.device) -> None:
        """Make the module that makes the ambient tensors of these names, if there is none yet."""
        tensors = _tensors_among(names)
        if tensors and (tensors, device) not in self.made:
            module = self.make(tensors)
            self.fill(module)
            self.made[tensors, device] = on(module, device)


def _tensors_among(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name != SAMPLES)


def on(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a module on a device, also the tensors that it makes where it has been captured on another one."""
    aim(module, device)
    if all(tensor.device == device for tensor in (*module.parameters(), *module.buffers())):
        return module  # tensors without data, which cannot be replaced, are where they are to be
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a buffer that several layers hold stays one
    replace_tensors(module, lambda tensor: moved.setdefault(id(tensor), (tensor, tensor.to(device)))[1])
    return module


def aim(module: nn.Module, device: torch.device) -> None:
    """Let a module make its tensors on a device, wherever it has been captured."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = (
                    fx.node.map_aggregate(given, lambda a: device if isinstance(a, torch.device) else a)
                    for given in (node.args, node.kwargs)
                )
            part.recompile()
