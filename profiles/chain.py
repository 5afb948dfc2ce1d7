"""A model run layer by layer, forward and backward, with a seam at every layer that can be timed or recorded.

The layers run one after another on real values, as they do in training, so caches are as warm or cold as they will be;
only the autograd graph is cut at each seam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from executor.batch import tensors
from executor.compiling import compiled_layers, eager
from executor.layer import Layer, as_tuple
from executor.layers import LayeredModel, unchanged_buffers
from executor.model_file import ModelFile
from executor.norm import scale
from executor.precision import SCALED
from executor.scaling import Scaling
from executor.stage_module import StageModule
from executor.surroundings import on
from executor.torch_adapter import halves, pytree
from executor.user_code import explained
from planner.basis.errors import PlanError

Around = Callable[[int, str], AbstractContextManager[Any]]
"""Called with the part's index (the loss is the last) and "forward", "backward", …; entered around that work."""

Between = Callable[[int, list[torch.Tensor], list[torch.Tensor]], object]
"""Called between the halves of a part's backward, with what the first keeps and the gradients of the outputs."""

Tensors = tuple[torch.Tensor, ...]
Gradients = tuple[torch.Tensor | None, ...]
"""Of the outputs that can have one; None for one that nobody reads."""


@dataclass
class Pass:
    """What one pass leaves behind: each part's inputs and outputs, and the gradients of the outputs."""

    inputs: list[Tensors] = field(default_factory=list)
    outputs: list[Tensors] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)


