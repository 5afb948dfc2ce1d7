"""What autograd keeps, on the host and back: the same gradients, and the device's memory let go of in between."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from executor.allocator import AllocationRecorder
from executor.devices import Cpu
from executor.swapping import FileTier, Swapped, let_go

WIDTH, SAMPLES = 64, 128
KEPT = SAMPLES * WIDTH * 4
"""Bytes of one value between two layers."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )


def test_memory_falls_where_it_is_let_go_of_and_gradients_are_the_same() -> None:
    module, value, tier = model(), torch.randn(SAMPLES, WIDTH), FileTier()
    module(value).square().mean().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    swapped = Swapped(tier, (*module.parameters(), value))
    with AllocationRecorder(Cpu()) as recorder:
        with recorder.marked("forward"), swapped.keeping():
            loss = module(value).square().mean()
        with recorder.marked("out"):
            swapped.offload()
            swapped.wait()
        with recorder.marked("release"):
            swapped.release()
        with recorder.marked("fetch"):
            swapped.fetch()
        with recorder.marked("backward"):
            swapped.wait()
            loss.backward()
    assert all(torch.equal(p.grad, own) for p, own in zip(module.parameters(), expected, strict=True))
    # Kept are two tanh's results, each of them once though the next layer keeps it too, and the last layer's.
    kept = 3 * KEPT
    assert recorder.span("forward")[1] == pytest.approx(kept, abs=64)
    assert recorder.span("out") == (0, 0)
    assert recorder.span("release")[1] == pytest.approx(-kept, abs=64)
    assert recorder.span("fetch")[1] == pytest.approx(kept, abs=64)
    assert recorder.span("backward")[1] <= -kept + sum(p.nbytes for p in module.parameters()) + 64


def test_rooms_on_the_host_are_used_again() -> None:
    module, value, tier = model(), torch.randn(SAMPLES, WIDTH), FileTier()
    for _ in range(3):
        swapped = Swapped(tier, (*module.parameters(), value))
        with swapped.keeping():
            loss = module(value).square().mean()
        swapped.offload()
        swapped.wait()
        swapped.release()
        swapped.fetch()
        swapped.wait()
        loss.backward()
    assert {size: len(rooms) for size, rooms in tier.free.items()} == {KEPT: 3}


def test_what_stays_anyway_is_not_moved() -> None:
    module, value = model(), torch.randn(SAMPLES, WIDTH)
    swapped = Swapped(FileTier(), (*module.parameters(), value))
    with swapped.keeping():
        module(value)
    gc.collect()
    held = {block.nbytes for block in swapped.blocks.values()}
    assert held == {KEPT}


def test_what_was_sent_lets_go_of_its_memory_and_keeps_its_graph() -> None:
    module, value = model(), torch.randn(SAMPLES, WIDTH, requires_grad=True)
    output = module(value)
    let_go([output, value], [value])
    assert output.untyped_storage().nbytes() == 0
    assert value.untyped_storage().nbytes() == KEPT
    output.backward(torch.ones(SAMPLES, WIDTH))
    assert value.grad is not None
