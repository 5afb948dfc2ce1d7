"""Every private name of torch that foreplan touches, in one place; `executor.torch_probe` asks for them by name.

torch.distributed.pipelining is alpha. What is used of it: the functions by which it runs a backward in two halves.
"""

from __future__ import annotations

# isort: off
import executor.torch_probe as torch_probe  # before all names that another torch may lack

# isort: on
import builtins
import datetime
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.pipelining import _backward as torch_backward
from torch.utils import _python_dispatch, _pytree

pytree = _pytree
"""Structures of tensors: `tree_map`, `tree_flatten` and their like."""

DispatchMode = _python_dispatch.TorchDispatchMode
"""The base of those that see every operation while they are entered."""


def post(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Post point-to-point operations of one message together; what is sent is made contiguous, as backends ask."""
    for operation in operations:
        if operation.op is dist.isend:
            operation.tensor = operation.tensor.contiguous()
    return list(dist.batch_isend_irecv(operations)) if operations else []


def whole_backward(outputs: list[torch.Tensor], gradients: list[torch.Tensor] | None) -> None:
    """Run a whole backward from outputs with these gradients, or from a loss without; nothing where there is none."""
    if outputs:
        torch.autograd.backward(outputs, gradients)


class Halves(NamedTuple):
    """A backward in two halves, to be run once each in this order: for the inputs, for the parameters.

    `between` returns the gradients that the first has left for the second, which also needs what the forward has saved.
    """

    first: Callable[[], object]
    second: Callable[[], object]
    between: Callable[[], list[torch.Tensor]]


def halves(
    outputs: list[torch.Tensor],
    gradients: list[torch.Tensor] | None,
    inputs: list[torch.Tensor],
    parameters: list[torch.nn.Parameter],
) -> Halves:
    """Return the two halves of a backward.

    Each adds to the gradients of what it is for, as torch's `PipelineStage` runs them: without inputs the second half
    is the whole backward. Outputs that are views, or that are read on the way to others, cannot be let go of by torch's
    functions, and parameters that are used again are beyond them; there autograd walks the graph twice.
    """
    given = list(gradients or ())
    if not outputs:
        return Halves(_nothing, _nothing, list)
    if not inputs:
        whole = (lambda: torch.autograd.backward(outputs, gradients)) if parameters else _nothing
        return Halves(_nothing, whole, lambda: given)
    if not parameters:
        return Halves(lambda: torch.autograd.backward(outputs, gradients), _nothing, list)
    if any(output._is_view() for output in outputs) or _used_again(outputs, inputs, parameters):

        def of(wanted: list[Any], *, again: bool) -> Callable[[], object]:
            return lambda: torch.autograd.backward(outputs, gradients, inputs=wanted, retain_graph=again)

        return Halves(of(inputs, again=True), of(parameters, again=False), lambda: given)
    groups: list[dict[str, Any]] = []

    def first() -> None:
        groups.extend(torch_backward.stage_backward_input(outputs, gradients, inputs, iter(parameters))[1])

    def between() -> list[torch.Tensor]:
        return [g for group in groups for of in group.get("grads") or () for g in of or () if g is not None]

    return Halves(first, lambda: torch_backward.stage_backward_weight(iter(parameters), groups), between)


def _nothing() -> None:
    pass


def _used_again(outputs: list[torch.Tensor], inputs: list[torch.Tensor], parameters: list[torch.nn.Parameter]) -> bool:
    """Whether an output is read on the way to another one, or gradients come to a parameter from several places."""

    def nodes(tensors: Iterable[torch.Tensor]) -> list[Any]:
        return [torch_backward._get_grad_fn_or_grad_acc(tensor) for tensor in tensors if tensor.requires_grad]

    ends = nodes(outputs)
    readers = torch_backward.construct_reverse_graph(ends)
    if any(readers[end] for end in ends):
        return True
    groups = torch_backward.get_param_groups(nodes(inputs), nodes(parameters), readers)
    return any(len(group["intermediates"]) > 1 for group in groups)


def allocations(profiler: torch.profiler.profile) -> tuple[list[tuple[int, int]], dict[str, tuple[int, int]]]:
    """Read a profiler run with `profile_memory`: (nanoseconds, change in bytes) events, and spans of marked ranges.

    Ranges are those of `record_function` whose name starts with "PP:"; each name must occur once.
    """
    changes: list[tuple[int, int]] = []
    spans: dict[str, tuple[int, int]] = {}
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith("PP:"):
            spans[event.name()[3:]] = (event.start_ns(), event.start_ns() + event.duration_ns())
    changes.sort(key=lambda change: change[0])
    return changes, spans


@contextmanager
def tensors_without_data(joining: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Enter a mode in which tensors have shapes and dtypes but no data, and operations compute only those.

    They can be computed with those among `joining` that have no data already; those that have some keep it as it is.
    What torch logs of operations that fail in it is not shown: their exceptions say the same.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    modes = (tensor.fake_mode for tensor in joining if isinstance(tensor, FakeTensor))
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        with next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        logger.disabled = before


def expression(value: Any) -> Any:
    """Return a number of a captured graph as a sympy expression of unknown sizes; None for what is no number."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    return value if isinstance(value, (bool, int, float)) else None


def viewed(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the node of whose memory a node's value may be a part, None where it has memory of its own."""
    return _argument(node, write=False)


def mutated(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the node into whose memory a node writes, None where it writes nowhere."""
    return _argument(node, write=True)


def _argument(node: torch.fx.Node, *, write: bool) -> torch.fx.Node | None:
    """The argument that an operation's schema says is written into, or returned as a view."""
    if node.target is operator.getitem:
        found = node.args[0]
        return found if isinstance(found, torch.fx.Node) and not write else None
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write == write:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(given, torch.fx.Node):
                return given
    return None


@contextmanager
def following() -> Iterator[None]:
    """Let torch follow a model on tensors without data: quietly, and without looking whether a mask is causal.

    `nn.Transformer` compares its mask with a causal one to choose a faster kernel, which needs data. `len()` of a
    tensor, which Python makes a plain number, stays a size that is not known yet. A buffer that a forward replaces
    (`self.count = self.count + 1`) is written into instead, for a graph writes nowhere else.
    """
    from torch.nn.modules import transformer

    length = builtins.len
    builtins.len = lambda of: of.shape[0] if isinstance(of, torch.Tensor) and of.dim() else length(of)
    assign = torch.nn.Module.__setattr__

    def assigned(module: torch.nn.Module, name: str, value: Any) -> None:
        buffer = vars(module).get("_buffers", {}).get(name)
        if value is not buffer and without_data(value) and without_data(buffer) and value.shape == buffer.shape:
            buffer.copy_(value)
        else:
            assign(module, name, value)

    torch.nn.Module.__setattr__ = assigned  # type: ignore[method-assign, assignment]
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.nn.Module.__setattr__ = assign  # type: ignore[method-assign]
        transformer._detect_is_causal_mask = before
        builtins.len = length


def storage_of(tensor: torch.Tensor) -> int:
    """Return the identity of a tensor's storage while it lives, whether there is data in it or not."""
    return int(tensor.untyped_storage()._cdata)


def operation_name(operation: Any) -> str:
    """Return the name of an operation that a `DispatchMode` sees, such as `addmm`, without its overload."""
    return str(operation._schema.name).partition("::")[2]


def writes(operation: Any) -> bool:
    """Whether an operation that a `DispatchMode` sees writes into one of its arguments."""
    return bool(operation._schema.is_mutable)


def replace_tensors(module: torch.nn.Module, replaced: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every parameter and buffer of a module, and their gradients, as `Module.to` does."""
    module._apply(replaced)


def registered_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Return a module's own buffers by name, those among them that are None."""
    return dict(module._buffers)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: torch.nn.Module) -> list[dict[int, Any]]:
    """Return the hooks of a module's calls by number, of every kind; these are what the module asks, not copies."""
    return [getattr(module, name) for name in HOOKS]


def backward_hooks(module: torch.nn.Module) -> bool:
    """Whether a module has hooks of its backward, which no graph of operations keeps."""
    return bool(module._backward_pre_hooks or module._backward_hooks)


def without_data(tensor: Any) -> bool:
    """Whether something is a tensor with a shape and a dtype but no data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def own_attributes(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the attributes that a user has given to a tensor, without those by which torch lets it have no data."""
    own: Any = tensor
    with own.fake_mode if without_data(tensor) else nullcontext():
        bare = vars(torch.nn.Parameter(torch.empty(0, device=tensor.device), requires_grad=False))
    return {name: value for name, value in vars(tensor).items() if name not in bare}


def copy_hooks(tensor: torch.Tensor, to: torch.Tensor) -> None:
    """Give a tensor the hooks that another one's user has registered: they may change its gradients."""
    given: Any = tensor
    for hook in (given._backward_hooks or {}).values():
        to.register_hook(hook)
    for hook in (given._post_accumulate_grad_hooks or {}).values():
        to.register_post_accumulate_grad_hook(hook)


@contextmanager
def watching_parameters(told: Callable[[torch.nn.Parameter], None]) -> Iterator[None]:
    """Tell of every parameter that a module registers, while inside."""
    from torch.nn.modules import module as modules

    handle = modules.register_module_parameter_registration_hook(lambda module, name, parameter: told(parameter))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def parameters_without_data() -> Iterator[None]:
    """Let every parameter that a module registers have no data, while inside; all else that is made is real.

    Moving and casting such modules is done here, for torch exchanges the memory of parameters, of which these have
    none (`Module._apply`).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn import init
    from torch.nn.modules import module as modules

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def replaced(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter | None:
        if without_data(parameter) or parameter.is_meta or torch.nn.parameter.is_lazy(parameter):
            return None
        attributes = vars(parameter)
        if "_without_data" not in attributes:  # one that is registered twice is one
            with mode:
                empty = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
                )
                bare = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            vars(bare).update(attributes)
            parameter._without_data = bare  # type: ignore[attr-defined]
        return parameter._without_data  # type: ignore[attr-defined, no-any-return]

    def applied(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for child in module.children() if recurse else ():
            child._apply(function)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                found = function(parameter)
            if (found.dtype, found.device, found.shape) != (parameter.dtype, parameter.device, parameter.shape):
                cast = getattr(parameter, "_cast", None)  # one that several modules hold is one
                if cast is None or (cast.dtype, cast.device) != (found.dtype, found.device):
                    cast = torch.nn.Parameter(found, requires_grad=parameter.requires_grad)
                    parameter._cast = cast  # type: ignore[attr-defined]
                module._parameters[name] = cast
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
        return module

    before, drawing = torch.nn.Module._apply, init._no_grad_trunc_normal_

    def drawn(tensor: torch.Tensor, *options: Any, **more: Any) -> torch.Tensor:
        """Draws again whatever lies outside of its limits, so it has to look."""
        return tensor if without_data(tensor) else drawing(tensor, *options, **more)

    handle = modules.register_module_parameter_registration_hook(replaced)  # type: ignore[arg-type]
    torch.nn.Module._apply = applied  # type: ignore[method-assign]
    init._no_grad_trunc_normal_ = drawn
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            yield
    finally:
        torch.nn.Module._apply = before  # type: ignore[method-assign]
        init._no_grad_trunc_normal_ = drawing
        handle.remove()


def unscaled(gradients: list[torch.Tensor], inverse: torch.Tensor) -> torch.Tensor:
    """Multiply gradients by `inverse`; return 1 if any is infinite or no number, else 0, as GradScaler finds it."""
    found = torch.zeros((), device=inverse.device)
    kinds = dict.fromkeys((tensor.device, tensor.dtype) for tensor in gradients)
    for kind in kinds:
        own = [tensor for tensor in gradients if (tensor.device, tensor.dtype) == kind]
        torch._amp_foreach_non_finite_check_and_unscale_(own, found, inverse)
    return found


def next_scale(
    scale: torch.Tensor, updates: torch.Tensor, overflown: torch.Tensor, growth: float, backoff: float, interval: int
) -> None:
    """Change a scale of the loss and the number of updates since it last grew in place, as GradScaler does."""
    torch._amp_update_scale_(scale, updates, overflown, growth, backoff, interval)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is compiled when it is called first, once for all sizes and numbers of threads.

    Gradients of what it has returned can be asked for twice, as `halves` does. Raises `PlanError` for a torch that
    lacks what this needs.
    """
    torch_probe.probe(torch.__version__, torch_probe.COMPILING)
    from torch._dynamo import config as tracing
    from torch._functorch import config as differentiating

    differentiating.donated_buffer = False
    tracing.recompile_limit = tracing.accumulated_recompile_limit = RECOMPILES
    return torch.compile(function, dynamic=True, options={"cpp.dynamic_threads": True})


RECOMPILES = 1024
"""How often code may be compiled anew, for other threads, shapes of weights or kinds of batches; torch allows 8."""


def timeout() -> datetime.timedelta:
    """Return how long the ranks of the world's group wait for each other."""
    world = dist.group.WORLD
    assert world is not None
    found: datetime.timedelta = world._get_backend(world._device_types[0]).options._timeout
    return found