class Chain:
    """The layers of a model and its loss, ready to be run on batches.

    A model that is not `resident` has layers without data: each is given some while it is run (`profiles.passes`), and
    there are no optimizers.
    """

    def __init__(self, file: ModelFile, layered: LayeredModel, device: torch.device, *, resident: bool = True) -> None:
        if file.compiled:
            layered = compiled_layers(layered)
        self.file, self.layered, self.device, self.resident = file, layered, device, resident
        self.layers: Sequence[Layer] = layered.layers
        self.names = layered.parameter_names()
        self.scaling = Scaling(device) if file.precision == SCALED else None
        if self.scaling is not None:
            self.scaling.scale.fill_(1.0)
        self.loss = on(layered.loss, device) if isinstance(layered.loss, nn.Module) else layered.loss
        self.whole = layered.stage(range(len(self.layers)))
        self.optimizers: list[torch.optim.Optimizer | None] = []
        self.whole_optimizer: torch.optim.Optimizer | None = None
        if not resident:
            return
        if any(t.device != device for t in (*self.whole.parameters(), *self.whole.buffers())):
            on(self.whole, device)
        self.optimizers = [self.optimizer(i) for i in range(len(self.layers))]
        self.whole_optimizer = _optimizer(file, self.whole, self.names)
        if self.whole_optimizer is None and any(p.requires_grad for p in self.whole.parameters()):
            raise PlanError(
                what="the optimizer trains nothing",
                where=f"{file.path}, optimizer(parameters)",
                why="it picks none of the model's parameters",
                fix="give it the parameters that are to be trained, or groups of them",
            )

    def compile(self, samples: Sequence[int], threads: Sequence[int]) -> None:
        """Run the model and its layers where they are compiled, so that all code is there: for every number of threads.

        Code for one sample is another one than for several.
        """
        before = torch.get_num_threads()
        for setting in [(own, n) for own in threads for n in samples]:
            torch.set_num_threads(setting[0])
            inputs, targets = self.draw(setting[1])
            with torch.random.fork_rng(devices=[]), unchanged_buffers(self.layered.model):
                self.loss(self.whole(*inputs), targets).backward()
                self.backward(self.forward(inputs, targets, _unwatched), _unwatched)
        torch.set_num_threads(before)
        for parameter in self.whole.parameters():
            parameter.grad = None

    def eager(self) -> AbstractContextManager[Any]:
        """Return a context in which every operation can be seen: compiled layers run as if they were not."""
        return eager() if self.file.compiled else nullcontext()

    @property
    def joined(self) -> bool:
        """Whether an update needs to know of all gradients."""
        return self.scaling is not None or self.file.clip > 0

    def optimizer(self, part: int, names: dict[int, str] | None = None) -> torch.optim.Optimizer | None:
        """The user's optimizer over one layer's parameters; `names` are theirs where they are not the model's own."""
        return _optimizer(self.file, self.layers[part].module, names or self.names)

    def draw(self, samples: int) -> tuple[Tensors, Any]:
        """A batch on the device."""
        inputs, targets = self.layered.parted(*self.file.draw(samples, seed=samples))
        return tuple(t.to(self.device) for t in inputs), pytree.tree_map(
            lambda t: t.to(self.device) if isinstance(t, torch.Tensor) else t, targets
        )

    def begin(self, inputs: Tensors) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values before the first layer by name, and what the layers take of nobody."""
        values: dict[str, Any] = dict(zip(self.layered.inputs, inputs, strict=True))
        return values, self.whole.surrounded(values)

    def forward_part(
        self, part: int, values: dict[str, Any], surroundings: dict[str, Any], around: Around
    ) -> tuple[Tensors, Tensors, Any]:
        """Run one layer on detached values; return these, the tensors that it makes, and what it returns."""
        layer = self.layers[part]
        taken = tuple(_leaf(values[name]) for name in layer.inputs)
        given = [t.clone() if name in layer.changes else t for name, t in zip(layer.inputs, taken, strict=True)]
        given += [surroundings[name] for name in layer.ambient]
        with explained(self.file.path, f"the forward of layer '{layer.name}'"), around(part, "forward"):
            result = layer(*given)
        return taken, tuple(t for t in as_tuple(result) if isinstance(t, torch.Tensor)), result

    def forward_loss(self, result: Any, targets: Any, around: Around) -> tuple[Tensors, torch.Tensor]:
        """Run the loss on the last layer's result, detached; return its tensors, and the loss."""
        result = pytree.tree_map(lambda t: _leaf(t) if isinstance(t, torch.Tensor) else t, result)
        with explained(self.file.path, "loss(outputs, targets)"), around(len(self.layers), "forward"):
            loss = self.loss(result, targets)
        return tensors(result), loss

    def backward_loss(self, taken: Tensors, loss: torch.Tensor, around: Around) -> list[torch.Tensor | None]:
        """Run the loss's backward; return the gradients of what it has read."""
        with explained(self.file.path, "the backward of the loss"), around(len(self.layers), "backward"):
            loss.backward()
        return take_gradients(taken)

    def backward_part(
        self, part: int, made: Tensors, given: list[torch.Tensor | None], around: Around, *, keep: bool
    ) -> Gradients:
        """Run one layer's backward from the gradients of its outputs, which are taken out of the list `given`.

        Returns those of all outputs that can have one, to `keep` them, with None for one that nobody reads; otherwise
        autograd lets go of each where it has used it up.
        """
        outputs, gradients = [], []
        used = tuple(g for o, g in zip(made, given, strict=False) if o.requires_grad) if keep else ()
        for output in made:
            gradient = given.pop(0)
            if output.requires_grad and gradient is not None:
                outputs.append(output)
                gradients.append(gradient)
            del gradient
        if not outputs:
            return ()
        begin = _Begin.apply(gradients, *outputs)  # type: ignore[no-untyped-call]
        layer = self.layers[part]
        with explained(self.file.path, f"the backward of layer '{layer.name}'"), around(part, "backward"):
            begin.backward()
        return used

    def forward(self, inputs: Tensors, targets: Any, around: Around, into: Pass | None = None) -> Pass:
        """Run all layers and the loss, each on detached inputs; what they leave goes `into` a pass as it comes."""
        done = into or Pass()
        values, surroundings = self.begin(inputs)
        result: Any = None
        for i, layer in enumerate(self.layers):
            taken, made, result = self.forward_part(i, values, surroundings, around)
            values.update(zip(layer.outputs, made, strict=False))
            done.inputs.append(taken)
            done.outputs.append(made)
        read, loss = self.forward_loss(result, targets, around)
        done.inputs.append(read)
        done.outputs.append((loss,))
        return done

    def backward(self, done: Pass, around: Around, *, keep: bool = True) -> None:
        """Run the backward of the loss and of all layers, from the last to the first.

        With `keep` the gradients of all outputs stay in `done`; without, each is let go of where autograd has used it
        up, as in an unsplit model.
        """
        last = len(self.layers)
        done.gradients = [()] * (last + 1)
        final = self.backward_loss(done.inputs[last], done.outputs[last][0], around)
        arrived: dict[str, torch.Tensor] = {}
        for i in reversed(range(last)):
            layer = self.layers[i]
            given = final if i == last - 1 else [arrived.pop(name, None) for name in layer.outputs]
            kept = self.backward_part(i, done.outputs[i], given, around, keep=keep)
            if keep:
                done.gradients[i] = kept
            for name, gradient in zip(layer.inputs, take_gradients(done.inputs[i]), strict=True):
                if gradient is not None:
                    arrived[name] = arrived[name] + gradient if name in arrived else gradient
                del gradient

    def halves(self, done: Pass, around: Around, between: Between = lambda part, kept, given: None) -> None:
        """Run the two halves of every part's backward, apart: for its inputs, and then for its parameters."""
        for i, (taken, made) in enumerate(zip(done.inputs, done.outputs, strict=True)):
            self.halves_part(i, taken, made, done.gradients[i], around, between)

    def halves_part(
        self,
        part: int,
        taken: Tensors,
        made: Tensors,
        gradients: Gradients,
        around: Around,
        between: Between = lambda part, kept, given: None,
    ) -> None:
        """Run them for one part, or the loss, as the executor's stages do inside of them; its graph is used up.

        `between` is told what the first half keeps for the second.
        """
        # torch's functions let go of what they begin with, which a value that is only passed on is not, nor a view, nor
        # one that is read on the way to another: a stage that goes on behind the layer does not begin with any of them.
        outputs, given = _with_gradients([o.clone() for o in made if o.requires_grad], gradients)
        if not outputs:
            return
        module = self.layers[part].module if part < len(self.layers) else None
        parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
        inputs = [t for t in taken if t.requires_grad]
        half = halves(outputs, given or None, inputs, parameters)
        with around(part, "backward_input"):
            half.first()
        between(part, half.between(), given)
        with around(part, "backward_weight"):
            half.second()
        take_gradients(taken)

    def repeats(self, done: Pass, stamp: Callable[[], Any]) -> list[list[Any]]:
        """Let torch's checkpoint recompute every layer on its own; return each repetition's stamps (begin, end)."""
        parts = range(len(self.layers))
        return [self.repeats_part(i, done.inputs[i], done.gradients[i], stamp) for i in parts]

    def repeats_part(self, part: int, taken: Tensors, gradients: Gradients, stamp: Callable[[], Any]) -> list[Any]:
        """Let it recompute one layer; return the stamps of its begin and end."""
        layer, found = self.layers[part], list[Any]()
        around = self.layered.surroundings
        module = StageModule([layer], layer.inputs, layer.outputs, checkpoints=[range(1)], surroundings=around)
        result = as_tuple(module(*(_leaf(t) for t in taken)))
        made = [t for t in result if isinstance(t, torch.Tensor) and t.requires_grad]
        outputs, given = _with_gradients(made, gradients)
        if outputs and given:
            module.on_repeat = lambda: found.append(stamp())
            wanted: list[torch.Tensor] = [p for p in layer.module.parameters() if p.requires_grad]
            wanted += [t for t in taken if t.requires_grad]
            saved = [(p, p.grad) for p in wanted]
            torch.autograd.backward(outputs, given)
            for tensor, gradient in saved:
                tensor.grad = gradient
        return found


