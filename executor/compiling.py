"""Layers that torch compiles one by one, in a run as where they are profiled (`compiled = True` in a model file).

A kernel may fuse what one layer does, and nothing over a border between two: the times and bytes of layers then add up
to those of any stage, as without compiling.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from executor.batch import tensors
from executor.boundaries import Described
from executor.layer import Layer
from executor.layers import LayeredModel, unchanged_buffers
from executor.opaque import Call
from executor.stage_module import StageModule
from executor.torch_adapter import compiled
from planner.basis.errors import DEVICE, PlanError

COMPILERS = ("g++", "clang++")
"""What torch looks for, where the environment variable CXX names none."""


def compiled_layers(layered: LayeredModel) -> LayeredModel:
    """Return a model whose layers are compiled (`compile_layers`); its modules stay as they are."""
    return replace(layered, layers=compile_layers(layered.layers))


def compile_layers(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Return layers that are compiled, each when it is run first.

    Layers whose modules are of one class share code where torch finds that they can. One that it cannot compile runs as
    far as needed without (a "graph break"), one with a call that torch could not follow (`executor.opaque`) wholly.
    The loss is not compiled, as in a plain loop over `torch.compile(model)`.
    """
    kinds: dict[type[nn.Module], int] = {}
    return tuple(_compiled(layer, kinds.setdefault(type(layer.module), len(kinds))) for layer in layers)


def _compiled(layer: Layer, kind: int) -> Layer:
    module = layer.module
    if any(isinstance(part, Call) for part in module.modules()):
        return layer

    def run(*values: Any) -> Any:
        return module(*values)

    # What is compiled is looked up by code: layers of other classes have code of their own, or all would be tried.
    run.__code__ = run.__code__.replace(co_name=f"layer_of_kind_{kind}")
    return replace(layer, compiled=compiled(run))


def compile_now(stage: StageModule, taken: Iterable[Described], device: torch.device) -> None:
    """Run a stage of compiled layers forward and backward on zeros like what it takes, so that all code is there.

    Once like a step's first micro-batch, and once like those behind it, when parameters have gradients: torch may tell
    these apart. Nothing else stays of it. A layer that fails on zeros is left to the first step, which has data.
    """
    given = [one.empty(device).zero_().requires_grad_(one.gradient) for one in taken]
    wanted = [t for t in (*given, *stage.parameters()) if t.requires_grad]
    without = [p for p in stage.parameters() if p.requires_grad and p.grad is None]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), unchanged_buffers(stage):
        try:
            for _ in range(2):
                made = [t for t in tensors(stage(*given)) if t.requires_grad]
                if made and wanted:
                    torch.autograd.grad(made, wanted, [torch.zeros_like(t) for t in made], allow_unused=True)
                for parameter in without:
                    parameter.grad = torch.zeros_like(parameter)
        except Exception:
            return
        finally:
            for parameter in without:
                parameter.grad = None


def eager() -> Any:
    """Return a context in which what is compiled runs as if it were not."""
    return torch.compiler.set_stance("force_eager")


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is not compiled where compiled code calls it."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def check_compiler(path: str, kind: str) -> None:
    """Raise `PlanError` (exit 5) where torch finds nothing that makes code for a kind of device."""
    own, known = os.environ.get("CXX"), " and ".join(COMPILERS)
    if kind == "cpu" and not any(map(shutil.which, (own,) if own else COMPILERS)):
        raise PlanError(
            what="there is no C++ compiler",
            where=f"{path}, compiled",
            why=f"torch.compile needs one on a CPU; {f'CXX names {own}' if own else f'known are {known}'}, not found",
            fix="install g++, name another one in the environment variable CXX, or leave out compiled = True",
            code=DEVICE,
        )
    if kind == "cuda" and importlib.util.find_spec("triton") is None:
        raise PlanError(
            what="there is no triton",
            where=f"{path}, compiled",
            why="torch.compile makes its kernels for CUDA with it",
            fix="pip install triton, or leave out compiled = True",
            code=DEVICE,
        )
