"""Whether a cut model computes what the whole model computes: loss and gradients of one batch, side by side."""

from __future__ import annotations

import time
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

ROUNDING = 2.0**10
"""Differences of so many units in the last place of the largest gradient are rounding: kernels sum in other orders."""
COARSE = 4.0
"""The same where a precision has few bits: there both run the same kernels, and sums of several gradients differ."""


class _Step(NamedTuple):
    """What a step comes to: its loss, the parameters' gradients, and the buffers as it leaves them."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def agree(file: ModelFile, layered: LayeredModel) -> float:
    """Check that the layers compute the model's loss and gradients, before anything is measured of them.

    Return the seconds per sample of the model's forward and backward, roughly.

    Raises `PlanError` (exit 2) that names what differs: layers left out, in another order, or run apart.
    """
    model = layered.model
    before = _numbers(model)
    again, whole, sample_s = _whole(file, layered)
    counted = [name for name, number in _numbers(model).items() if before.get(name, number) != number]
    if counted and layered.surroundings is not None:
        _check_constant(file, layered, counted[0], again.samples, whole)
    try:
        parts = _step(file, layered, again, cut=True)
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
        both = sorted(expected.keys() & found.keys())
        other = [name for name in both if not close(found[name], expected[name], expected[name], least)]
        if other:
            raise _refused(file, f"{what}{_some(other)} is another one than the model's")
    return sample_s


def _whole(file: ModelFile, layered: LayeredModel) -> tuple[Drawn, _Step, float]:
    """Run the whole model on one sample, and unless that is slow on several; return the batch once more, and what came.

    One sample alone may be too few: batch norm refuses it.
    """
    for samples in (1, SAMPLES):
        drawn, again = _alike(file, samples)
        begun = time.monotonic()
        try:
            step = _step(file, layered, drawn, cut=False)
        except PlanError:
            if samples == 1:
                continue
            raise
        sample_s = (time.monotonic() - begun) / samples
        if samples == 1 and sample_s < SLOW_S:
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
    after = _step(file, layered, _alike(file, samples)[0], cut=False)
    same = all(torch.equal(after.gradients[name], gradient) for name, gradient in before.gradients.items())
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


def _step(file: ModelFile, layered: LayeredModel, drawn: Drawn, *, cut: bool) -> _Step:
    model = layered.model
    drawn = drawn.on(next((p.device for p in model.parameters()), torch.device("cpu")))
    kept = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng(devices=[]), unchanged_buffers(model):
            torch.manual_seed(SEED)
            with explained(file.path, "a training step"):
                loss = _cut_loss(layered, drawn.inputs, drawn.targets) if cut else _whole_loss(file, model, drawn)
                _check_trains(file, model, loss)
                loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            return _Step(loss.detach(), found, {name: b.detach().clone() for name, b in model.named_buffers()})
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]


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
