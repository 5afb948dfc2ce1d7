"""A run's initial weights: made once, as a plain loop's, and read by every rank for its own stage.

The first rank of a host builds the whole model and writes its tensors to a file. All ranks cut a model without storage
(`executor.hollow`) and read from the file what their stage holds, so the whole model is in memory once, for as long as
writing it takes. Where a model cannot be made or cut so (its forward looks at values), every rank builds it whole.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executor import devices, hollow
from executor.hollow import is_hollow, places, real
from executor.layers import LayeredModel, cut
from executor.model_file import ModelFile
from planner.basis.errors import DEVICE, PlanError
from planner.basis.units import size

FILE = "initial.pt"
"""In the run's folder, until all ranks have read it."""

_HOST = torch.device("cpu")
_LOOK_S = 0.02
_LOG = logging.getLogger("foreplan")


class Weights:
    """The values of a model's parameters without data, in a file of which only what is asked for is read."""

    def __init__(self, saved: dict[str, Any], model: nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = saved["tensors"]
        self.names = {id(tensor): name for name, tensor in reversed(list(_named(model)))}
        self.empty = [tensor for _, _, tensor in places([model])]  # so that nobody else gets their identities
        self.made: dict[int, torch.Tensor] = {}
        self.extra: dict[str, Any] = saved["extra"]

    def real(self, tensor: torch.Tensor, device: torch.device = _HOST) -> torch.Tensor:
        """Return the values of one of the model's tensors, on a device and in memory of their own."""
        return self.tensors[self.names[id(tensor)]].to(device, copy=True)

    def load(self, layered: LayeredModel, parts: list[Any], device: torch.device) -> None:
        """Give parts of a model (a stage, the loss) their values; the rest of it stays without data."""
        modules = [part for part in parts if isinstance(part, nn.Module)]
        own = {id(tensor) for _, _, tensor in places(modules)}
        everywhere = [layered.model, *(layer.module for layer in layered.layers), *modules]
        self._fill(everywhere, device, own)
        if layered.surroundings is not None:
            layered.surroundings.fill = lambda module: self._fill([module], device, None)
            for part in modules:
                layered.surroundings.ready(getattr(part, "ambient", ()), device)

    def _fill(self, modules: Iterable[nn.Module], device: torch.device, only: set[int] | None) -> None:
        hollow.fill(modules, lambda tensor: self.real(tensor, device), only=only, made=self.made)

    def close(self) -> None:
        """Let go of the file."""
        self.tensors, self.empty, self.made = {}, [], {}


def cut_hollow(file: ModelFile, seed: int, folder: Path, *, first: bool) -> tuple[LayeredModel, Weights | None]:
    """Return the cut model of a run, and its weights where it has none itself: `torch.manual_seed(seed); model()`'s.

    To be called by all ranks of a host, of which the `first` writes the weights to `folder`, and the others wait for
    them. The random state is then as it is behind `model()`. Raises `PlanError` as building and cutting do.
    """
    if first:
        write(file, seed, folder / FILE)
    else:
        while not (folder / FILE).exists():
            time.sleep(_LOOK_S)
    try:
        return read(file, seed, folder / FILE)
    except _Whole as reason:
        _LOG.warning("every rank builds the whole model: %s", reason)
        return cut(file, real(file, seed)), None


def write(file: ModelFile, seed: int, path: Path) -> None:
    """Build a model and write its tensors, and the random state behind it; an empty file where they are not apart."""
    model = real(file, seed)
    part = path.with_suffix(".part")
    try:
        if _apart(model):
            tensors = {name: tensor.detach() for name, tensor in _named(model)}
            extra = {name: module.get_extra_state() for name, module in extra_states(model).items()}
            torch.save({"tensors": tensors, "random": torch.get_rng_state(), "extra": extra}, part)
        else:
            part.touch()
    except (OSError, RuntimeError) as error:  # a full disk: torch raises the latter
        _LOG.warning("the initial weights cannot be written: %s", error)
        part.write_bytes(b"")
    part.replace(path)
    del model
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def check_room(needed: int, where: str) -> None:
    """Raise `PlanError` (exit 5), before anything is built, when a model of so many bytes does not fit this host."""
    free, limit = devices.free_bytes("cpu"), devices.memory_bytes("cpu")
    if needed > free:
        raise PlanError(
            what="the model is too large for this host's memory",
            where=where,
            why=f"its parameters and buffers take {size(needed)}, and {size(free)} are free of {size(limit)} "
            "(the host's, or its control group's limit)",
            fix="run it where there is more memory, free some, or let model() make it in a smaller dtype",
            code=DEVICE,
        )


class _Whole(Exception):  # noqa: N818 - no error: a reason to take another way
    """Why a model has to be built whole on every rank."""


def read(file: ModelFile, seed: int, path: Path) -> tuple[LayeredModel, Weights]:
    """Return the cut model without storage for parameters, and their values, in the file at `path`."""
    if not path.stat().st_size:
        raise _Whole("its tensors cannot be written apart from each other")
    saved = torch.load(path, mmap=True, weights_only=False)
    try:
        model = hollow.build(file, seed)
    except PlanError as error:
        raise _Whole(f"it cannot be made without storage ({error.why})") from error
    if not hollow.hollow(model):
        _LOG.warning("every rank holds the whole model: model() returns what it has made before")
    _restore(model, saved["tensors"])
    weights = Weights(saved, model)
    try:
        layered = cut(file, model)
    except PlanError as error:
        raise _Whole(f"it cannot be cut without storage ({error.why})") from error
    torch.set_rng_state(saved["random"])
    return layered, weights


def _restore(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give all tensors of a model but its parameters without data the values that are saved of them."""
    named = dict(_named(model))
    alike = named.keys() == values.keys() and all(
        (t.shape, t.dtype, t.device) == (values[n].shape, values[n].dtype, values[n].device) for n, t in named.items()
    )
    if not alike:
        raise _Whole("it is another one without storage")
    lost = [name for name, tensor in named.items() if is_hollow(tensor) and not isinstance(tensor, nn.Parameter)]
    for name in lost:
        path, _, attribute = name.rpartition(".")
        if attribute.endswith("]"):
            raise _Whole(f"{name} is made of a parameter")
        setattr(model.get_submodule(path), attribute, values[name].clone())
    with torch.no_grad():
        for name, tensor in named.items():
            if not is_hollow(tensor):
                tensor.detach().copy_(values[name])


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors of a model by name: parameters, buffers, and what its modules hold as plain attributes."""
    found = set[int]()
    for part, name, tensor in _places_with_names(model):
        found.add(id(tensor))
        yield f"{part}{name}", tensor
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for place, tensor in _inside(value):
                if id(tensor) not in found:
                    yield f"{path}{'.' if path else ''}{name}{place}", tensor


def _places_with_names(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for path, part in model.named_modules(remove_duplicate=False):
        for named in (part.named_parameters, part.named_buffers):
            for name, tensor in named(recurse=False, remove_duplicate=False):
                yield f"{path}{'.' if path else ''}", name, tensor


def _inside(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a plain structure, with their places in it."""
    if isinstance(value, torch.Tensor):
        yield "", value
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from ((f"[{i}]{place}", tensor) for place, tensor in _inside(each))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from ((f"[{key!r}]{place}", tensor) for place, tensor in _inside(each))


def _apart(model: nn.Module) -> bool:
    """Whether every tensor of a model has memory of its own, so that each can be read without the others."""
    tensors = {id(tensor): tensor for _, tensor in _named(model) if not isinstance(tensor, nn.UninitializedParameter)}
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    lazy = any(torch.nn.parameter.is_lazy(tensor) for _, tensor in _named(model))
    return not lazy and len(set(storages)) == len(storages)


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that save more than tensors (`get_extra_state`), by its name in the model's `state_dict`."""
    return {
        f"{path}{'.' if path else ''}_extra_state": part
        for path, part in model.named_modules(remove_duplicate=False)
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }
