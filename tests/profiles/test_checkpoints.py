"""The peak of a step with torch's checkpoint around layers: predicted from their profile, counted by the allocator."""

from __future__ import annotations

import gc
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from executor import devices
from executor.allocator import AllocationRecorder
from executor.layers import cut
from executor.model_file import ModelFile, load
from planner.costs.memory import MemoryModel
from planner.costs.placed import Placed
from planner.programs.lowering import unroll
from planner.programs.waits import Linked
from planner.values.plan import Plan, Stage
from planner.values.profile import Profile
from profiles.chain import Chain
from profiles.estimate import estimate
from profiles.sizes import measure_sizes

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py")
SAMPLES = 16
BLOCKS = 8


@pytest.fixture(scope="module")
def measured() -> Profile:
    """The example's profile with the bytes that the profiler measures here."""
    file = load(GPT)
    costs = estimate(GPT, hardware="a100", sizes=[SAMPLES], progress=lambda what, done, of: None)
    sizes, _ = measure_sizes(Chain(file, cut(file, file.build(seed=0)), torch.device("cpu")), devices.Cpu(), SAMPLES)
    *layers, loss = (
        msgspec.structs.replace(layer, sizes=(size,))
        for layer, size in zip((*costs.layers, costs.loss), sizes, strict=True)
    )
    return msgspec.structs.replace(costs, layers=tuple(layers), loss=loss)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> object:
        return checkpoint(self.inner, x, use_reentrant=False)


def allocated(file: ModelFile, chosen: range) -> int:
    """The most bytes that torch's allocator hands out for a forward and a backward."""
    model = file.build(seed=0)
    for i in chosen:
        model.blocks[i] = Checkpointed(model.blocks[i])  # type: ignore[union-attr, operator]
    (characters,), targets = file.draw(SAMPLES, seed=0)
    gc.collect()  # what another test has left in circles would be freed in the step, and counted as its
    with AllocationRecorder(devices.Cpu()) as recorder, recorder.marked("step"):
        outputs = model(characters)
        file.loss(outputs, targets).backward()
    return recorder.span("step")[0]


@pytest.mark.parametrize("chosen", [range(0), range(BLOCKS), range(0, BLOCKS, 2)], ids=["none", "all", "every second"])
def test_the_peak_is_the_allocator_s(measured: Profile, chosen: range) -> None:
    layers = tuple(layer.name for layer in measured.layers)
    plan = Plan(
        strategy="single",
        schedule="1f1b",
        stages=(Stage(layers=layers, devices=(measured.machine.devices[0].name,)),),
        microbatches=1,
        batch=SAMPLES,
        recompute_layers=tuple(f"blocks.{i}" for i in chosen),
    )
    model = MemoryModel(Placed(measured, plan, measured.machine), Linked(unroll(plan)))
    backward = float(model.levels()[[str(a) for a in model.linked.actions].index("0B0")])
    inputs, targets = measured.batch_bytes[-1][1:]
    there = float(model.static.sum()) + inputs + targets
    assert backward - there == pytest.approx(allocated(load(GPT), chosen), rel=0.02)
