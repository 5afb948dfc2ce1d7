"""The user's own functions: what they return is checked, and said in their terms; what they raise is `explained`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from executor.faults import explained as explained
from executor.torch_adapter import pytree
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
        if _is_nothing(outputs):
            raise PlanError(
                what="the model returns no tensor",
                where=f"{path}, its forward",
                why=f"it returns {_words(outputs)}",
                fix="return what the loss is computed of from the model's forward()",
            )
        if loss is default_loss:
            _check_default(path, outputs, targets)
        found: Any = loss(outputs, targets)
        if isinstance(found, torch.Tensor) and found.numel() == 1 and found.is_floating_point():
            return found
        if isinstance(found, torch.Tensor):
            what = f"a tensor of {tuple(found.shape)}" if found.numel() != 1 else f"a number of {found.dtype}"
        else:
            what = type(found).__name__
        raise PlanError(
            what="loss(outputs, targets) does not return a loss",
            where=f"{path}, loss(outputs, targets)",
            why=f"it returns {what}, of which no gradient can be computed",
            fix="return a real tensor of one number: not .item(), not one per sample",
        )

    return checked


def _is_nothing(outputs: Any) -> bool:
    """Whether a model's output is None, or plain values that hold no tensor; what is unknown may hold some."""
    plain = (str, bytes, int, float, complex, bool, type(None))
    return all(isinstance(leaf, plain) for leaf in pytree.tree_leaves(outputs))


def _words(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _check_default(path: str, outputs: Any, targets: Any) -> None:
    """Raise `PlanError` where the default loss cannot compare, or would by repeating the smaller: not what is meant."""
    if isinstance(getattr(outputs, "loss", None), torch.Tensor):
        return
    outputs = getattr(outputs, "logits", outputs)
    fix = "define loss(outputs, targets) in the model file, or let the model return its own loss (outputs.loss)"
    for of, given in (("targets", targets), ("outputs", outputs)):
        if not isinstance(given, torch.Tensor):
            what, why = "the default loss has no two tensors to compare", f"the {of} are {_words(given)}"
            raise PlanError(what=what, where=path, why=why, fix=fix)
    alike = outputs.shape == targets.shape if targets.is_floating_point() else outputs.shape[:-1] == targets.shape
    if not alike:
        raise PlanError(
            what="the default loss cannot compare outputs and targets of these shapes",
            where=f"{path}, batch(n) and the model's outputs",
            why=f"outputs are {_shape(outputs)}, targets {_shape(targets)} of {targets.dtype}",
            fix=f"give targets the shape of the outputs, or integers without the last dimension; or {fix}",
        )


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def checked_optimizer(path: str, make: Optimizer) -> Optimizer:
    """Return an `optimizer` that raises `PlanError` when it makes none, or one that computes the loss itself."""

    @functools.wraps(make)
    def checked(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        found: Any = make(given)
        if not isinstance(found, torch.optim.Optimizer):
            raise PlanError(
                what="optimizer(parameters) does not return an optimizer",
                where=f"{path}, optimizer(parameters)",
                why=f"it returns {type(found).__name__}",
                fix="return a torch.optim.Optimizer of the parameters",
            )
        known = {id(own) for own in pytree.tree_leaves(given)}
        strange = [p for group in found.param_groups for p in group["params"] if id(p) not in known]
        if strange:
            raise PlanError(
                what="optimizer(parameters) trains others than the parameters",
                where=f"{path}, optimizer(parameters)",
                why=f"{len(strange)} of its tensors are not among those it is given, one of {_shape(strange[0])}",
                fix="make it of the parameters that are handed over: torch.optim.AdamW(parameters)",
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


def yes_or_no(path: str, name: str, given: Any) -> bool:
    """Return True or False as a model file says, False for None. Raises `PlanError` for anything else."""
    if given is None or isinstance(given, bool):
        return bool(given)
    raise PlanError(
        what=f"{name} is neither True nor False",
        where=path,
        why=f"it is {given!r}",
        fix=f"{name} = True, or leave it out",
    )


def checked_function(path: str, name: str, given: Any) -> Any:
    """Return an optional function of a model file, None where there is none. Raises `PlanError` for anything else."""
    if given is None or (callable(given) and not (isinstance(given, type) and issubclass(given, nn.Module))):
        return given
    what = f"the class {given.__name__}" if isinstance(given, type) else f"an object of {type(given).__name__}"
    raise PlanError(
        what=f"{name} is no function",
        where=f"{path}, {name}",
        why=f"it is {what}",
        fix=f"def {name}(...): plan init shows what it takes and returns",
    )
