"""A forward repeated once for a backward in two halves: the same gradients, and nothing kept that a node has used."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from executor.layer import Layer
from executor.noise import Noise
from executor.repeating import Forgotten
from executor.stage_module import StageModule
from executor.torch_adapter import halves

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block that drops out, and counts how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.calls = nn.Linear(6, 6), nn.Dropout(0.4), 0
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.drop(torch.tanh(self.norm(self.inner(x))))


def chain(checkpoints: list[range], precision: str = "") -> tuple[StageModule, list[Block]]:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    layers = [
        Layer(name=f"b{i}", module=block, inputs=(f"x{i}",), outputs=(f"x{i + 1}",), precision=precision)
        for i, block in enumerate(blocks)
    ]
    return StageModule(layers, ("x0",), ("x4",), checkpoints=checkpoints), blocks


@pytest.mark.parametrize("precision", ["", "bf16"])
@pytest.mark.parametrize("checkpoints", [[range(4)], [range(1), range(2, 3)], [range(2), range(2, 4)]])
def test_halves_of_what_is_repeated_are_those_of_what_is_kept(checkpoints: list[range], precision: str) -> None:
    batches = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for runs in ([], checkpoints):
        module, blocks = chain(runs, precision)
        rest, inputs, repetitions = [], [], []
        for m, batch in enumerate(batches):
            module.noise, module.forgotten = Noise(3, 0, m, CPU), []
            inputs.append(batch.clone().requires_grad_())
            output = module(inputs[-1])
            repetitions.append(module.forgotten)
            rest.append(halves([output], [torch.ones_like(output)], [inputs[-1]], list(module.parameters())))
        for (first, _, _), forgotten in zip(rest, repetitions, strict=True):
            for one in forgotten:
                one.repeat()
            first()
        for _, second, _ in reversed(rest):
            second()
        repeated = {i for run in runs for i in run}
        assert [block.calls for block in blocks] == [6 if i in repeated else 3 for i in range(4)]
        gradients = [p.grad for p in module.parameters()] + [value.grad for value in inputs]
        found.append((gradients, module.state_dict()))
    (kept, state), (again, after) = found
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_what_is_repeated_is_let_go_of_with_the_graph() -> None:
    module, _ = chain([range(4)])
    module.forgotten = []
    value = torch.randn(5, 6, requires_grad=True)
    output = module(value)
    (forgotten,) = module.forgotten
    module.forgotten = None
    assert all(place() is not None and place().tensor is None for place, *_ in forgotten.places)
    forgotten.repeat()
    filled = [weakref.ref(place().tensor) for place, *_ in forgotten.places]
    output.sum().backward()
    del output, forgotten
    gc.collect()
    assert not [held for held in filled if held() is not None and held() is not value]


def test_nothing_behind_the_last_tensor_that_is_needed_is_computed() -> None:
    steps: list[str] = []

    def work(x: torch.Tensor) -> torch.Tensor:
        steps.append("square")
        y = x * x
        steps.append("behind")
        return y + 1

    once = torch.ones(3, requires_grad=True)
    forgotten = Forgotten(work, (once,), *_nothing())
    forgotten.run().sum().backward()  # asks for itself
    assert steps == ["square", "behind", "square"]
    assert torch.equal(once.grad, torch.full((3,), 2.0))


def test_a_forward_that_is_another_one_the_second_time_is_refused() -> None:
    sizes = iter((3, 4))

    def work(x: torch.Tensor) -> torch.Tensor:
        part = x[: next(sizes)]
        return part * part

    forgotten = Forgotten(work, (torch.ones(5, requires_grad=True),), *_nothing())
    forgotten.run()
    with pytest.raises(CheckpointError, match=r"came to a tensor of \(4,\)"):
        forgotten.repeat()


def _nothing():
    from contextlib import nullcontext

    return nullcontext(), nullcontext()
