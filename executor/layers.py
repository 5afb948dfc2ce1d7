"""A model as a list of layers with the values that pass between them, and any run of layers as one module.

The layers come from the model file's `layers(model)`, from an `nn.Sequential`, or from the captured graph of the
model's step. Parameters keep the names they have in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from executor.batch import Drawn, tensors
from executor.capture import EXAMPLE, capture
from executor.graph_layers import Cutter
from executor.layer import Layer, as_tuple
from executor.model_file import ModelFile
from executor.outputs import Outputs
from executor.precision import autocast, under
from executor.stage_module import StageModule
from executor.statistics import changed_by, together
from executor.surroundings import Surroundings
from executor.torch_adapter import registered_buffers
from executor.user_code import Loss, explained
from planner.basis.errors import PlanError
from planner.values.blocks import blocks_of

MODEL_INPUT = -1


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A value between layers: `source` is -1 for a model input. The targets are the layers that read it."""

    name: str
    source: int
    targets: tuple[int, ...]


class Weighed(NamedTuple):
    """A layer's name and the bytes of its parameters."""

    name: str
    parameter_bytes: int

    @classmethod
    def of(cls, layer: Layer) -> Weighed:
        """Weigh a layer."""
        return cls(layer.name, sum(p.nbytes for p in layer.module.parameters()))


