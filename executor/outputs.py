"""What a model returns, as values: where its tensors are, which of them somebody reads, and the same with others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from executor.batch import tensors
from executor.torch_adapter import pytree


def changed(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return a structure with every tensor changed; those of dataclasses and namespaces are among them."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if isinstance(leaf, SimpleNamespace) or (is_dataclass(leaf) and not isinstance(leaf, type)):
            twin = copy.copy(leaf)
            twin.__dict__.update({name: changed(value, change) for name, value in vars(leaf).items()})
            return twin
        return leaf

    return pytree.tree_map(one, tree)


def listed(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of a structure, in the order in which `changed` finds them."""
    found: list[torch.Tensor] = []
    changed(tree, found.append)
    return found


@dataclass(frozen=True)
class Outputs:
    """A structure of outputs, of whose tensors those are wanted that are numbered in `read`."""

    structure: Any
    read: tuple[int, ...]

    def picked(self, outputs: Any) -> tuple[torch.Tensor, ...]:
        """Return the wanted tensors of outputs of this structure."""
        found = listed(outputs)
        return tuple(found[i] for i in self.read)

    def filled(self, picked: tuple[torch.Tensor, ...]) -> Any:
        """Return outputs with these tensors, and None in the place of others."""
        wanted: Mapping[int, torch.Tensor] = dict(zip(self.read, picked, strict=True))
        numbers = iter(range(len(listed(self.structure))))
        return changed(self.structure, lambda _: wanted.get(next(numbers)))


def read_by(outputs: Any, reads: Callable[[Any], object]) -> Outputs:
    """Return of a structure which of its tensors a function looks at, by letting it look."""
    places = {id(tensor): number for number, tensor in reversed(list(enumerate(listed(outputs))))}
    with _seen() as seen:
        reads(outputs)
    read = tuple(sorted(number for identity, number in places.items() if identity in seen))
    return Outputs(changed(outputs, lambda tensor: tensor.new_empty(0)), read)


@contextmanager
def _seen() -> Iterator[set[int]]:
    """Yield the identities of all tensors that anything is asked of while inside."""
    seen: set[int] = set()

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.update(map(id, tensors((args, kwargs))))
            return func(*args, **(kwargs or {}))

    with Look():
        yield seen
