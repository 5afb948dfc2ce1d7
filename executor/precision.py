"""Mixed precision: what of a model runs in fewer bits while its parameters stay as they are (`torch.autocast`).

A stage, a layer and the loss each enter it for themselves, so that a stage's casts of its weights are shared within one
forward, as in a plain loop. Where it is on already nothing is entered: a captured graph has no trace of it, and runs in
it as the model does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from executor.batch import tensors
from planner.basis.errors import PlanError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALED = "fp16"
"""The precision whose gradients are too small for its numbers: the loss is scaled (`executor.scaling`)."""


def autocast(precision: str, *values: Any) -> AbstractContextManager[Any]:
    """Return the context in which a model of this precision runs on the device of some values; "" has none."""
    if not precision:
        return nullcontext()
    dtype, kind = DTYPES[precision], next((tensor.device.type for tensor in tensors(values)), "cpu")
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == dtype:
        return nullcontext()
    return torch.autocast(kind, dtype)


def under(precision: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs in this precision."""
    if not precision:
        return function

    def run(*args: Any) -> Any:
        with autocast(precision, *args):
            return function(*args)

    return run


def checked_precision(path: str, given: Any) -> str:
    """Return a model file's precision, "" for None. Raises `PlanError` for one that is not known."""
    if given is None:
        return ""
    if given in DTYPES:
        return str(given)
    raise PlanError(
        what="precision is none that is known",
        where=path,
        why=f"it is {given!r}; known are {', '.join(DTYPES)}",
        fix='precision = "bf16", or leave it out: the model then runs in the dtypes that it has',
    )
