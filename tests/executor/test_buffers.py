"""Buffers that forwards write: once per micro-batch, whatever is repeated, and not under what has been sent."""

from __future__ import annotations

import torch
from torch import nn

from executor.layer import Layer
from executor.stage_module import StageModule


class Counting(nn.Module):
    """Computes with a buffer that every forward moves, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("still", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(self.linear(x)) + self.still
        with torch.no_grad():
            self.mean.mul_(0.5).add_(x.mean(0))
        return x * torch.tanh(self.mean.clone()), self.mean


def stage(*, recompute: bool) -> tuple[Counting, StageModule]:
    torch.manual_seed(0)
    model = Counting()
    layer = Layer(name="counting", module=model, inputs=("x",), outputs=("y", "mean"))
    return model, StageModule([layer], ("x",), ("y", "mean"), checkpoints=[range(1)] if recompute else [])


def test_a_repeated_forward_writes_buffers_once() -> None:
    """Three micro-batches in flight, their backwards behind all forwards: all is as without recompute."""
    batches = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for recompute in (False, True):
        model, module = stage(recompute=recompute)
        for _ in range(2):
            outputs = [module(batch)[0] for batch in batches]
            for output in reversed(outputs):
                output.square().sum().backward()
        found.append((model.state_dict(), {name: p.grad for name, p in model.named_parameters()}))
    (state, gradients), (repeated, again) = found
    assert int(repeated["norm.num_batches_tracked"]) == 6
    for name, tensor in state.items():
        assert torch.equal(tensor, repeated[name]), name
    for name, gradient in gradients.items():
        assert gradient is not None
        assert torch.equal(gradient, again[name]), name


def test_what_has_been_sent_is_not_written_any_more() -> None:
    _, module = stage(recompute=False)
    sent = module(torch.ones(5, 4))[1]
    before = sent.clone()
    module(-torch.ones(5, 4))
    assert torch.equal(sent, before)
