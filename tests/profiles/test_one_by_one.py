"""A model of which one layer at a time is in memory has the profile of one that is there whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from executor import devices, hollow
from executor.layers import cut
from executor.model_file import ModelFile
from planner.basis.errors import DEVICE, PlanError
from planner.values.cluster import Cluster, Host
from planner.values.profile import Profile
from profiles import machine, measure, subject
from profiles.chain import Chain
from profiles.estimate import count
from profiles.kinds import every, find
from profiles.machine import Machine
from profiles.passes import InPlace, OneByOne, Passes
from profiles.watch import Stopwatch
from tests.profiles.test_kinds import MODELS, WIDTH, file_of

SMALL = Path(__file__).parent.parent / "executor" / "small_models.py"
CPU = torch.device("cpu")


def passes_of(file: ModelFile, *, one_by_one: bool, fold: bool = False) -> Passes:
    layered = cut(file, hollow.build(file, 0) if one_by_one else file.build(0))
    kinds = find(layered, layered.parted(*file.draw(2, seed=0))[0]) if fold else every(layered)
    chain = Chain(file, kinds.short, CPU, resident=not one_by_one)
    return (OneByOne if one_by_one else InPlace)(chain, devices.Cpu(), Stopwatch(devices.Cpu()))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, WIDTH))


class Captured(nn.Module):
    """The same, captured: of its graph nobody asks whether one sample is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.row = normed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.row(x)


class Scaled(nn.Module):
    """Computes of buffers what one layer reads, and what three do: a step lets go of it in the first's backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.register_buffer("one", torch.randn(WIDTH))
        self.register_buffer("many", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        many = self.many * 2
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) * (self.one * 3 if i == 1 else many if i > 1 else 1.0)
        return x


@pytest.mark.parametrize("name", [*MODELS, "batch norm", "computed of buffers"])
def test_the_same_bytes(name: str) -> None:
    """Static, saved, sent, at the worst; those of tied parameters count where they are held, as ever."""
    file = file_of(MODELS[name][0] if name in MODELS else normed if name == "batch norm" else Scaled)
    whole, alone = (passes_of(file, one_by_one=one_by_one) for one_by_one in (False, True))
    assert alone.static() == whole.static()
    for samples in (2, 5):
        whole.count(samples)
        alone.count(samples)
    ignored = ("backward_first_peak_bytes",) if "many times" in name else ()  # whole, the last call allocates for all
    for samples, sizes in whole.sizes.items():
        for one, other in zip(alone.sizes[samples], sizes, strict=True):
            assert msgspec.structs.replace(one, **{field: getattr(other, field) for field in ignored}) == other
    assert alone.values == whole.values
    assert alone.chain.layered.tied() == whole.chain.layered.tied()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_kinds(name: str) -> None:
    """Found without data as with data."""
    file = file_of(MODELS[name][0])
    found = [passes_of(file, one_by_one=one_by_one, fold=True).chain.layers for one_by_one in (False, True)]
    assert [layer.name for layer in found[0]] == [layer.name for layer in found[1]]


def test_a_pass_leaves_nothing_in_memory() -> None:
    file = file_of(MODELS["blocks in a row"][0])
    passes = passes_of(file, one_by_one=True)
    passes.timed((1, 2), extra=True)
    assert all(hollow.is_hollow(p) and p.grad is None for p in passes.chain.whole.parameters())
    kinds = {kind for _, part, kind in passes.watch.seconds if part == 1}
    assert kinds == {"forward", "backward", "backward_input", "backward_weight", "recompute", "optimizer"}
    assert all(seconds for seconds in passes.watch.seconds.values())


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Profile]:
    """Profiles of a small model on a machine that is known."""
    host = Host(name="local", cores=2, memory_bytes=2**30)
    known = Machine(
        cluster=Cluster(name="this machine", hosts=(host,), elastic=True), action_s=1e-5, launch_s=1e9, created=""
    )
    monkeypatch.setattr(machine, "machine", lambda kind, *, again=False: known)

    def profile(name: str, **how: bool) -> Profile:
        return measure.measure(
            f"{SMALL}:{name}",
            device="cpu",
            sizes=[1, 2, 4],
            budget_s=1e3 if how else 1.0,
            progress=lambda what, done, of: None,
            **how,
        )

    monkeypatch.setattr("profiles.times.MAX_ROUNDS", 2)
    return profile


def test_the_same_profile(measured: Callable[..., Profile]) -> None:
    """But for the times, and for the unsplit model, which is not there to be run."""
    whole, alone = measured("skips", one_by_one=False), measured("skips", one_by_one=True)
    assert [layer.name for layer in alone.layers] == [layer.name for layer in whole.layers]
    for one, other in zip((*alone.layers, alone.loss), (*whole.layers, whole.loss), strict=True):
        fields = (
            "parameter_bytes",
            "buffer_bytes",
            "gradient_bytes",
            "optimizer_bytes",
            "optimizer_peak_bytes",
            "sizes",
        )
        assert [getattr(one, field) for field in fields] == [getattr(other, field) for field in fields]
        assert all(t.median_s > 0 for times in one.times for t in times.forward)
    assert (alone.values, alone.tied, alone.key, alone.batch_bytes) == (
        whole.values,
        whole.tied,
        whole.key,
        whole.batch_bytes,
    )
    assert (whole.whole != (), alone.whole) == (True, ())
    assert alone.measuring is not None
    assert whole.measuring is not None
    assert (alone.measuring.one_by_one, whole.measuring.one_by_one) == (True, False)


def test_a_model_that_does_not_fit_is_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what its parameters take; one that is registered several times counts once."""
    file = file_of(MODELS["one module, many times"][0])
    bytes_ = hollow.held_bytes(file.build(0))
    needed = bytes_ * subject.STATES / subject.SHARE
    for free, resident in ((needed * 1.01, True), (needed * 0.99, False)):
        monkeypatch.setattr(devices, "free_bytes", lambda kind, free=free: free)
        assert subject.prepare(file, "cpu").resident is resident


