"""The GPT of examples/gpt.py at the audit's size, with torch's checkpoint in chosen blocks, counted without data."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from executor.torch_adapter import tensors_without_data
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile
from profiles import estimate
from profiles.counting import Counter

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt.py"
SIZES = {"WIDTH": 768, "CONTEXT": 512, "HEADS": 12, "BLOCKS": 12}


def module(**sizes: int) -> Any:
    """Return the example's module with other sizes."""
    spec = importlib.util.spec_from_file_location("audited_gpt", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    for name, size in (SIZES | sizes).items():
        setattr(found, name, size)
    return found


def batch(gpt: Any, n: int) -> tuple[tuple[torch.Tensor], torch.Tensor]:
    """Return characters and the same ones later: only their shapes matter."""
    characters = torch.zeros(n, gpt.CONTEXT, dtype=torch.long)
    return (characters,), characters.clone()


def counted(gpt: Any, samples: int, checkpointed: Collection[int]) -> int:
    """Count the most bytes that one forward and backward of a user's loop add, on torch's tensors without data."""
    with tensors_without_data():
        model = gpt.model()
        for i in checkpointed:
            model.blocks[i] = _Checkpointed(model.blocks[i])
        (characters,), targets = batch(gpt, samples)
        counter = Counter()
        with counter, counter.marked("step"):
            outputs = model(characters)
            gpt.loss(outputs, targets).backward()
    return counter.span("step")[0]


@functools.cache
def profile(samples: int, dtype: str = "fp32", **sizes: int) -> Profile:
    """Estimate the model's profile in a dtype; its bytes are counted on tensors without data, layer by layer."""
    gpt = module(**sizes)
    with torch.device("meta"):
        model = gpt.model()
    return estimate.profile_of(
        model,
        lambda n: batch(gpt, n),
        hardware="a100",
        dtype=dtype,
        sizes=[samples],
        loss=gpt.loss,
        optimizer=gpt.optimizer,
    )


def predicted(costs: Profile, samples: int, checkpointed: Collection[int]) -> float:
    """Return the peak of a step on one device, one micro-batch in flight."""
    plan = Plan(
        strategy="single",
        schedule="1f1b",
        stages=(Stage(layers=tuple(layer.name for layer in costs.layers), devices=(costs.machine.devices[0].name,)),),
        microbatches=1,
        batch=samples,
        recompute_layers=tuple(f"blocks.{i}" for i in checkpointed),
    )
    model = MemoryModel(Placed(costs, plan, costs.machine), Linked(unroll(plan)))
    return float(model.peaks()[0])


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)