class Flow:
    """A batch on its way through a chain, one layer at a time: the values that layers still to come will read."""

    def __init__(self, chain: Chain, samples: int) -> None:
        self.chain, self.samples = chain, samples
        self.inputs, self.targets = chain.draw(samples)
        self.values, self.surroundings = chain.begin(self.inputs)
        self.last = {name: i for i, layer in enumerate(chain.layers) for name in layer.inputs}
        self.first = {name: i for i, layer in reversed(list(enumerate(chain.layers))) for name in layer.ambient}
        self.next: dict[str, torch.Tensor] = {}

    def forward(
        self,
        part: int,
        around: Around,
        made_by: Callable[[int, Tensors], object] = lambda part, made: None,
        *,
        own: bool = False,
    ) -> list[tuple[int, Tensors, Tensors]]:
        """Run one layer, the last with the loss: return each part's number, what it has read, and what it makes.

        `made_by` is told of each before the next one runs. With `own` nobody but the layer holds what it takes of
        nobody and is the first to take: its backward, a step's last to need that, lets go of it.
        """
        chain, layer = self.chain, self.chain.layers[part]
        ambient = self.surroundings
        if own and any(self.first[name] == part for name in layer.ambient):
            _, fresh = chain.begin(self.inputs)
            ambient = {name: (fresh if self.first[name] == part else ambient)[name] for name in layer.ambient}
            del fresh
        taken, made, result = chain.forward_part(part, self.values, ambient, around)
        made_by(part, made)
        self.next = {name: _leaf(t) for name, t in zip(layer.outputs, made, strict=False)}
        found = [(part, taken, made)]
        if part == len(chain.layers) - 1:
            read, loss = chain.forward_loss(result, self.targets, around)
            made_by(part + 1, (loss,))
            found.append((part + 1, read, (loss,)))
        return found

    def backward(
        self, part: int, ran: list[tuple[int, Tensors, Tensors]], around: Around, *, keep: bool
    ) -> tuple[Gradients, ...]:
        """Run the backward of what `forward` has run; return the gradients of its parts' outputs, to `keep` them.

        Where the loss is not at hand a layer gets gradients of ones. Those of its inputs are let go of.
        """
        _, taken, made = ran[0]
        if len(ran) > 1:
            given = self.chain.backward_loss(ran[1][1], ran[1][2][0], around)
        else:
            given = [torch.ones_like(t) if t.requires_grad else None for t in made]
        used = self.chain.backward_part(part, made, given, around, keep=keep)
        take_gradients(taken)
        return used, ()

    def go_on(self, part: int) -> None:
        """Let the next layers read what one has made, and let go of what none of them reads."""
        self.values |= self.next
        self.next = {}
        self.values = {name: t for name, t in self.values.items() if self.last.get(name, -1) > part}


@contextmanager
def _unwatched(part: int, kind: str) -> Iterator[None]:
    yield


class _Begin(torch.autograd.Function):
    """Starts a backward with given gradients and hands them over, so that nobody but autograd holds them."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *gradients)


def _with_gradients(made: list[torch.Tensor], gradients: Gradients) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the outputs that have gradients, and these; all outputs of a loss, which has none."""
    if not gradients:
        return made, []
    pairs = [(output, gradient) for output, gradient in zip(made, gradients, strict=True) if gradient is not None]
    return [output for output, _ in pairs], [gradient for _, gradient in pairs]


def take_gradients(leaves: Tensors) -> list[torch.Tensor | None]:
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
