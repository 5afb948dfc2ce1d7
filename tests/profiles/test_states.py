"""Bytes that are there whatever the batch, as predicted of a stage, against those of a step in this process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from executor.layers import cut
from executor.model_file import load
from planner.costs.stage_memory import stage_memory
from planner.placement.filling import layers_bytes
from planner.search.room import held
from planner.values.profile import Profile, Tied
from profiles.estimate import estimate
from profiles.states import tied_bytes

MODELS = "tests/executor/small_models.py"


def profile_of(name: str) -> Profile:
    return estimate(f"{MODELS}:{name}", hardware="a100", sizes=[2], progress=lambda *_: None)


def step_of(name: str, layers: range) -> tuple[int, int, int, int]:
    """Bytes of parameters, buffers, gradients and state that a stage holds behind a step of the whole model."""
    file = load(f"{MODELS}:{name}")
    layered = cut(file, file.build(0))
    inputs, targets = layered.parted(*file.draw(2, seed=0))
    layered.loss(layered.stage(range(len(layered.layers)))(*inputs), targets).backward()
    module: nn.Module = layered.stage(layers)
    names = layered.parameter_names()
    optimizer = file.optimizer_of([(names[id(p)], p) for p in module.parameters() if p.requires_grad])
    if optimizer is not None:
        optimizer.step()
    state = optimizer.state.values() if optimizer is not None else ()
    return (
        sum(p.nbytes for p in module.parameters()),
        sum(b.nbytes for b in module.buffers()),
        sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
        sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)),
    )


@pytest.mark.parametrize("name", ["tied", "twice", "kept", "odd", "asleep", "bare"])
def test_a_stage_holds_what_it_is_said_to_hold(name: str) -> None:
    profile = profile_of(name)
    count = len(profile.layers)
    for layers in (range(count), range(count // 2), range(count // 2, count), range(1), range(count - 1, count)):
        of = stage_memory(profile, layers, 2)
        assert (of.parameters, of.buffers, of.gradients, of.optimizer) == step_of(name, layers), (name, layers)


def test_what_is_shared_is_said_alike_by_both_profiles() -> None:
    for name in ("tied", "twice"):
        file = load(f"{MODELS}:{name}")
        assert tied_bytes(file, cut(file, file.build(0))) == profile_of(name).tied_bytes
    weight = 12 * 12 * 4
    assert profile_of("tied").tied_bytes == (
        Tied(parameter_bytes=weight, gradient_bytes=weight, optimizer_bytes=2 * weight + 4),
    )


def test_a_lower_bound_counts_it_once_wherever_the_model_is_cut() -> None:
    profile = profile_of("twice")
    least = held(layers_bytes(profile.counted_once()), "all-reduce", 1, on_host=False)
    count = len(profile.layers)
    for cut_at in range(1, count):
        for layers in (range(cut_at), range(cut_at, count), range(count)):
            of = stage_memory(profile, layers, 2)
            assert least[layers.start : layers.stop].sum() <= of.parameters + of.optimizer
    whole = stage_memory(profile, range(count), 2)
    assert least.sum() == whole.parameters + whole.optimizer
    assert profile.counted_once() is profile.counted_once()
