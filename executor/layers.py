"""A model as a list of layers with the values that pass between them, and any run of layers as one module.

The layers come from the model file's `layers(model)`, from an `nn.Sequential`, or from the traced graph of sub-module
calls. Parameters keep the names they have in the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from executor.model_file import ModelFile, explained
from planner.basis.errors import PlanError

MODEL_INPUT = -1


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: called with the tensors named `inputs`, it returns those named `outputs`."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """A value between layers: `source` is -1 for a model input. The targets are the layers that read it."""

    name: str
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayeredModel:
    """A model, cut. `inputs` name the model's inputs; the last layer's return is the model's output, as it is."""

    model: nn.Module
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]

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

    def stage(self, layers: range, *, recompute: bool = False) -> StageModule:
        """Return the run of layers as one module from the values at its start to those at its end."""
        last = layers.stop == len(self.layers)
        return StageModule(
            [self.layers[i] for i in layers],
            self.crossing(layers.start),
            () if last else self.crossing(layers.stop),
            recompute=recompute,
        )

    def parameter_names(self) -> dict[int, str]:
        """Names in the whole model by the identity of the parameter or buffer."""
        return {
            id(tensor): name
            for tensors in (self.model.named_buffers(), self.model.named_parameters())
            for name, tensor in tensors
        }

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


class StageModule(nn.Module):
    """Layers run one after another; a value is dropped after its last use.

    With `recompute` the layers run under `torch.utils.checkpoint`; `on_repeat` is then called before and after each
    repetition, so that it can be stamped.
    """

    def __init__(
        self, layers: Sequence[Layer], inputs: tuple[str, ...], outputs: tuple[str, ...], *, recompute: bool
    ) -> None:
        super().__init__()
        self.body = nn.ModuleList(layer.module for layer in layers)
        self.layers, self.inputs, self.outputs, self.recompute = tuple(layers), inputs, outputs, recompute
        self.on_repeat: Callable[[], None] | None = None
        needed: set[str] = set(outputs)
        self._dropped: list[tuple[str, ...]] = []
        for layer in reversed(layers):
            self._dropped.append(tuple(name for name in layer.inputs if name not in needed))
            needed |= set(layer.inputs)
        self._dropped.reverse()

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Take the values named `inputs`, return those named `outputs`, or on the last stage the model's output."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, *tensors, use_reentrant=False)
        return self._run(*tensors)

    def _run(self, *tensors: torch.Tensor) -> Any:
        if self.on_repeat is None:
            return self._walk(*tensors)
        self.on_repeat()
        try:
            return self._walk(*tensors)
        finally:
            self.on_repeat()

    def _walk(self, *tensors: torch.Tensor) -> Any:
        live = dict(zip(self.inputs, tensors, strict=True))
        result: Any = None
        for layer, dropped in zip(self.layers, self._dropped, strict=True):
            result = layer.module(*(live[name] for name in layer.inputs))
            for name in dropped:
                live.pop(name, None)
            if layer.outputs:
                live.update(zip(layer.outputs, as_tuple(result), strict=True))
        if not self.outputs:
            return result
        outputs = tuple(live[name].contiguous() for name in self.outputs)  # only whole blocks are sent
        return outputs if len(outputs) > 1 else outputs[0]


def as_tuple(result: Any) -> tuple[Any, ...]:
    """A layer's return as a tuple of values."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def cut(file: ModelFile, model: nn.Module) -> LayeredModel:
    """Cut a model into layers.

    Raises `PlanError` when it cannot be traced or a layer fails, with the layer's name.
    """
    inputs, _ = file.draw(2, seed=0)
    names = tuple(f"input{i}" for i in range(len(inputs)))
    if file.layers is not None:
        with explained(file.path, "layers(model)"):
            return _chain(_named(file.layers(model), model), model, names, file)
    if isinstance(model, nn.Sequential):
        return _chain(list(model.named_children()), model, names, file)
    return _traced(model, inputs, file)


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
    probe, _ = file.draw(2, seed=0)
    values: tuple[Any, ...] = probe
    layers: list[Layer] = []
    taken = inputs
    with _tried_out(model):
        for i, (name, module) in enumerate(named):
            with explained(file.path, f"the forward of layer '{name}'"):
                values = as_tuple(module(*values))
            made = tuple(f"v{i}" if len(values) == 1 else f"v{i}.{j}" for j in range(len(values)))
            layers.append(Layer(name=name, module=module, inputs=taken, outputs=made if i < len(named) - 1 else ()))
            taken = made
    return LayeredModel(model=model, inputs=inputs, layers=tuple(layers))


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Keep a model's buffers (batch-norm statistics) as they are while it is tried out."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


@contextmanager
def _tried_out(model: nn.Module) -> Iterator[None]:
    """Run a model without leaving a trace in its buffers, gradients or the random state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), unchanged_buffers(model):
        yield


