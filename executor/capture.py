"""A training step's forward as one graph of tensor operations, captured as it runs, whatever it is written in.

`torch.export` follows the Python of the model and its loss on tensors without data, with a batch of unknown size.
Parameters and buffers in the graph are the model's own. Three kinds of values are nobody's to send:

- *sizes*, numbers that follow from the batch size, are computed where they are needed;
- *ambient* tensors follow from nothing but sizes and constants (causal masks, positions, rotary angles);
- targets are read by the loss alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export

from executor.batch import Drawn
from executor.model_file import ModelFile
from executor.opaque import OPAQUE, Opaques, where_it_fails
from executor.outputs import Outputs
from executor.own_gradients import HiddenError, own_gradients, put_hooks_in_place
from executor.torch_adapter import backward_hooks, expression, following, mutated, pytree, viewed
from planner.basis.errors import PlanError

EXAMPLE = 2
"""Samples with which a model is captured: neither 0 nor 1, which torch takes for fixed."""

_MODEL = "whole_model"


class _FixedSizeError(Exception):
    """The batch size has become a plain number on the way."""


class _Step(nn.Module):
    """A model and its loss: one number from inputs and targets, and what is wanted of the model's outputs."""

    def __init__(self, file: ModelFile, model: nn.Module, wanted: Outputs | None) -> None:
        super().__init__()
        self.file, self.wanted = file, wanted
        self.whole_model = model

    def forward(self, args: tuple[Any, ...], keywords: dict[str, Any], targets: Any) -> tuple[torch.Tensor, ...]:
        """Return the loss, and then the outputs that are wanted."""
        outputs = self.whole_model(*args, **keywords)
        return self.file.loss(outputs, targets), *(self.wanted.picked(outputs) if self.wanted else ())


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A training step's graph. `steps` are the nodes whose values depend on the batch's content or on parameters.

    They stand in the order in which they run. `ambient` are the other nodes with tensors, `sizes` those with numbers,
    as expressions of `batch`, the batch size. `inputs` and `targets` are the batch's tensors, `held` the parameters',
    buffers' and constants' nodes with their names and tensors. `trained` are the nodes whose values have gradients, and
    `grown` those that would if no parameter were frozen.
    `owner` tells whose memory a node's value lies in: its own, or that of the node it is a view of; `changed` has the
    steps that write into another node's memory, with that node. `wanted` are the outputs that are, besides the `loss`.
    """

    modules: fx.GraphModule
    steps: tuple[fx.Node, ...]
    ambient: frozenset[fx.Node]
    sizes: dict[fx.Node, Any]
    batch: Any
    inputs: tuple[fx.Node, ...]
    targets: tuple[fx.Node, ...]
    held: dict[fx.Node, tuple[str, torch.Tensor]]
    trained: frozenset[fx.Node]
    grown: frozenset[fx.Node]
    owner: dict[fx.Node, fx.Node]
    changed: dict[fx.Node, fx.Node]
    loss: fx.Node
    wanted: tuple[fx.Node, ...]
    opaque: Opaques

    def calls(self, node: fx.Node) -> tuple[tuple[str, str], ...]:
        """Return the calls inside which a node runs, from the model's down, as (call, path); none for the loss."""
        stack = node.meta.get("nn_module_stack", {})
        inside = [(call, str(path)) for call, (path, _) in stack.items() if str(path).split(".")[0] == _MODEL]
        return tuple((str(call), path.removeprefix(_MODEL).removeprefix(".")) for call, path in inside)


