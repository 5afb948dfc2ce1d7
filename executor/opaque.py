"""What torch cannot follow: captured as one call each, of unknown inside.

Of a module (it looks at values) what a call returns is learned from the model itself, run on two batch sizes: of which
structure and dtype, and which dimensions grow with the batch.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from executor.batch import tensors
from executor.torch_adapter import hooks_of, pytree

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


class Call(nn.Module):
    """One call as a function from tensors, and numbers that follow from the batch size, to tensors.

    The graph's node is replaced by this. `constants` are all leaves of what is taken, with marks for those two.
    """

    def __init__(self, leaves: Sequence[Any]) -> None:
        super().__init__()
        self.constants = constants(leaves)

    def filled(self, given: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[Any]:
        """Return the leaves of what is taken, with tensors and numbers in their places."""
        each = {_TENSOR: iter(given), _NUMBER: iter(numbers)}
        return [next(each[leaf]) if isinstance(leaf, _Mark) else leaf for leaf in self.constants]

    def made(self, given: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
        """Return tensors like those that it returns, without data as `given` are."""
        raise NotImplementedError


class _Mark(enum.Enum):
    """What stands for a leaf that differs from call to call."""

    TENSOR = enum.auto()
    NUMBER = enum.auto()


_TENSOR, _NUMBER = _Mark.TENSOR, _Mark.NUMBER


def constants(leaves: Iterable[Any]) -> tuple[Any, ...]:
    """Return leaves of a structure with marks for tensors and for sizes that are not known yet."""

    def marked(leaf: Any) -> Any:
        return _TENSOR if isinstance(leaf, torch.Tensor) else _NUMBER if isinstance(leaf, torch.SymInt) else leaf

    return tuple(map(marked, leaves))


class Opaque(Call):
    """One call of a module."""

    def __init__(self, module: nn.Module, seen: Seen, leaves: Sequence[Any]) -> None:
        super().__init__(leaves)
        self.module, self.seen = module, seen

    def forward(self, given: Sequence[torch.Tensor], numbers: Sequence[Any] = ()) -> list[torch.Tensor]:
        """Call the module."""
        args, keywords = pytree.tree_unflatten(self.filled(given, numbers), self.seen.taken)
        return list(tensors(self.module(*args, **keywords)))

    def made(self, given: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
        """Return tensors of the sizes that have been seen."""
        samples: Any = None
        for tensor, sizes in zip(given, (sizes for sizes in self.seen.given if sizes is not None), strict=True):
            for dim, (constant, each) in enumerate(sizes):
                if each and samples is None:
                    samples = (tensor.shape[dim] - constant) // each
        made = [one for one in self.seen.made if one is not None]
        return [
            given[0].new_empty(
                [constant + each * samples if each else constant for constant, each in sizes], dtype=dtype
            )
            for sizes, dtype in made
        ]


class Opaques:
    """The modules of one model that stay whole, by their paths, and their calls in the order in which they happen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: list[str] = []
        self.why: dict[str, str] = {}
        self.calls: list[Call] = []
        self.seen: dict[str, list[Seen]] = {}

    def holds(self, path: str) -> bool:
        """Whether a module is inside one that stays whole, or is one."""
        return any(path == one or not one or path.startswith(f"{one}.") for one in self.paths)

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
            made = iter(self.placed(Opaque(module, seen, leaves), leaves))
            parts = zip(seen.made, seen.constants, strict=True)
            results = [constant if of is None else next(made) for of, constant in parts]
            return pytree.tree_unflatten(results, seen.returned)

        return call

    def placed(self, call: Call, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Put a call into the graph that is being captured, and return what it makes there."""
        self.calls.append(call)
        _REGISTERED.append(call)
        numbers = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
        made: list[torch.Tensor] = opaque_call(
            list(tensors(leaves)), numbers, len(self.calls) - 1, len(_REGISTERED) - 1
        )
        return made


_REGISTERED: list[Call] = []


@torch.library.custom_op(
    "foreplan::opaque",
    mutates_args=(),
    schema="(Tensor[] tensors, SymInt[] numbers, int number, int registered) -> Tensor[]",
)
def opaque_call(
    tensors: Sequence[torch.Tensor], numbers: Sequence[int], number: int, registered: int
) -> list[torch.Tensor]:
    """Run a call of unknown inside; only captured, never run: its node is replaced by the call."""
    raise AssertionError("an opaque call is replaced before it runs")


@opaque_call.register_fake
def _(tensors: Sequence[torch.Tensor], numbers: Sequence[int], number: int, registered: int) -> list[torch.Tensor]:
    return _REGISTERED[registered].made(tensors, numbers)


OPAQUE = torch.ops.foreplan.opaque.default
"""The operation in a captured graph: of some tensors and sizes, and of the number of the call."""

torch.fx.node.has_side_effect(OPAQUE)  # a hook's result is read by nobody until `own_gradients.hooked` puts it in place


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward, and none of its hooks: these run when the module is called as it is."""
    kept = [(hooks, dict(hooks)) for hooks in hooks_of(module)]
    for hooks, _ in kept:
        hooks.clear()
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        for hooks, before in kept:
            hooks.update(before)


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
