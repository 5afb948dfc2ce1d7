"""Gradients that the user computes: autograd Functions, and hooks of tensors. A graph of operations would lose them.

Each is one call in a captured graph, inside of which nothing is followed, as the modules of `executor.opaque` are. What
a Function returns is learned from its own forward, run on tensors without data.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from executor.batch import tensors
from executor.opaque import OPAQUE, Call, Opaques
from executor.torch_adapter import pytree, without_data

SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Tensor, torch.SymInt)
"""What a Function or a hook may hold to be a call of its own: in anything else tensors may hide."""

OURS = {"torch", "executor", "profiles"}
"""Packages whose Functions are followed as operations: torch's own repeat what is followed (checkpoints)."""


class HiddenError(Exception):
    """A Function or a hook that cannot be a call of its own; the module around it stays whole."""


class _Context(FunctionCtx):
    """What a Function's forward notes things in, where nothing follows from them."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs


class Applied(Call):
    """One call of an autograd Function."""

    def __init__(self, function: type[Function], original: dict[str, Any], given: tuple[Any, ...]) -> None:
        leaves, self.taken = pytree.tree_flatten(given)
        super().__init__(leaves)
        self.function, self.original = function, original
        self.returned: tuple[Any, tuple[Any, ...]] | None = None

    def forward(self, given: Sequence[torch.Tensor], numbers: Sequence[Any] = ()) -> list[torch.Tensor]:
        """Call the Function."""
        taken = pytree.tree_unflatten(self.filled(given, numbers), self.taken)
        return list(tensors(self.function.apply(*taken)))

    def made(self, given: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
        """Return tensors like those that the Function's forward returns, and note what else it does."""
        taken = pytree.tree_unflatten(self.filled(given, numbers), self.taken)
        context = _Context(tuple(isinstance(one, torch.Tensor) for one in taken))
        if "setup_context" in self.original:
            result = self.original["forward"](*taken)
            self.original["setup_context"](context, tuple(taken), result)
        else:
            result = self.original["forward"](context, *taken)
        if getattr(context, "dirty_tensors", None):
            raise HiddenError(f"{self.function.__name__} writes into what it takes")
        leaves, structure = pytree.tree_flatten(result)
        self.returned = structure, tuple(leaves)
        return [t.new_empty_strided(t.shape, t.stride()) for t in tensors(leaves)]


class Hooked(Call):
    """A tensor whose gradient goes through a hook."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        super().__init__(())
        self.hook = hook

    def forward(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensor with the hook."""
        (tensor,) = given
        made = tensor.view_as(tensor)
        if made.requires_grad:
            made.register_hook(self.hook)
        return [made]

    def made(self, given: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
        """Return a tensor like it."""
        (tensor,) = given
        return [tensor.new_empty_strided(tensor.shape, tensor.stride())]


@contextmanager
def own_gradients(opaque: Opaques) -> Iterator[None]:
    """Put calls of autograd Functions, and hooks of tensors, into the graph that is being captured, while inside."""
    with ExitStack() as stack:
        for function in _functions():
            original = {"forward": function.forward}
            if function.setup_context is not Function.setup_context:
                original["setup_context"] = function.setup_context
                stack.enter_context(_set(function, "setup_context", staticmethod(lambda *_: None)))
            stack.enter_context(_set(function, "forward", staticmethod(_forward(function, original, opaque))))
        stack.enter_context(_set(torch.Tensor, "register_hook", _register(opaque)))
        yield


def _functions(of: type[Function] = Function) -> Iterator[type[Function]]:
    function: type[Function]
    for function in of.__subclasses__():
        if function.__module__.partition(".")[0] not in OURS:
            yield function
        yield from _functions(function)


@contextmanager
def _set(of: type, name: str, value: Any) -> Iterator[None]:
    before = vars(of).get(name)
    setattr(of, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(of, name)
        else:
            setattr(of, name, before)


def _forward(function: type[Function], original: dict[str, Any], opaque: Opaques) -> Callable[..., Any]:
    first = 0 if "setup_context" in original else 1  # without it, the first argument is the context

    def forward(*args: Any) -> Any:
        given = args[first:]
        leaves = pytree.tree_leaves(given)
        if not any(map(without_data, leaves)):
            return original["forward"](*args)  # what is computed of constants
        _check_simple(function.__name__, leaves)
        call = Applied(function, original, given)
        made = iter(opaque.placed(call, leaves))
        assert call.returned is not None, "placing it asks what it makes"
        structure, returned = call.returned
        return pytree.tree_unflatten([next(made) if isinstance(r, torch.Tensor) else r for r in returned], structure)

    return forward


def _register(opaque: Opaques) -> Callable[..., Any]:
    original: Callable[..., Any] = torch.Tensor.register_hook

    def register(tensor: torch.Tensor, hook: Callable[..., Any]) -> Any:
        if not without_data(tensor):
            return original(tensor, hook)
        if not tensor.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        if tensor.is_leaf:
            raise HiddenError("it hooks the gradient of a parameter or an input in its forward")
        held = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
        if any(isinstance(leaf, torch.Tensor) and without_data(leaf) for leaf in pytree.tree_leaves(held)):
            raise HiddenError("a hook of a gradient computes with a value of the forward")
        opaque.placed(Hooked(hook), [tensor])
        return RemovableHandle(OrderedDict())

    return register


def _check_simple(name: str, leaves: Sequence[Any]) -> None:
    hidden = next((leaf for leaf in leaves if not isinstance(leaf, SIMPLE)), None)
    if hidden is not None:
        raise HiddenError(f"{name} takes an object of {type(hidden).__name__}")


def put_hooks_in_place(graph: fx.Graph, opaque: Opaques) -> None:
    """Let every reader of a hooked value read it behind its hooks, where its gradient is the sum of all that is.

    Of several hooks the first one comes last, so that the gradient meets it first.
    """
    waiting = [n for n in graph.find_nodes(op="call_function", target=OPAQUE) if _is_hook(n, opaque)]
    while waiting:
        node = waiting.pop(0)
        given: Any = node.args[0]
        (value,) = given
        readers = [user for user in value.users if user is not node and user not in waiting]
        value.append(node)
        with graph.inserting_after(node):
            result = graph.call_function(operator.getitem, (node, 0))
        for made in (node, result):
            made.meta |= {key: value.meta[key] for key in ("nn_module_stack", "val") if key in value.meta}
        for reader in readers:
            reader.replace_input_with(value, result)


def _is_hook(node: fx.Node, opaque: Opaques) -> bool:
    number: Any = node.args[2]
    return isinstance(opaque.calls[number], Hooked)
