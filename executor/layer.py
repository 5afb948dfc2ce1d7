"""A layer: a module and the names of the values that it takes and makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from executor.precision import autocast


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: called with the tensors named `inputs`, it returns those named `outputs`.

    Behind the inputs it takes what is `ambient`, which no layer makes (`LayeredModel.ambient`). Into the inputs that it
    `changes` it writes: they must be nobody else's. It runs in a `precision` of `executor.precision`, "" for its own.
    Where it is `compiled` (`executor.compiling`), that runs in its module's place.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ambient: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    precision: str = ""
    compiled: Callable[..., Any] | None = None

    def __call__(self, *values: Any) -> Any:
        """Run the layer alone, in its precision."""
        with autocast(self.precision, *values):
            return self.run(*values)

    def run(self, *values: Any) -> Any:
        """Run the layer among others, in the precision that they have entered."""
        return self.module(*values) if self.compiled is None else self.compiled(*values)


def as_tuple(result: Any) -> tuple[Any, ...]:
    """A layer's return as a tuple of values."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
