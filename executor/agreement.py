"""Whether a cut model computes what the whole model computes: loss and gradients of one batch, side by side.

Where that would take too long, the losses are compared, and which parameters have a gradient; where even that would,
nothing is, and it is said.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from executor.batch import Drawn
from executor.layers import LayeredModel, unchanged_buffers
from executor.model_file import ModelFile
from executor.precision import DTYPES, autocast
from executor.user_code import explained
from planner.basis.errors import PlanError

SAMPLES, SEED = 3, 0
"""Another number than a model is captured with (`executor.capture.EXAMPLE`), so that a size taken for fixed shows."""

SLOW_S = 2.0
"""Seconds from which on one sample's forward and backward are enough: of a large model three would take minutes."""
BACKWARD = 2.0
"""Forwards that a backward takes: two products of matrices for each of the forward's."""

ROUNDING = 2.0**10
"""Differences of so many units in the last place of the largest gradient are rounding: kernels sum in other orders."""
COARSE = 4.0
"""The same where a precision has few bits: there both run the same kernels, and sums of several gradients differ."""


class Allowance:
    """Seconds that checks may take, from now on; `left_out` says in words what was not checked for want of them."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds, self.begun = seconds, time.monotonic()
        self.left_out: list[str] = []

    @property
    def spent(self) -> float:
        """Seconds since the checks began."""
        return time.monotonic() - self.begun

    def allows(self, seconds: float, *, otherwise: str) -> bool:
        """Whether a check of so many seconds would end in time; `otherwise` is what is said of it."""
        if self.spent + seconds <= self.seconds:
            return True
        self.left_out.append(otherwise)
        return False


Gradients = dict[str, torch.Tensor | None]
"""By the name of a parameter that has one; None where it was not computed."""


class _Step(NamedTuple):
    """What a step comes to: its loss, the parameters' gradients, the buffers as it leaves them; and how long it took.

    It is `full` if gradients were computed, not only who has one.
    """

    loss: torch.Tensor
    gradients: Gradients
    buffers: dict[str, torch.Tensor]
    forward_s: float

    @property
    def full(self) -> bool:
        return all(gradient is not None for gradient in self.gradients.values())


def agree(file: ModelFile, layered: LayeredModel, allowance: Allowance | None = None) -> float:
    """Check that the layers compute the model's loss and gradients, before anything is measured of them.

    Return the seconds per sample of the model's forward and backward, roughly. One sample's forward is run whatever the
    allowance. Where a model has gradients of its own making (`torch.autograd.Function`) they are compared in any case.

    Raises `PlanError` (exit 2) that names what differs: layers left out, in another order, or run apart.
    """
    model, allowance = layered.model, allowance or Allowance()
    before = _numbers(model)
    again, whole, sample_s = _whole(file, layered, allowance)
    counted = [name for name, number in _numbers(model).items() if before.get(name, number) != number]
    if counted and layered.surroundings is not None:
        _check_constant(file, layered, counted[0], again.samples, whole)
    if not whole.full and not allowance.allows(
        whole.forward_s, otherwise="the layers were not run beside the whole model"
    ):
        return sample_s
    try:
        parts = _step(file, layered, again, cut=True, full=lambda forward_s, loss: whole.full)
    except PlanError as error:
        raise _refused(file, f"their step fails, {error.where}: {error.why}") from error
    names = {name for name, _ in model.named_parameters()}
    missing = sorted(name for name in names if (name in whole.gradients) and name not in parts.gradients)
    if missing:
        raise _refused(file, f"no layer trains {_some(missing)}, which the model's own step trains")
    added = sorted(name for name in names if name in parts.gradients and name not in whole.gradients)
    if added:
        raise _refused(file, f"the layers train {_some(added)}, which the model's own step does not")
    least = room(file)
    if not close(parts.loss, whole.loss, whole.loss, least):
        raise _refused(file, f"the loss of a batch is {float(parts.loss):.6g}, the model's {float(whole.loss):.6g}")
    for what, found, expected in (
        ("the gradient of ", parts.gradients, whole.gradients),
        ("what forward leaves in ", parts.buffers, whole.buffers),
    ):
        other = [
            name
            for name in sorted(expected.keys() & found.keys())
            if (one := found[name]) is not None
            and (two := expected[name]) is not None
            and not close(one, two, two, least)
        ]
        if other:
            raise _refused(file, f"{what}{_some(other)} is another one than the model's")
    return sample_s if whole.full else min(sample_s, (1.0 + BACKWARD) * parts.forward_s / again.samples)


def _whole(file: ModelFile, layered: LayeredModel, allowance: Allowance) -> tuple[Drawn, _Step, float]:
    """Run the whole model on one sample, and unless that is slow on several; return the batch once more, and what came.

    One sample alone may be too few: batch norm refuses it. Its backward is run where there is time for it, and for the
    cut model's step behind it.
    """

    def full(forward_s: float, loss: torch.Tensor) -> bool:
        rest_s = (BACKWARD + 1.0 + BACKWARD) * forward_s
        return own_functions(loss) or allowance.allows(
            rest_s,
            otherwise="the gradients of the layers were not compared with the whole model's, only the loss and which "
            "parameters are trained",
        )

    for samples in (1, SAMPLES):
        drawn, again = _alike(file, samples)
        begun = time.monotonic()
        try:
            step = _step(file, layered, drawn, cut=False, full=full)
        except PlanError:
            if samples == 1:
                continue
            raise
        sample_s = (time.monotonic() - begun) / samples * (1.0 if step.full else 1.0 + BACKWARD)
        if samples == 1 and sample_s < SLOW_S and step.full:
            continue
        return again, step, sample_s
    raise AssertionError("the last number of samples always returns")


def _numbers(model: nn.Module) -> dict[str, float]:
    """Return the plain numbers that a model's modules hold as attributes, by name."""
    return {
        f"{path}{'.' if path else ''}{name}": value
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, (int, float)) and name != "training"
    }


