"""What foreplan uses of torch that torch does not promise to keep, by name, and whether it is there.

`executor.torch_adapter` imports this before anything else, so that another torch is refused here, with the names that
it lacks, not later and somewhere inside.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch

from planner.basis.errors import DEVICE, PlanError

OLDEST, NEWEST = (2, 11), (2, 15)
"""The first and the last version with which the tests have been run (CONTRIBUTING.md)."""

NEEDED: dict[str, tuple[str, ...]] = {
    "torch.distributed.pipelining._backward": (
        "stage_backward_input",
        "stage_backward_weight",
        "construct_reverse_graph",
        "get_param_groups",
        "_get_grad_fn_or_grad_acc",
    ),
    "torch._C._distributed_c10d": (
        "ProcessGroup._get_backend",
        "ProcessGroup._device_types",
        "Backend.Options._timeout",
    ),
    "torch.distributed.elastic.multiprocessing": (
        "DefaultLogsSpecs",
        "Std",
        "api.SignalException",
        "errors.ChildFailedError",
        "errors.record",
    ),
    "torch.distributed.launcher.api": ("LaunchConfig", "elastic_launch"),
    "torch.export": ("Dim.AUTO", "export", "ExportedProgram.graph_signature"),
    "torch.fx.experimental.sym_node": ("SymNode.expr",),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch._C._autograd": (
        "_KinetoEvent.name",
        "_KinetoEvent.nbytes",
        "_KinetoEvent.start_ns",
        "_KinetoEvent.duration_ns",
        "_ProfilerResult.events",
    ),
    "torch.autograd.profiler": ("profile().kineto_results",),
    "torch.utils._pytree": ("tree_map", "tree_flatten", "tree_unflatten", "tree_leaves", "arg_tree_leaves"),
    "torch.utils._python_dispatch": ("TorchDispatchMode",),
    "torch.utils.flop_counter": ("FlopCounterMode", "flop_registry"),
    "torch.nn.modules.module": (
        "Module._apply",
        "Module()._buffers",
        "Module()._parameters",
        "Module()._forward_pre_hooks",
        "Module()._forward_hooks",
        "Module()._backward_pre_hooks",
        "Module()._backward_hooks",
        "register_module_parameter_registration_hook",
    ),
    "torch.nn.modules.transformer": ("_detect_is_causal_mask",),
    "torch.nn.init": ("_no_grad_trunc_normal_",),
    "torch": (
        "_amp_foreach_non_finite_check_and_unscale_",
        "_amp_update_scale_",
        "UntypedStorage._cdata",
        "Tensor._backward_hooks",
        "Tensor._is_view",
        "Tensor._post_accumulate_grad_hooks",
        "ops.aten.add.Tensor._schema.is_mutable",
        "ops.aten.add.Tensor.namespace",
        "ops.aten.add.Tensor.overloadpacket",
        "ops.aten.add.Tensor.tags",
    ),
}
"""Names by module. `A().b` is an attribute that the constructor of `A` sets; of `a|b` one is enough."""

COMPILING: dict[str, tuple[str, ...]] = {
    "torch._dynamo.config": ("recompile_limit", "accumulated_recompile_limit"),
    "torch._functorch.config": ("donated_buffer",),
    "torch._inductor.config": ("cpp.dynamic_threads",),
    "torch.compiler": ("set_stance", "disable"),
}
"""What only compiled layers need; importing it takes a second."""


def missing(needed: Mapping[str, tuple[str, ...]] = NEEDED) -> list[str]:
    """Return what this torch lacks of what is needed, as `module.name`; of a module that it lacks, only that."""
    lacking = []
    for path, names in needed.items():
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            lacking.append(f"{path} ({error})")
            continue
        lacking += [f"{path}.{name}" for name in names if not any(_has(module, one) for one in name.split("|"))]
    return lacking


def _has(module: Any, name: str) -> bool:
    kind, _, attribute = name.rpartition("().")
    try:
        found = attrgetter(kind or name)(module)
    except AttributeError:
        return False
    return not kind or any(attribute in _set_by(one) for one in found.__mro__)


def _set_by(kind: type) -> set[str]:
    """The names that a class declares, and those in its constructor."""
    constructor = getattr(vars(kind).get("__init__"), "__code__", None)
    return {*inspect.get_annotations(kind), *(constructor.co_names if constructor else ())}


def probe(version: str, needed: Mapping[str, tuple[str, ...]] = NEEDED) -> None:
    """Raise `PlanError` where torch, whose version this is, lacks a name or is older than the oldest that works."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    lacking = missing(needed)
    if found >= OLDEST and not lacking:
        return
    oldest, newest = (".".join(map(str, one)) for one in (OLDEST, NEWEST))
    behind = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    raise PlanError(
        what=f"torch {version} is too old" if found < OLDEST else f"torch {version} lacks what foreplan uses of it",
        where=f"torch {version}" + (f": {', '.join(lacking)}" if lacking else ""),
        why=f"foreplan works with torch {oldest} to {newest}",
        fix=f'pip install "torch>={oldest},<{behind}"',
        code=DEVICE,
        details={"missing": lacking},
    )


probe(torch.__version__)
