"""What is counted without data is what is counted with it, and a model has its own data again behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from executor import devices
from executor.layers import cut
from executor.model_file import load
from profiles import dataless
from profiles.chain import Chain
from profiles.kinds import every, find
from profiles.passes import InPlace
from profiles.sizes import measure_sizes
from profiles.watch import Stopwatch
from tests.profiles.test_kinds import MODELS, file_of, layered_of
from tests.profiles.test_one_by_one import CPU, SMALL, passes_of

PEAKS = frozenset(dataless.PEAKS)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bytes(name: str, one_by_one: bool) -> None:
    passes = passes_of(file_of(MODELS[name][0]), one_by_one=one_by_one)
    before = [(id(tensor), tensor._version) for tensor in passes.chain.whole.parameters()]
    found = dataless.count(passes.chain, 5)
    assert [(id(tensor), tensor._version) for tensor in passes.chain.whole.parameters()] == before
    passes.count(5)
    assert found is not None
    assert found[1] == passes.values[5]
    for without, own in zip(found[0], passes.sizes[5], strict=True):
        for field in own.__struct_fields__:
            if field not in PEAKS:
                assert getattr(without, field) == getattr(own, field), field


@pytest.mark.parametrize("name", MODELS)
def test_the_same_kinds(name: str) -> None:
    layered = layered_of(file_of(MODELS[name][0]))
    inputs, _ = layered.parted(*file_of(MODELS[name][0]).draw(2, seed=0))
    found = dataless.without_data(layered, inputs, lambda own: find(layered, own))
    assert found is not None
    assert found.standing == MODELS[name][1]
    assert all(isinstance(p, nn.Parameter) and p.data_ptr() for p in layered.model.parameters())


def test_constants_are_made_anew_with_data() -> None:
    """What captured layers take of nobody, a mask for instance, is kept; but not without data."""
    file = load(f"{SMALL}:fields")
    layered = cut(file, file.build(0))
    passes = InPlace(Chain(file, layered, CPU), devices.Cpu(), Stopwatch(devices.Cpu()))
    inputs, targets = passes.chain.draw(3)
    expected = layered.loss(layered.stage(range(len(layered.layers)))(*inputs), targets)
    assert dataless.count(passes.chain, 3) is not None
    assert torch.equal(layered.loss(layered.stage(range(len(layered.layers)))(*inputs), targets), expected)


def test_a_model_that_looks_at_values_is_counted_with_data() -> None:
    file = load(f"{SMALL}:untraceable")
    layered = cut(file, file.build(0))
    passes = InPlace(Chain(file, layered, CPU), devices.Cpu(), Stopwatch(devices.Cpu()))
    assert passes.reckon(2) is False
    assert passes.sizes == {}
    assert every(layered).short is layered
    measure_sizes(passes.chain, devices.Cpu(), 2)


def test_peaks_follow_those_that_are_known() -> None:
    """Whatever a kernel needs for itself with some samples it needs with others, in proportion."""
    passes = passes_of(file_of(MODELS["blocks in a row"][0]), one_by_one=False)
    passes.count(2)
    known = passes.sizes[2]
    assert passes.reckon(6)
    less, more = dataless.count(passes.chain, 2), dataless.count(passes.chain, 6)
    assert less is not None
    assert more is not None
    for peak in dataless.PEAKS:
        for part, size in enumerate(passes.sizes[6]):
            low, high, real = (getattr(of[part], peak) for of in (less[0], more[0], known))
            assert getattr(size, peak) == (round(high * real / low) if low else high)
    assert passes.sizes[2] is known