def test_a_layer_that_does_not_fit_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients and two moments: a linear layer of 16 x 16 and a bias takes 4 * 4 * 272 bytes."""
    file = file_of(lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, WIDTH)))
    needed = subject.ALONE * 4 * (16 * 16 + 16)
    monkeypatch.setattr(devices, "free_bytes", lambda kind: needed)
    assert not subject.prepare(file, "cpu", one_by_one=True).resident
    monkeypatch.setattr(devices, "free_bytes", lambda kind: needed - 1)
    with pytest.raises(PlanError, match="too large for this host") as raised:
        subject.prepare(file, "cpu", one_by_one=True)
    assert (raised.value.where, raised.value.code) == ("layer '1'", DEVICE)


def test_a_batch_that_no_host_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    (inputs,), targets = file.draw(1, seed=0)
    each = inputs.nbytes + targets.nbytes
    monkeypatch.setattr(devices, "memory_bytes", lambda kind: 64 * each)
    for samples, fits in ((64, True), (65, False)):
        of = dataclasses.replace(file, batch_size=samples)
        if fits:
            subject.check_batch(of)
            continue
        with pytest.raises(PlanError, match="batch is too large for this host") as raised:
            subject.check_batch(of)
        assert (raised.value.where, raised.value.fix) == ("by hand, batch_size", "batch_size = 16")


def test_a_model_that_needs_two_samples_is_measured_from_two_on() -> None:
    """Batch norm of one number per channel is an error, of a picture's many it is not."""
    for make, needs in ((normed, True), (Captured, True), (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), False)):
        file = file_of(make)
        model = subject.prepare(file, "cpu", one_by_one=False)
        before = [t.clone() for t in model.layered.model.buffers()]
        assert subject.needs_two(file, model.layered.model) is needs
        assert all(map(torch.equal, before, model.layered.model.buffers()))
        assert sorted(count(file).sizes) == [1, 2, 4, 8][needs:], "an estimate, too"
