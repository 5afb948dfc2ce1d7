"""Layers of one kind: one of them is measured or counted, and stands for all.

Layers are of one kind that do the same with inputs of the same shapes, whatever the values of their parameters, and
whose neighbours do: what a layer keeps for its backward depends on who made its inputs and who reads what it makes. So
of many equal blocks in a row three are left, the first, one for all in between, and the last. What is left has the same
neighbours in the short model: of two rows with another block between them, each has layers of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from executor.graph_layers import expression_of
from executor.layer import Layer, as_tuple
from executor.layers import LayeredModel
from executor.torch_adapter import hooks_of
from planner.values.profile import Value

_SIMPLE = (int, float, str, bool, type(None), torch.dtype)
_OWN = frozenset(vars(nn.Module()))
"""What every module has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinds:
    """A model with one layer of each kind, and for every layer of the whole model the index of what stands for it.

    `alike` groups layers of the short model that differ in their neighbours only: they take the same time.
    """

    short: LayeredModel
    standing: tuple[int, ...]
    alike: tuple[tuple[int, ...], ...]

    @property
    def folded(self) -> bool:
        """Whether any layer stands for another one."""
        return len(self.short.layers) < len(self.standing)

    def values(self, layered: LayeredModel, bytes_of: dict[int, dict[str, tuple[int, bool]]]) -> tuple[Value, ...]:
        """Return the values between all layers from the (bytes, has a gradient) of the short model's, by samples."""
        stands = {name: name for name in layered.inputs}
        for layer, part in zip(layered.layers, self.standing, strict=True):
            stands |= dict(zip(layer.outputs, self.short.layers[part].outputs, strict=True))
        first = next(iter(bytes_of.values()))
        return tuple(
            Value(
                name=wire.name,
                source=wire.source,
                targets=wire.targets,
                bytes_at=tuple((n, values[stands[wire.name]][0]) for n, values in sorted(bytes_of.items())),
                gradient=first[stands[wire.name]][1],
            )
            for wire in layered.wires
            if wire.targets
        )


def every(layered: LayeredModel) -> Kinds:
    """Return a model as it is: each layer stands for itself."""
    return Kinds(short=layered, standing=tuple(range(len(layered.layers))), alike=())


def find(layered: LayeredModel, inputs: tuple[torch.Tensor, ...]) -> Kinds:
    """Find the kinds of a model's layers by running it once, on inputs with or without data."""
    numbers: dict[Any, int] = {}
    does = [numbers.setdefault(_own(layered, layer), len(numbers)) for layer in layered.layers]
    own = list(zip(does, _shapes(layered, inputs), strict=True))
    neighbours = _neighbours(layered, does)
    first: dict[Any, int] = {}
    stands = [first.setdefault(key, i) for i, key in enumerate(zip(own, neighbours, strict=True))]
    while (unread := _unread(layered, does, stands)) is not None:
        stands = [unread if i >= unread and of == stands[unread] else of for i, of in enumerate(stands)]
    kept = sorted(set(stands))
    standing = [kept.index(i) for i in stands]
    alike: dict[Any, list[int]] = {}
    for part, i in enumerate(kept):
        alike.setdefault(own[i], []).append(part)
    groups = tuple(tuple(parts) for parts in alike.values() if len(parts) > 1)
    return Kinds(short=_short(layered, kept, standing), standing=tuple(standing), alike=groups)


def _short(layered: LayeredModel, kept: Sequence[int], standing: Sequence[int]) -> LayeredModel:
    """The model with only some layers: what reads a value of another one reads that of the layer that stands for it."""
    stands: dict[str, str] = {}
    for layer, part in zip(layered.layers, standing, strict=True):
        stands |= dict(zip(layer.outputs, layered.layers[kept[part]].outputs, strict=True))

    def rewired(layer: Layer) -> Layer:
        inputs = tuple(stands.get(name, name) for name in layer.inputs)
        renamed = dict(zip(layer.inputs, inputs, strict=True))
        return dataclasses.replace(layer, inputs=inputs, changes=tuple(renamed[name] for name in layer.changes))

    return dataclasses.replace(layered, layers=tuple(rewired(layered.layers[i]) for i in kept))


def _unread(layered: LayeredModel, does: Sequence[int], stands: Sequence[int]) -> int | None:
    """Find a layer that has to be kept, as in the short model no other one reads in its place what a kept one makes.

    Where nothing of its kind did, no gradient would come back, and its backward would never be run.
    """
    kept = sorted(set(stands))
    short = _short(layered, kept, [kept.index(i) for i in stands])
    read = {
        (name, does[i], place)
        for i, layer in zip(kept, short.layers, strict=True)
        for place, name in enumerate(layer.inputs)
    }
    made = {name for i in kept for name in layered.layers[i].outputs}
    for i, layer in enumerate(layered.layers):
        if any(name in made and (name, does[i], place) not in read for place, name in enumerate(layer.inputs)):
            return i
    return None