class Cut(NamedTuple):
    """What of a cut model its blocks follow from (`planner.values.blocks.Outline`)."""

    layers: tuple[Weighed, ...]
    crossing: Callable[[int], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class LayeredModel:
    """A model, cut. `inputs` name the model's inputs; `loss` takes what the last layer returns, as it is, and targets.

    Of the tensors of a batch's inputs, those numbered `late` are read by the loss alone: they go with the targets.
    `surroundings` make what layers take of nobody. Inside the modules `opaque` torch could not follow the
    forward: their paths, and why. `saved` are the names in the model's `state_dict` when it was made: running it may
    have added some.
    """

    model: nn.Module
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    loss: Loss
    late: tuple[int, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    surroundings: Surroundings | None = None
    saved: frozenset[str] = frozenset()

    def parted(self, inputs: tuple[Any, ...], targets: Any) -> tuple[tuple[Any, ...], Any]:
        """Return what the first stage and what the last needs of a batch."""
        if not self.late:
            return inputs, targets
        early = tuple(tensor for i, tensor in enumerate(inputs) if i not in self.late)
        return early, (tuple(inputs[i] for i in self.late), targets)

    @property
    def wires(self) -> tuple[Wire, ...]:
        """All values in the order they come to be."""
        made = [(name, MODEL_INPUT) for name in self.inputs]
        made += [(name, i) for i, layer in enumerate(self.layers[:-1]) for name in layer.outputs]
        return tuple(
            Wire(
                name=name,
                source=source,
                targets=tuple(i for i, layer in enumerate(self.layers) if name in layer.inputs),
            )
            for name, source in made
        )

    def crossing(self, cut: int) -> tuple[str, ...]:
        """Names of the values alive between layers `cut - 1` and `cut`, in the order they come to be.

        The rule is that of `planner.values.profile.Profile.crossing`.
        """
        if cut == 0:
            return self.inputs
        return tuple(w.name for w in self.wires if w.source < cut and any(t >= cut for t in w.targets))

    def blocks(self, layers: range) -> tuple[range, ...]:
        """Cut a stage's layers into those whose sharded parameters are gathered together, as they are priced."""
        return blocks_of(Cut(tuple(map(Weighed.of, self.layers)), self.crossing), layers)

    def stage(self, layers: range, checkpoints: Sequence[range] = ()) -> StageModule:
        """Return the run of layers as one module from the values at its start to those at its end.

        Of its layers those of each of the `checkpoints`, by their place in it, are repeated for their backward.
        """
        last = layers.stop == len(self.layers)
        return StageModule(
            [self.layers[i] for i in layers],
            self.crossing(layers.start),
            () if last else self.crossing(layers.stop),
            checkpoints=checkpoints,
            surroundings=self.surroundings,
            first=layers.start,
        )

    def saved_names(self) -> dict[int, tuple[str, ...]]:
        """Names in the whole model's `state_dict` by the identity of the parameter or buffer.

        Several where it is shared, none where it is not saved (a buffer that is not persistent).
        """
        names: dict[int, tuple[str, ...]] = {}
        for name, tensor in self._state():
            names[id(tensor)] = (*names.get(id(tensor), ()), name)
        return names

    def shared_names(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of names in the model's `state_dict` that are one tensor."""
        return tuple(names for names in self.saved_names().values() if len(names) > 1)

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and name in self.saved:
                yield name, tensor

    def parameter_names(self) -> dict[int, str]:
        """The name of every parameter in the whole model by its identity; of a shared one, the first."""
        return {id(parameter): name for name, parameter in self.model.named_parameters()}

    def unheld(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the model that no layer holds, under the names in its `state_dict`."""
        held = {id(t) for layer in self.layers for t in (*layer.module.parameters(), *layer.module.buffers())}
        return {name: tensor for name, tensor in self._state() if id(tensor) not in held}

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of layers that share a parameter: the parameter's name, then the layers' names."""
        holders: dict[int, list[str]] = {}
        for layer in self.layers:
            for parameter in layer.module.parameters():
                names = holders.setdefault(id(parameter), [])
                if layer.name not in names:
                    names.append(layer.name)
        names_of = self.parameter_names()
        return tuple((names_of[i], *names) for i, names in holders.items() if len(names) > 1)


def cut(file: ModelFile, model: nn.Module) -> LayeredModel:
    """Cut a model into layers: those of `layers(model)`, an `nn.Sequential`'s, or those of its captured graph.

    Raises `PlanError` when its forward cannot be followed or a layer fails, with the layer's name.
    """
    saved = frozenset(model.state_dict())
    return replace(_cut(file, model), saved=saved)


def _cut(file: ModelFile, model: nn.Module) -> LayeredModel:
    drawn = file.drawn(EXAMPLE, seed=0)
    if file.layers is not None:
        with explained(file.path, "layers(model)"):
            return _chain(_named(file.layers(model), model), model, drawn.names, file)
    if isinstance(model, nn.Sequential):
        every = model.named_modules(remove_duplicate=False)  # one may be called several times
        children = [(name, module) for name, module in every if name and "." not in name]
        return _chain(children, model, drawn.names, file)
    with torch.random.fork_rng(devices=[]), unchanged_buffers(model), explained(file.path, "the model's forward"):
        return cut_graph(file, model, drawn)


def cut_graph(file: ModelFile, model: nn.Module, drawn: Drawn, wanted: Outputs | None = None) -> LayeredModel:
    """Cut the graph of a model and its loss as they run on a batch, in the mode that the model is in."""
    with autocast(file.precision, drawn.given):
        captured = capture(file, model, drawn, wanted)
    cutter = Cutter(captured, model)
    layers = cutter.layers()
    layers = [replace(layer, precision=file.precision) for layer in layers]
    layers[-1] = replace(layers[-1], outputs=())
    every = {node.name: cutter.batched(node) for node in (*captured.inputs, *captured.targets, *captured.steps)}
    batched = {name: found for name, found in every.items() if found is not None}
    surroundings = Surroundings(batched, cutter.ambient)
    return LayeredModel(
        model=model,
        inputs=tuple(node.name for node in captured.inputs if node not in cutter.late),
        layers=tuple(layers),
        loss=CapturedLoss(replace(cutter.loss(), precision=file.precision), surroundings),
        late=tuple(i for i, node in enumerate(captured.inputs) if node in cutter.late),
        opaque=tuple(captured.opaque.why.items()),
        surroundings=surroundings,
    )


class CapturedLoss(nn.Module):
    """The part of a captured graph that is the loss: of what the last layer returns and of the targets' tensors."""

    def __init__(self, layer: Layer, surroundings: Surroundings) -> None:
        super().__init__()
        self.module, self.layer, self.surroundings = layer.module, layer, surroundings
        self.ambient = layer.ambient

    def forward(self, result: Any, targets: Any) -> torch.Tensor:
        """Return the loss."""
        return self.judged(result, targets)[0]

    def judged(self, result: Any, targets: Any) -> tuple[torch.Tensor, ...]:
        """Return the loss, and then the outputs that were wanted of the graph."""
        values = dict(zip(self.layer.inputs, (*as_tuple(result), *tensors(targets)), strict=True))
        with autocast(self.layer.precision, values):
            around = self.surroundings.around(self.ambient, values)
            return as_tuple(self.module(*values.values(), *(around[name] for name in self.ambient)))


def _named(listed: Any, model: nn.Module) -> list[tuple[str, nn.Module]]:
    if isinstance(listed, dict):
        listed = list(listed.items())
    own = {id(module): name for name, module in model.named_modules()}
    return [
        entry if isinstance(entry, tuple) else (own.get(id(entry)) or f"{type(entry).__name__.lower()}{i}", entry)
        for i, entry in enumerate(listed)
    ]


def _chain(
    named: list[tuple[str, nn.Module]], model: nn.Module, inputs: tuple[str, ...], file: ModelFile
) -> LayeredModel:
    """Layers of which each takes what the one before returns."""
    if not named or not all(isinstance(module, nn.Module) for _, module in named):
        raise PlanError(
            what="the model has no layers",
            where=file.path,
            why="layers(model) must return modules, or (name, module) pairs, in the order they are called",
            fix="return at least one nn.Module from layers(model)",
        )
    named = _joined(named)
    probe, _ = file.draw(2, seed=0)
    values: tuple[Any, ...] = probe
    layers: list[Layer] = []
    taken = inputs
    with _tried_out(model):
        for i, (name, module) in enumerate(named):
            versions = [getattr(value, "_version", 0) for value in values]
            given = values
            with explained(file.path, f"the forward of layer '{name}'"):
                values = as_tuple(under(file.precision, module)(*values))
            now = [getattr(value, "_version", 0) for value in given]
            changes = tuple(n for n, old, new in zip(taken, versions, now, strict=False) if old != new)
            made = tuple(f"v{i}" if len(values) == 1 else f"v{i}.{j}" for j in range(len(values)))
            outputs = made if i < len(named) - 1 else ()
            layer = Layer(name=name, module=module, inputs=taken, outputs=outputs, changes=changes)
            layers.append(replace(layer, precision=file.precision))
            taken = made
    return LayeredModel(model=model, inputs=inputs, layers=tuple(layers), loss=under(file.precision, file.loss))


class Row(nn.Module):
    """Modules one after another, each of which takes what the one before returns."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.row = nn.ModuleList(modules)

    def forward(self, *values: Any) -> Any:
        """Call the modules."""
        for module in self.row:
            values = as_tuple(module(*values))
        return values if len(values) != 1 else values[0]


def _joined(named: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Let modules that change the same statistics, and those between them, be one layer with the first one's name."""
    inside = together([id(buffer) for buffer in changed_by(module)] for _, module in named)
    rows: list[list[tuple[str, nn.Module]]] = []
    for i, entry in enumerate(named):
        if i in inside:
            rows[-1].append(entry)
        else:
            rows.append([entry])
    return [(row[0][0], Row([module for _, module in row]) if len(row) > 1 else row[0][1]) for row in rows]


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Keep a model's buffers (batch-norm statistics) as they are while it is tried out; those that it adds go again."""
    before = [(part, registered_buffers(part)) for part in model.modules()]
    values = {id(t): t.clone() for _, buffers in before for t in buffers.values() if t is not None}
    try:
        yield
    finally:
        with torch.no_grad():
            for part, buffers in before:
                now = registered_buffers(part)
                for name in now.keys() - buffers.keys():
                    delattr(part, name)
                for name, buffer in buffers.items():
                    if now.get(name) is not buffer:
                        setattr(part, name, buffer)
                    if buffer is not None:
                        buffer.copy_(values[id(buffer)])


@contextmanager
def _tried_out(model: nn.Module) -> Iterator[None]:
    """Run a model without leaving a trace in its buffers, gradients or the random state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), unchanged_buffers(model):
        yield
