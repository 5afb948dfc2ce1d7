"""A model run layer by layer, forward and backward, with a seam at every layer that can be timed or recorded.

The layers run one after another on real values, as they do in training, so caches are as warm or cold as they will be;
only the autograd graph is cut at each seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from executor.batch import tensors
from executor.layer import Layer
from executor.layers import LayeredModel, StageModule, as_tuple, on
from executor.model_file import ModelFile
from executor.norm import scale
from executor.torch_adapter import pytree
from executor.user_code import explained
from planner.basis.errors import PlanError

Around = Callable[[int, str], AbstractContextManager[Any]]
"""Called with the part's index (the loss is the last) and "forward", "backward", …; entered around that work."""

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Pass:
    """What one pass leaves behind: each part's inputs and outputs, and the gradients of the outputs."""

    inputs: list[Tensors] = field(default_factory=list)
    outputs: list[Tensors] = field(default_factory=list)
    gradients: list[Tensors] = field(default_factory=list)


class Chain:
    """The layers of a model and its loss, ready to be run on batches."""

    def __init__(self, file: ModelFile, layered: LayeredModel, device: torch.device) -> None:
        self.file, self.layered, self.device = file, layered, device
        self.layers: Sequence[Layer] = layered.layers
        self.whole = layered.stage(range(len(self.layers)))
        if any(t.device != device for t in (*self.whole.parameters(), *self.whole.buffers())):
            on(self.whole, device)
        self.loss = on(layered.loss, device) if isinstance(layered.loss, nn.Module) else layered.loss
        names = layered.parameter_names()
        self.optimizers = [_optimizer(file, layer.module, names) for layer in self.layers]
        self.whole_optimizer = _optimizer(file, self.whole, names)
        if self.whole_optimizer is None and any(p.requires_grad for p in self.whole.parameters()):
            raise PlanError(
                what="the optimizer trains nothing",
                where=f"{file.path}, optimizer(parameters)",
                why="it picks none of the model's parameters",
                fix="give it the parameters that are to be trained, or groups of them",
            )

    def draw(self, samples: int) -> tuple[Tensors, Any]:
        """A batch on the device."""
        inputs, targets = self.layered.parted(*self.file.draw(samples, seed=samples))
        return tuple(t.to(self.device) for t in inputs), pytree.tree_map(
            lambda t: t.to(self.device) if isinstance(t, torch.Tensor) else t, targets
        )

    def forward(self, inputs: Tensors, targets: Any, around: Around, into: Pass | None = None) -> Pass:
        """Run all layers and the loss, each on detached inputs; what they leave goes `into` a pass as it comes."""
        done = into or Pass()
        values: dict[str, Any] = dict(zip(self.layered.inputs, inputs, strict=True))
        around_them = self.whole.surrounded(values)
        result: Any = None
        for i, layer in enumerate(self.layers):
            taken = tuple(_leaf(values[name]) for name in layer.inputs)
            given = [t.clone() if name in layer.changes else t for name, t in zip(layer.inputs, taken, strict=True)]
            given += [around_them[name] for name in layer.ambient]
            with explained(self.file.path, f"the forward of layer '{layer.name}'"), around(i, "forward"):
                result = layer.module(*given)
            made = tuple(t for t in as_tuple(result) if isinstance(t, torch.Tensor))
            values.update(zip(layer.outputs, made, strict=False))
            done.inputs.append(taken)
            done.outputs.append(made)
        result = pytree.tree_map(lambda t: _leaf(t) if isinstance(t, torch.Tensor) else t, result)
        with explained(self.file.path, "loss(outputs, targets)"), around(len(self.layers), "forward"):
            loss = self.loss(result, targets)
        done.inputs.append(tensors(result))
        done.outputs.append((loss,))
        return done

    def backward(self, done: Pass, around: Around, *, keep: bool = True) -> None:
        """Run the backward of the loss and of all layers, from the last to the first.

        With `keep` the gradients of all outputs stay in `done`; without, each is let go of where autograd has used it
        up, as in an unsplit model.
        """
        last = len(self.layers)
        done.gradients = [()] * (last + 1)
        with explained(self.file.path, "the backward of the loss"), around(last, "backward"):
            done.outputs[last][0].backward()
        arrived: dict[str, torch.Tensor] = {}
        final = _taken(done.inputs[last])
        for i in reversed(range(last)):
            layer = self.layers[i]
            given = final if i == last - 1 else [arrived.pop(name, None) for name in layer.outputs]
            outputs, gradients = [], []
            for output in done.outputs[i]:
                gradient = given.pop(0)
                if output.requires_grad and gradient is not None:
                    outputs.append(output)
                    gradients.append(gradient)
                del gradient
            if not outputs:
                continue
            if keep:
                done.gradients[i] = tuple(gradients)
            begin = _Begin.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
            with explained(self.file.path, f"the backward of layer '{layer.name}'"), around(i, "backward"):
                begin.backward()
            for name, gradient in zip(layer.inputs, _taken(done.inputs[i]), strict=True):
                if gradient is not None:
                    arrived[name] = arrived[name] + gradient if name in arrived else gradient
                del gradient

    def halves(self, done: Pass, around: Around) -> None:
        """Run the backward of every part twice: for its inputs only, and for its parameters only."""
        for i, (taken, made) in enumerate(zip(done.inputs, done.outputs, strict=True)):
            gradients = done.gradients[i] or None
            outputs = [o for o in made if o.requires_grad][: len(gradients) if gradients else None]
            if not outputs:
                continue
            inputs = [t for t in taken if t.requires_grad]
            parameters = (
                [] if i == len(self.layers) else [p for p in self.layers[i].module.parameters() if p.requires_grad]
            )
            for kind, wanted in (("backward_input", inputs), ("backward_weight", parameters)):
                with around(i, kind):
                    if wanted:
                        torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True)

    def repeats(self, done: Pass, stamp: Callable[[], Any]) -> list[list[Any]]:
        """Let torch's checkpoint recompute every layer on its own; return each repetition's stamps (begin, end)."""
        stamps: list[list[Any]] = []
        for i, layer in enumerate(self.layers):
            module = StageModule(
                [layer], layer.inputs, layer.outputs, recompute=True, surroundings=self.layered.surroundings
            )
            result = as_tuple(module(*(_leaf(t) for t in done.inputs[i])))
            found: list[Any] = []
            stamps.append(found)
            outputs = [t for t in result if isinstance(t, torch.Tensor) and t.requires_grad]
            if outputs and done.gradients[i]:
                module.on_repeat = lambda found=found: found.append(stamp())
                wanted: list[torch.Tensor] = [p for p in layer.module.parameters() if p.requires_grad]
                wanted += [t for t in done.inputs[i] if t.requires_grad]
                saved = [(p, p.grad) for p in wanted]
                torch.autograd.backward(outputs, list(done.gradients[i]))
                for tensor, gradient in saved:
                    tensor.grad = gradient
        return stamps


class _Begin(torch.autograd.Function):
    """Starts a backward with given gradients and hands them over, so that nobody but autograd holds them."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *gradients)


def _taken(leaves: Tensors) -> list[torch.Tensor | None]:
    """Take the gradients off some leaves."""
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _optimizer(file: ModelFile, module: nn.Module, names: dict[int, str]) -> torch.optim.Optimizer | None:
    """The user's optimizer over a part of the model, with a learning rate of 0 so that measuring trains nothing."""
    optimizer = file.optimizer_of((names.get(id(p), ""), p) for p in module.parameters() if p.requires_grad)
    for group in optimizer.param_groups if optimizer is not None else ():
        group["lr"] = 0.0
    return optimizer


def update(
    optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter], norm: torch.Tensor | None = None
) -> None:
    """Do what the end of a step does, and give the gradients back for the next measurement.

    Where the model clips, gradients of this `norm` are scaled, by 1.
    """
    if optimizer is None:
        return
    kept = [(p, p.grad) for p in parameters]
    if norm is not None:
        scale([p for p, _ in kept], math.inf, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter, gradient in kept:
        parameter.grad = gradient