def _check_constant(file: ModelFile, layered: LayeredModel, name: str, samples: int, before: _Step) -> None:
    """Raise `PlanError` where loss or gradients follow from a number that forward changes: a graph has it constant."""
    drawn, _ = _alike(file, samples)
    after = _step(file, layered, drawn, cut=False, full=lambda forward_s, loss: before.full)
    pairs = [(after.gradients[name], gradient) for name, gradient in before.gradients.items()]
    same = all(now is None or old is None or torch.equal(now, old) for now, old in pairs)
    if not (torch.equal(after.loss, before.loss) and same):
        raise PlanError(
            what="the model's forward counts, and computes with the count",
            where=f"{file.path}, {name}",
            why="its steps are captured once, so a number that it changes from step to step would stay as it is",
            fix="hold the count in a buffer (register_buffer) that forward adds to, or add layers(model) to the model "
            "file: modules run as they are",
        )


def _alike(file: ModelFile, samples: int) -> tuple[Drawn, Drawn]:
    """Draw a batch twice, as a model may write into its inputs.

    Raises `PlanError` where drawing from the same seed gives another one each time.
    """
    drawn, again = file.drawn(samples, SEED), file.drawn(samples, SEED)
    if drawn.digest() != again.digest():
        call = "batch(n)" if file.batch is not None else "data()"
        raise PlanError(
            what=f"{call} draws other samples each time, although the seed is the same",
            where=f"{file.path}, {call}",
            why="inputs are used in one process and targets in another, so both must come from the seeded generators",
            fix="draw with torch, random or numpy's global generators, which are seeded before each call",
        )
    return drawn, again