def _neighbours(layered: LayeredModel, does: Sequence[int]) -> list[Any]:
    """By layer: what made its inputs, and what reads its outputs."""
    maker: dict[str, tuple[int, int]] = {}
    readers: dict[str, set[Any]] = {}
    for i, layer in enumerate(layered.layers):
        for place, name in enumerate(layer.inputs):
            readers.setdefault(name, set()).add((does[i], place))
        for place, name in enumerate(layer.outputs):
            maker[name] = i, place
    made_by = [
        tuple((does[maker[name][0]], maker[name][1]) if name in maker else name for name in layer.inputs)
        for layer in layered.layers
    ]
    read_by = [tuple(frozenset(readers.get(name, ())) for name in layer.outputs) for layer in layered.layers]
    return list(zip(made_by, read_by, strict=True))


def _shapes(layered: LayeredModel, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    """What every layer takes and returns: shapes, dtypes, and whether there is a gradient."""
    values: dict[str, Any] = dict(zip(layered.inputs, inputs, strict=True))
    trained = {name: bool(getattr(t, "requires_grad", False)) for name, t in values.items()}
    found = []
    with torch.no_grad():
        around = layered.stage(range(len(layered.layers))).surrounded(values)
        for layer in layered.layers:
            given = [values[name].clone() if name in layer.changes else values[name] for name in layer.inputs]
            ambient = [around[name] for name in layer.ambient]
            made = as_tuple(layer(*given, *ambient))
            gradient = any(p.requires_grad for p in layer.module.parameters())
            gradient = gradient or any(trained[name] for name in layer.inputs)
            found.append(
                (tuple(map(_shape, (*given, *ambient))), tuple(map(_shape, made)), [trained[n] for n in layer.inputs])
            )
            values |= dict(zip(layer.outputs, made, strict=False))
            trained |= dict.fromkeys(layer.outputs, gradient)
    return [(taken, made, tuple(flags)) for taken, made, flags in found]


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else type(value)


def _own(layered: LayeredModel, layer: Layer) -> Any:
    """Everything that decides what a layer does, but the values of its parameters; of shared ones, which they are."""
    held = {id(p) for other in layered.layers if other is not layer for p in other.module.parameters()}
    shared = tuple(id(p) if id(p) in held else None for p in layer.module.parameters())
    module = layer.module
    what = _graph(module) if isinstance(module, fx.GraphModule) else _module(module)
    return what, shared


def _graph(module: fx.GraphModule) -> Any:
    """A captured layer: its operations, by number instead of by name."""
    number = {node: i for i, node in enumerate(module.graph.nodes)}

    def plain(argument: Any) -> Any:
        return repr(fx.node.map_aggregate(argument, lambda a: f"%{number[a]}" if isinstance(a, fx.Node) else a))

    def target(node: fx.Node) -> Any:
        if node.op == "get_attr":
            held = getattr(module, str(node.target))
            return (_tensor(held), isinstance(held, nn.Parameter)) if isinstance(held, torch.Tensor) else id(held)
        if node.op == "call_module":
            return _module(module.get_submodule(str(node.target)))
        return (expression_of(node.target) or node.target) if node.op == "call_function" else node.op

    training = module.training
    return training, tuple((node.op, target(node), plain(node.args), plain(node.kwargs)) for node in number)


def _module(module: nn.Module) -> Any:
    """A module as it was written: its classes, settings and hooks, and the shapes of what it holds."""
    return tuple(
        (
            name,
            type(part),
            part.training,
            tuple(
                sorted(
                    ((k, v if isinstance(v, _SIMPLE) else _plain(v)) for k, v in vars(part).items() if _says(part, k)),
                    key=lambda setting: setting[0],
                )
            ),
            tuple(id(hook) for hooks in hooks_of(part) for hook in hooks.values()),
            tuple((k, _tensor(t)) for k, t in part.named_parameters(recurse=False)),
            tuple((k, _tensor(t)) for k, t in part.named_buffers(recurse=False)),
        )
        for name, part in module.named_modules()
    )


def _says(module: nn.Module, name: str) -> bool:
    """Whether an attribute is a setting; of torch's own modules those with an underscore follow from the others."""
    return not name.startswith("_") or not (name in _OWN or type(module).__module__.startswith("torch.nn."))


def _tensor(tensor: torch.Tensor) -> Any:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad


def _plain(value: Any) -> Any:
    """Tuples of numbers compare by value, anything else only with itself."""
    return repr(value) if isinstance(value, (tuple, list)) else id(value)