def capture(file: ModelFile, model: nn.Module, drawn: Drawn, wanted: Outputs | None = None) -> Captured:
    """Capture a model and its loss as they run on a batch, in the mode that the model is in.

    Its graph also returns the outputs that are `wanted`. What torch cannot follow stays whole (`executor.opaque`).
    Raises `PlanError` when the loss cannot be followed.
    """
    drawn = drawn.distinct()
    step, arguments = _Step(file, model, wanted), (*drawn.arguments(), drawn.targets)
    opaque = Opaques(model)

    def open_sizes(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == drawn.samples
        return {0: Dim.AUTO} if batched else None

    def run(samples: int) -> None:
        more = drawn.with_samples(samples)
        args, keywords = more.arguments()
        with torch.no_grad():
            model(*args, **keywords)

    for path, module in model.named_modules():
        if backward_hooks(module) and not opaque.holds(path):
            opaque.add(path, "its backward has hooks", run, (drawn.samples, drawn.samples + 1))
    while True:
        with where_it_fails(model) as inside:
            try:
                shapes = pytree.tree_map(open_sizes, arguments)
                with opaque.closed(), own_gradients(opaque), following():
                    program = export(step, arguments, dynamic_shapes=shapes, strict=False)
                return _sorted_out(program, step, arguments, len(drawn.inputs), opaque)
            except _FixedSizeError:
                raise PlanError(
                    what="the model or its loss takes the batch size for a fixed number",
                    where=file.path,
                    why=f"followed with {drawn.samples} samples, it would compute with {drawn.samples} for any batch",
                    fix="compute with x.shape[0] as it is, not with int(x.shape[0]); or add layers(model)",
                ) from None
            except Exception as error:
                failure = error
        why = next(iter(str(failure).strip().splitlines()), "no message")
        why = why if isinstance(failure, HiddenError) else f"{type(failure).__name__}: {why}"
        if not inside or inside[-1] in opaque.paths:
            step(*arguments)  # fails likewise, but in the user's own lines
            raise PlanError(
                what="the model's forward cannot be followed",
                where=file.path,
                why=why,
                fix="add layers(model) to the model file: a list of modules, each taking what the one before returns",
            ) from failure
        opaque.add(inside[-1], why, run, (drawn.samples, drawn.samples + 1))


def _sorted_out(program: ExportedProgram, step: nn.Module, arguments: Any, inputs: int, opaque: Opaques) -> Captured:
    graph, signature = program.graph, program.graph_signature
    put_hooks_in_place(graph, opaque)
    own = dict(step.named_parameters(remove_duplicate=False)) | dict(step.named_buffers(remove_duplicate=False))
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    held: dict[fx.Node, tuple[str, torch.Tensor]] = {}
    given: list[fx.Node] = []
    for node in graph.find_nodes(op="placeholder"):
        if node.name in names:
            held[node] = names[node.name].removeprefix(f"{_MODEL}."), own[names[node.name]]
        elif node.name in constants:
            held[node] = constants[node.name], program.constants[constants[node.name]]
        else:
            given.append(node)
    tensors = [
        n for n, leaf in zip(given, pytree.tree_leaves(arguments), strict=True) if isinstance(leaf, torch.Tensor)
    ]
    varying = set(tensors)
    trained = {node for node, (_, tensor) in held.items() if tensor.requires_grad}
    sizes = [expression(s) for n in tensors for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    batch = next((size for size in sizes if sympy.sympify(size).free_symbols), None)
    if batch is None:
        raise _FixedSizeError
    grown = {node for node in held if node.name in signature.inputs_to_parameters}
    found = _Values(batch, [n for n in graph.nodes if n.op == "call_function"])
    for node in graph.find_nodes(op="call_function", target=OPAQUE):
        parameters = [p.requires_grad for p in opaque.calls[node.args[2]].parameters()]
        trained |= {node} if any(parameters) else set()
        grown |= {node} if parameters else set()
    for node in found.nodes:
        found.add(node, varying, trained)
    for node in found.steps:
        if any(arg in grown for arg in node.all_input_nodes):
            grown.add(node)
    loss, *outputs = graph.output_node().args[0]
    return Captured(
        modules=program.graph_module,
        steps=tuple(found.steps),
        ambient=frozenset(found.ambient),
        sizes=found.sizes,
        batch=found.batch,
        inputs=tuple(tensors[:inputs]),
        targets=tuple(tensors[inputs:]),
        held=held,
        trained=frozenset(trained),
        grown=frozenset(grown),
        owner=found.owner,
        changed=found.changed,
        loss=loss,
        wanted=tuple(outputs),
        opaque=opaque,
    )


class _Values:
    """Sorts the nodes of a graph, in their order, by what their values depend on."""

    def __init__(self, batch: Any, nodes: list[fx.Node]) -> None:
        self.batch, self.nodes = batch, nodes
        self.steps: list[fx.Node] = []
        self.ambient: set[fx.Node] = set()
        self.sizes: dict[fx.Node, Any] = {}
        self.owner: dict[fx.Node, fx.Node] = {}
        self.changed: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            base, target = viewed(node), mutated(node)
            if base is not None:
                self.owner[node] = self.owner.get(base, base)
            if target is not None:
                self.owner[node] = self.changed[node] = self.owner.get(target, target)
        self.written = set(self.changed.values())

    def add(self, node: fx.Node, varying: set[fx.Node], trained: set[fx.Node]) -> None:
        """Sort one node; what it depends on has been."""
        value, read = node.meta.get("val"), node.all_input_nodes
        if value is None and not node.users:
            return  # an assertion about sizes
        number = expression(value)
        if number is not None and not (sympy.sympify(number).free_symbols - {self.batch}):
            self.sizes[node] = number
            return
        if any(arg in trained for arg in read):
            trained.add(node)
        own = node in trained or node in self.written or self.owner.get(node) in self.written
        own = own or _draws(node) or node.target is OPAQUE
        if own or any(arg in varying or arg in trained for arg in read):
            varying.add(node)
            self.steps.append(node)
        else:
            self.ambient.add(node)


def _draws(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
