"""The user's own functions: what they raise and return is checked, and said in their terms."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from planner.basis.errors import PlanError

Loss = Callable[[Any, Any], torch.Tensor]
Optimizer = Callable[[Any], torch.optim.Optimizer]
"""From parameters, or from (name, parameter) pairs where its own parameter is called `named_parameters`."""

BY_NAME = "named_parameters"
EMPTY = "empty parameter list"
"""What torch's optimizers say of no parameters at all."""

Scheduler = Callable[[torch.optim.Optimizer, int], LRScheduler]

IGNORED = -100
"""The target that cross entropy ignores (`torch.nn.functional.cross_entropy`, `ignore_index`)."""


class explained:  # noqa: N801 - reads as a clause: with explained(path, "model()")
    """Turn an exception of the user's code into a `PlanError` that shows where in their file it came from."""

    def __init__(self, path: str, call: str, fix: str = "") -> None:
        self.path, self.call, self.fix = path, call, fix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, PlanError) or not isinstance(error, (Exception, SystemExit)):
            return
        frames = traceback.extract_tb(error.__traceback__)
        file = self.path.partition(":")[0]
        mine = [f for f in frames if Path(f.filename).resolve() == Path(file).resolve()]
        last = frames[-1]
        raise PlanError(
            what=f"{self.call} fails",
            where=f"{file}:{mine[-1].lineno}, in {mine[-1].name}"
            if mine
            else f"{file}, in {Path(last.filename).name}:{last.lineno}",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
            fix=self.fix
            or f'correct it until python -c "import {Path(file).stem} as m; m.model()(m.batch(2)[0])" works',
        ) from error


def default_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Take the loss that the outputs have, else compare: the outputs' `logits`, where they have such, or themselves.

    Cross entropy for integer targets (classes in the last dimension of the outputs), mean squared error else.
    """
    own = getattr(outputs, "loss", None)
    if isinstance(own, torch.Tensor):
        return own
    outputs = getattr(outputs, "logits", outputs)
    if not targets.is_floating_point():
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    return nn.functional.mse_loss(outputs, targets)


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with torch's own settings."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def checked_loss(path: str, loss: Loss) -> Loss:
    """Return a loss that raises `PlanError` when what it returns is no loss: one number with a gradient."""

    def checked(outputs: Any, targets: Any) -> torch.Tensor:
        found: Any = loss(outputs, targets)
        if isinstance(found, torch.Tensor) and found.numel() == 1:
            return found
        what = f"a tensor of {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise PlanError(
            what="loss(outputs, targets) does not return a loss",
            where=f"{path}, loss(outputs, targets)",
            why=f"it returns {what}, of which no gradient can be computed",
            fix="return a tensor of one number: not .item(), not one per sample",
        )

    return checked


def checked_optimizer(path: str, make: Optimizer) -> Optimizer:
    """Return an `optimizer` that raises `PlanError` when it makes none, or one that computes the loss itself."""

    @functools.wraps(make)
    def checked(parameters: Any) -> torch.optim.Optimizer:
        found: Any = make(parameters)
        if not isinstance(found, torch.optim.Optimizer):
            raise PlanError(
                what="optimizer(parameters) does not return an optimizer",
                where=f"{path}, optimizer(parameters)",
                why=f"it returns {type(found).__name__}",
                fix="return a torch.optim.Optimizer of the parameters",
            )
        closure = inspect.signature(found.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise PlanError(
                what=f"{type(found).__name__} computes the loss several times per step",
                where=f"{path}, optimizer(parameters)",
                why="its step needs a closure, and a step of a plan computes each micro-batch once",
                fix="return an optimizer whose step() needs nothing, such as torch.optim.AdamW",
            )
        return found

    return checked


def checked_scheduler(path: str, make: Callable[..., Any]) -> Scheduler:
    """Return a `scheduler` of an optimizer and the run's steps that raises `PlanError` when it makes none.

    The model file's takes the steps where it has a parameter of that name: `scheduler(optimizer, steps)`.
    """
    takes_steps = "steps" in inspect.signature(make).parameters

    def checked(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        found: Any = make(optimizer, steps=steps) if takes_steps else make(optimizer)
        if isinstance(found, LRScheduler):
            return found
        raise PlanError(
            what="scheduler(optimizer) does not return a scheduler",
            where=f"{path}, scheduler(optimizer)",
            why=f"it returns {type(found).__name__}",
            fix="return a torch.optim.lr_scheduler.LRScheduler of the optimizer",
        )

    return checked


def optimizer_of(path: str, make: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer | None:
    """Return the optimizer of some parameters with their names in the whole model; None where it trains none of them.

    A part of the model may have none of those that `make` picks: a group of an optimizer may be empty, and where all of
    it is, torch refuses to make one.
    """
    pairs = list(named)
    if not pairs:
        return None
    wants = next(iter(inspect.signature(make).parameters), "")
    with explained(path, f"optimizer({wants})"):
        try:
            return make(pairs if wants == BY_NAME else [parameter for _, parameter in pairs])
        except ValueError as error:
            if EMPTY in str(error):
                return None
            raise


def whole_number(path: str, name: str, given: Any) -> int:
    """Return a positive whole number of a model file. Raises `PlanError` for anything else."""
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    raise PlanError(what=f"{name} is no positive whole number", where=path, why=f"it is {given!r}", fix=f"{name} = 64")


def limit(path: str, name: str, given: Any) -> float:
    """Return a positive number of a model file, 0 for None. Raises `PlanError` for anything else."""
    if given is None:
        return 0.0
    if isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < math.inf:
        return float(given)
    raise PlanError(what=f"{name} is no positive number", where=path, why=f"it is {given!r}", fix=f"{name} = 1.0")