def _step(
    file: ModelFile, layered: LayeredModel, drawn: Drawn, *, cut: bool, full: Callable[[float, torch.Tensor], bool]
) -> _Step:
    """Run a step, with its backward where that is to be from what `full` says of the forward's seconds and the loss."""
    model = layered.model
    drawn = drawn.on(next((p.device for p in model.parameters()), torch.device("cpu")))
    kept = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    found: Gradients
    try:
        with torch.random.fork_rng(devices=[]), unchanged_buffers(model):
            torch.manual_seed(SEED)
            with explained(file.path, "a training step"):
                begun = time.monotonic()
                loss = _cut_loss(layered, drawn.inputs, drawn.targets) if cut else _whole_loss(file, model, drawn)
                _check_trains(file, model, loss)
                forward_s = time.monotonic() - begun
                if full(forward_s, loss):
                    loss.backward()
                    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                else:
                    trained = {id(parameter) for parameter in reached(loss)}
                    found = {name: None for name, p in model.named_parameters() if id(p) in trained}
            buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
            return _Step(loss.detach(), found, buffers, forward_s)
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]


def _nodes(loss: torch.Tensor) -> list[Any]:
    """Return what autograd would run for a loss."""
    found: dict[Any, None] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [following for following, _ in node.next_functions]
    return list(found)


def reached(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the leaves that a loss's backward would give gradients to."""
    return [node.variable for node in _nodes(loss) if hasattr(node, "variable")]


def own_functions(loss: torch.Tensor) -> bool:
    """Whether a loss's backward runs code of a `torch.autograd.Function`: its gradients follow from no forward."""
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in _nodes(loss))


def _check_trains(file: ModelFile, model: nn.Module, loss: torch.Tensor) -> None:
    """Raise `PlanError` for a loss without a gradient, with the reason."""
    if loss.requires_grad:
        return
    parameters = list(model.parameters())
    if not torch.is_grad_enabled():
        why, fix = "the model file turns gradients off", "leave torch.set_grad_enabled(False) out"
    elif not parameters:
        why, fix = "the model has no parameters", "plan the training of a model that has some"
    elif not any(p.requires_grad for p in parameters):
        why = f"all {len(parameters)} parameters of the model are frozen (requires_grad is off)"
        fix = "let those that are trained require gradients: parameter.requires_grad_(True)"
    else:
        why = "between the parameters and the loss something cuts the gradient off"
        fix = "look for .detach(), .item(), .data, torch.no_grad(), argmax or comparisons in forward() and loss()"
    raise PlanError(what="the loss has no gradient: nothing would be trained", where=file.path, why=why, fix=fix)


def _whole_loss(file: ModelFile, model: nn.Module, drawn: Drawn) -> torch.Tensor:
    args, keywords = drawn.arguments()
    with autocast(file.precision, drawn.given):
        return file.loss(model(*args, **keywords), drawn.targets)


def _cut_loss(layered: LayeredModel, inputs: tuple[torch.Tensor, ...], targets: Any) -> torch.Tensor:
    inputs, targets = layered.parted(inputs, targets)
    return layered.loss(layered.stage(range(len(layered.layers)))(*inputs), targets)


def room(file: ModelFile) -> float:
    """Return the relative difference that is rounding in a precision; 0 where the dtypes themselves say it."""
    return COARSE * torch.finfo(DTYPES[file.precision]).eps if file.precision else 0.0


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, least: float = 0.0) -> bool:
    """Return whether two results are equal but for rounding, of numbers up to the size of those in `scale`.

    A relative difference up to `least` is rounding in any case.
    """
    if found.shape != expected.shape:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    relative = max(least, ROUNDING * torch.finfo(expected.dtype).eps)
    most = relative * max(1e-30, float(scale.detach().abs().max()))
    return bool(torch.allclose(found, expected, rtol=0.0, atol=most, equal_nan=True))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refused(file: ModelFile, why: str) -> PlanError:
    own = file.layers is not None
    return PlanError(
        what="the layers do not compute what the model computes",
        where=f"{file.path}, {'layers(model)' if own else 'the cut model'}",
        why=why,
        fix="let layers(model) return every module in the order in which it is called, or leave it out"
        if own
        else "add layers(model) to the model file: modules run as they are; else hooks of grad_fn are lost, others not",
    )
