"""Modules that torch cannot follow (they look at values): captured as one call each, of unknown inside.

What such a call returns is learned from the model itself, run on two batch sizes: of which structure and dtype, and
which dimensions grow with the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from executor.batch import tensors
from executor.torch_adapter import pytree

Size = tuple[int, int]
"""A dimension's constant part, and what every sample adds."""


@dataclass(frozen=True)
class Seen:
    """What one call of a module takes and returns: structures, and where in them tensors are, with sizes and dtypes."""

    taken: Any
    returned: Any
    given: tuple[tuple[Size, ...] | None, ...]
    made: tuple[tuple[tuple[Size, ...], torch.dtype] | None, ...]
    constants: tuple[Any, ...]


class Opaque(nn.Module):
    """One call of a module as a function from tensors to tensors: the graph's node is replaced by this."""

    def __init__(self, module: nn.Module, seen: Seen, constants: tuple[Any, ...]) -> None:
        super().__init__()
        self.module, self.seen, self.constants = module, seen, constants

    def forward(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call the module with tensors in their places among the constants."""
        each = iter(given)
        leaves = [next(each) if one is _TENSOR else one for one in self.constants]
        args, keywords = pytree.tree_unflatten(leaves, self.seen.taken)
        result = self.module(*args, **keywords)
        return list(tensors(result))


_TENSOR = object()


class Opaques:
    """The modules of one model that stay whole, by their paths, and their calls in the order in which they happen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: list[str] = []
        self.why: dict[str, str] = {}
        self.calls: list[Opaque] = []
        self.seen: dict[str, list[Seen]] = {}

    def add(self, path: str, why: str, run: Callable[[int], object], sizes: tuple[int, int]) -> None:
        """Let a module stay whole; `run` runs the model with so many samples."""
        self.paths.append(path)
        self.why[path] = why
        records = [self._record(path, functools.partial(run, samples)) for samples in sizes]
        self.seen[path] = [_joined(one, other, sizes) for one, other in zip(*records, strict=True)]

    def _record(self, path: str, run: Callable[[], object]) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []

        def note(module: nn.Module, args: Any, keywords: Any, result: Any) -> None:
            found.append(((args, keywords), result))

        handle = self.model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
        return found

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Replace the modules' forwards by calls of unknown inside, while inside."""
        self.calls = []
        with ExitStack() as stack:
            for path in self.paths:
                module = self.model.get_submodule(path)
                stack.enter_context(_replaced(module, self._call(path, module)))
            yield

    def _call(self, path: str, module: nn.Module) -> Callable[..., Any]:
        remaining = iter(self.seen[path])

        def call(*args: Any, **keywords: Any) -> Any:
            seen = next(remaining)
            leaves = pytree.tree_leaves((args, keywords))
            constants = tuple(_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
            self.calls.append(Opaque(module, seen, constants))
            made = iter(opaque_call(list(tensors(leaves)), len(self.calls) - 1, _register(self.calls[-1])))
            parts = zip(seen.made, seen.constants, strict=True)
            results = [constant if of is None else next(made) for of, constant in parts]
            return pytree.tree_unflatten(results, seen.returned)

        return call


_REGISTERED: list[Opaque] = []


def _register(call: Opaque) -> int:
    _REGISTERED.append(call)
    return len(_REGISTERED) - 1


@torch.library.custom_op(
    "foreplan::opaque", mutates_args=(), schema="(Tensor[] tensors, int number, int registered) -> Tensor[]"
)
def opaque_call(tensors: Sequence[torch.Tensor], number: int, registered: int) -> list[torch.Tensor]:
    """Call a module; only captured, never run: its node is replaced by the module's call."""
    raise AssertionError("an opaque call is replaced before it runs")


@opaque_call.register_fake
def _(tensors: Sequence[torch.Tensor], number: int, registered: int) -> list[torch.Tensor]:
    seen = _REGISTERED[registered].seen
    samples: Any = None
    for tensor, sizes in zip(tensors, (sizes for sizes in seen.given if sizes is not None), strict=True):
        for dim, (constant, each) in enumerate(sizes):
            if each and samples is None:
                samples = (tensor.shape[dim] - constant) // each
    made = [one for one in seen.made if one is not None]
    return [
        tensors[0].new_empty([constant + each * samples if each else constant for constant, each in sizes], dtype=dtype)
        for sizes, dtype in made
    ]


OPAQUE = torch.ops.foreplan.opaque.default
"""The operation in a captured graph: of some tensors, and of the number of the call."""


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _joined(one: tuple[Any, Any], other: tuple[Any, Any], sizes: tuple[int, int]) -> Seen:
    """What two runs with different numbers of samples say of one call."""
    given, taken = pytree.tree_flatten(one[0])
    made, returned = pytree.tree_flatten(one[1])
    pairs = zip(given, pytree.tree_leaves(other[0]), strict=True), zip(made, pytree.tree_leaves(other[1]), strict=True)
    return Seen(
        taken=taken,
        returned=returned,
        given=tuple(_sizes(a, b, sizes) for a, b in pairs[0]),
        made=tuple((found, a.dtype) if (found := _sizes(a, b, sizes)) is not None else None for a, b in pairs[1]),
        constants=tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in made),
    )


def _sizes(one: Any, other: Any, sizes: tuple[int, int]) -> tuple[Size, ...] | None:
    if not isinstance(one, torch.Tensor):
        return None
    step = sizes[1] - sizes[0]
    each = [(b - a) // step for a, b in zip(one.shape, other.shape, strict=True)]
    return tuple((size - own * sizes[0], own) for size, own in zip(one.shape, each, strict=True))


@contextmanager
def where_it_fails(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that holds, when what is done inside raises, the paths of the modules inside which it did."""
    inside: list[str] = []
    with ExitStack() as stack:
        for path, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
            after = module.register_forward_hook(lambda *_: (inside.pop(), None)[1])
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield inside
