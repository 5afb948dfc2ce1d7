"""What the first half of a backward keeps for the second: counted by hand, and in the executor's own stages."""

from __future__ import annotations

import gc

import msgspec
import pytest
import torch
from torch import nn

from executor import devices
from executor.allocator import AllocationRecorder
from executor.boundaries import boundaries
from executor.layers import cut
from executor.model_file import ModelFile
from executor.noise import Noise
from executor.stage import Sources, Stage
from executor.user_code import default_optimizer
from planner.costs.stage_memory import stage_memory
from planner.values.profile import Profile
from profiles.chain import Chain
from profiles.estimate import profile_of
from profiles.sizes import measure_sizes

FLOAT, SAMPLES, WIDTH = 4, 64, 32
CPU = torch.device("cpu")
ONE = SAMPLES * WIDTH * FLOAT


class Branch(nn.Module):
    """What is added to the input of a block: two linear layers and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """A residual with a norm in front of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), Branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(self.norm(x))


class Seen(nn.Module):
    """Puts out a view of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(-1, WIDTH)


def file_of(model: nn.Module) -> ModelFile:
    return ModelFile(
        path="by hand",
        model=lambda: model,
        batch=lambda n: (torch.randn(n, WIDTH), torch.randn(n, WIDTH)),
        loss=lambda outputs, targets: (outputs - targets).square().mean(),
        optimizer=default_optimizer,
        layers=None,
        batch_size=SAMPLES,
    )


def test_what_stays_of_two_linear_layers_and_a_relu() -> None:
    """Of each linear layer the gradient of its output: the inner one's is 4 wide; the ReLU's is let go of.

    At its worst the first half has both of the inner ones, wide, for the ReLU's backward.
    """
    file = file_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), Branch(), nn.ReLU(), Seen()))
    (first, branch, relu, seen, loss), _ = measure_sizes(
        Chain(file, cut(file, file.model()), CPU), devices.Cpu(), SAMPLES
    )
    found = [(size.between_bytes, size.between_output) for size in (first, branch, relu, seen, loss)]
    assert found == [(0, True), (4 * ONE, True), (0, False), (0, True), (0, False)]
    assert branch.input_peak_bytes == 8 * ONE
    assert first.input_peak_bytes == 0, "nobody asks for the gradients of the inputs"
    one = (4 * WIDTH * WIDTH) * FLOAT
    assert one <= branch.weight_peak_bytes <= 2 * one
    assert one <= branch.weight_first_peak_bytes <= 2 * one + 5 * WIDTH * FLOAT


LAST = {"a linear layer": nn.Linear, "a relu": lambda i, o: nn.ReLU()}


@pytest.fixture(scope="module", params=LAST)
def file(request: pytest.FixtureRequest) -> ModelFile:
    blocks = [Block() for _ in range(4)]
    return file_of(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.ReLU(), Seen(), LAST[request.param](WIDTH, WIDTH))
    )


@pytest.fixture(scope="module")
def measured(file: ModelFile) -> Profile:
    """A profile with the bytes that the profiler measures here."""
    model = file.build(seed=0)
    costs = profile_of(model, file.batch, hardware="a100", dtype=None, sizes=[SAMPLES])
    sizes, _ = measure_sizes(Chain(file, cut(file, model), CPU), devices.Cpu(), SAMPLES)
    *layers, loss = (
        msgspec.structs.replace(layer, sizes=(size,))
        for layer, size in zip((*costs.layers, costs.loss), sizes, strict=True)
    )
    return msgspec.structs.replace(costs, layers=tuple(layers), loss=loss)


def test_stages_allocate_what_the_profile_says(file: ModelFile, measured: Profile) -> None:
    """Three stages, two micro-batches whose weight halves come last: what each half leaves, and needs at its worst."""
    layered = cut(file, file.build(seed=0))
    count = len(layered.layers)
    ranges = (range(3), range(3, 6), range(6, count))
    stages = [
        Stage(i, layered.stage(own), boundary, layered.loss if i == 2 else None, None, splits=True)
        for i, (own, boundary) in enumerate(zip(ranges, boundaries(file, layered, ranges, SAMPLES, CPU), strict=True))
    ]
    for stage in stages:
        stage.settle(Sources(file, layered), set(), CPU, 1 << 20)
        stage.module.zero_grad()
    inputs, targets = layered.parted(*file.draw(SAMPLES, seed=0))
    gc.collect()
    held: list[object] = []  # messages, which are counted elsewhere
    with AllocationRecorder(devices.Cpu()) as recorder:
        for m in range(2):
            passed = inputs
            for s, stage in enumerate(stages):
                with recorder.marked(f"{s}F{m}"):
                    stage.forward(m, passed, Noise(0, 0, m, CPU), lambda result, of=stage: of.loss(result, targets))
                passed = tuple(value.detach() for value in stage.passing[m].outputs)
            del passed
        for m in range(2):
            gradients: tuple[torch.Tensor, ...] = ()
            for s, stage in reversed(list(enumerate(stages))):
                with recorder.marked(f"{s}I{m}"):
                    gradients = stage.backward_input(m, gradients)
                held.append(gradients)
        for m in range(2):
            for s, stage in reversed(list(enumerate(stages))):
                with recorder.marked(f"{s}W{m}"):
                    stage.backward_weight(m)
    few = 64  # the loss, and its gradient
    for s, own in enumerate(ranges):
        of = stage_memory(measured, own, SAMPLES)
        assert recorder.span(f"{s}F1")[1] == pytest.approx(of.kept, abs=few)
        assert recorder.span(f"{s}I1") == pytest.approx((of.input_peak, of.between + of.sent_gradient), abs=few)
        freed = of.saved + of.between
        assert [recorder.span(f"{s}W{m}")[1] for m in range(2)] == pytest.approx(
            [of.gradients - freed, -freed], abs=few
        )
        for m, most in enumerate((of.weight_first_peak, of.weight_peak)):
            # never less; a stage that is longer than a layer may let go of one gradient sooner
            assert most - ONE - few <= recorder.span(f"{s}W{m}")[0] <= most + few, (s, m)