class _CallTracer(fx.Tracer):
    """Records calls of sub-modules as they stand in the model's forward; only Sequentials are looked into."""

    def __init__(self, inside: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.inside = inside

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, self.inside)


def _traced(model: nn.Module, inputs: tuple[Any, ...], file: ModelFile) -> LayeredModel:
    graph = _trace(model, len(inputs), (nn.Sequential,), file)
    calls = [node for node in graph.nodes if node.op == "call_module"]
    if len(calls) == 1:  # a wrapper around the real model: look into that one too
        inner = model.get_submodule(str(calls[0].target))
        graph = _trace(model, len(inputs), (nn.Sequential, type(inner)), file)
    recorder = _TensorRecorder(fx.GraphModule(model, graph))
    with _tried_out(model), explained(file.path, "the model's forward"):
        try:
            recorder.run(*inputs)
        except Exception:
            model(*inputs)  # fails likewise, but in the user's own lines
            raise
    groups = _group([n for n in graph.nodes if n.op not in ("placeholder", "output")], recorder.tensors)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"][: len(inputs)]
    output = next(node for node in graph.nodes if node.op == "output")
    group_of = {node: i for i, nodes in enumerate(groups) for node in nodes}
    layers = []
    for i, nodes in enumerate(groups):
        last = i == len(groups) - 1
        taken = _unique(arg for node in nodes for arg in node.all_input_nodes if group_of.get(arg, -1) < i)
        if last:
            taken = _unique([*taken, *(a for a in output.all_input_nodes if group_of.get(a, -1) < i)])
        made = [n for n in nodes if any(group_of.get(u, len(groups)) > i for u in n.users)] if not last else []
        layers.append(_graph_layer(model, nodes, taken, made, output if last else None))
    return LayeredModel(model=model, inputs=tuple(p.name for p in placeholders), layers=tuple(layers))


def _trace(model: nn.Module, inputs: int, inside: tuple[type[nn.Module], ...], file: ModelFile) -> fx.Graph:
    """Trace the forward with its first `inputs` arguments open and the others at their defaults."""
    arguments = list(inspect.signature(model.forward).parameters.values())[inputs:]
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
    try:
        return _CallTracer(inside).trace(model, concrete_args=defaults or None)
    except Exception as error:
        raise PlanError(
            what="the model's forward cannot be traced into layers",
            where=file.path,
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="add layers(model) to the model file: a list of modules, each taking what the one before returns",
        ) from error


class _TensorRecorder(fx.Interpreter):
    """Runs a graph and notes which nodes are tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.tensors: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.tensors.add(n)
        return result


def _group(nodes: list[fx.Node], tensors: set[fx.Node]) -> list[list[fx.Node]]:
    """Put every module call into a layer of its own, with the operations that follow it.

    Layers between which something else than tensors would pass (a size, a tuple) are joined: only tensors are sent.
    """
    groups: list[list[fx.Node]] = []
    for node in nodes:
        if not groups or (node.op == "call_module" and any(n.op == "call_module" for n in groups[-1])):
            groups.append([])
        groups[-1].append(node)
    i = 0
    while i < len(groups):
        where = {node: j for j, group in enumerate(groups) for node in group}
        reach = max((where.get(user, i) for node in groups[i] if node not in tensors for user in node.users), default=i)
        if reach > i:
            groups[i : reach + 1] = [[node for group in groups[i : reach + 1] for node in group]]
        else:
            i += 1
    return groups


def _unique(nodes: Any) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))


def _graph_layer(
    model: nn.Module, nodes: list[fx.Node], taken: list[fx.Node], made: list[fx.Node], output: fx.Node | None
) -> Layer:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in taken}
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    if output is not None:
        graph.output(fx.map_arg(output.args[0], lambda n: copies[n]))
    else:
        results = tuple(copies[node] for node in made)
        graph.output(results if len(results) > 1 else results[0] if results else ())
    call = next((node for node in nodes if node.op == "call_module"), nodes[0])
    return Layer(
        name=str(call.target) if call.op == "call_module" else call.name,
        module=fx.GraphModule(model, graph),
        inputs=tuple(node.name for node in taken),
        outputs=tuple(node.name for node in made),
    )
