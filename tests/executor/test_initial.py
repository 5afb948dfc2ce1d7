"""A rank's share of a model: the values of a plain build, and none of what other stages hold."""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from executor import devices, hollow
from executor.initial import FILE, check_room, cut_hollow
from executor.layers import LayeredModel, cut
from executor.model_file import ModelFile, load
from planner.basis.errors import DEVICE, PlanError

MODELS = "tests/executor/small_models.py"
CPU = torch.device("cpu")
SEED = 5


def file_of(model: Callable[[], nn.Module]) -> ModelFile:
    return dataclasses.replace(load(MODELS), model=model, layers=None)


class Drawn(nn.Module):
    """Everything of it that is not a parameter is drawn behind parameters: other values without storage."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("kept", torch.randn(12))
        self.register_buffer("unsaved", torch.randn(12), persistent=False)
        self.plain, self.listed = torch.randn(12), {"a": [torch.randn(12)]}
        self.register_buffer("start", self.into.weight.detach().sum(0))
        self.places = nn.Embedding(16, 12)
        self.places.requires_grad_(False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x) * self.kept + self.plain + self.start + self.places(torch.arange(x.shape[0]))
        x = self.dropout(torch.relu(x))
        x = self.middle(x) * self.unsaved + self.listed["a"][0]
        return self.out(torch.relu(x) + self.places(torch.arange(x.shape[0]))[:, :1])


def halves(layered: LayeredModel) -> tuple[range, range]:
    at = len(layered.layers) // 2
    return range(at), range(at, len(layered.layers))


def test_stages_compute_what_the_plain_model_computes(tmp_path: Path) -> None:
    file = file_of(Drawn)
    whole = file.build(SEED)
    state = torch.get_rng_state()
    inputs, targets = file.draw(4, seed=0)
    expected = file.loss(whole(*inputs), targets)
    expected.backward()
    values: tuple[torch.Tensor, ...] = inputs
    stages, layered = [], None
    for number in range(2):  # as two ranks, each with a model of its own
        layered, weights = cut_hollow(file, SEED, tmp_path, first=not number)
        assert weights is not None
        assert torch.equal(torch.get_rng_state(), state), "dropout goes on as behind a plain build"
        stage = layered.stage(halves(layered)[number])
        weights.load(layered, [stage, layered.loss], CPU)
        weights.close()
        stages.append((stage, layered))
    torch.set_rng_state(state)
    for stage, _ in stages:
        values = stage(*values)
        values = values if isinstance(values, tuple) else (values,)
    loss = stages[-1][1].loss(values[0], targets)
    loss.backward()
    assert torch.equal(loss, expected)
    found = {
        layered.parameter_names()[id(p)]: p.grad
        for stage, layered in stages
        for p in stage.parameters()
        if p.grad is not None
    }
    assert found.keys() == {n for n, p in whole.named_parameters() if p.requires_grad}
    assert all(torch.equal(found[n], p.grad) for n, p in whole.named_parameters() if p.requires_grad)


def test_a_stage_never_holds_what_others_hold(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    def held() -> int:
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.shape == (12, 12)]
        return sum(t.nbytes for t in found)

    file = file_of(Deep)
    before = held()
    layered, weights = cut_hollow(file, SEED, tmp_path, first=True)
    assert weights is not None
    assert held() == before, "the whole model is gone when it is written"
    stage = layered.stage(range(3))
    weights.load(layered, [stage], CPU)
    weights.close()
    assert held() - before == 3 * 12 * 12 * 4
    del layered, weights
    assert held() - before == 3 * 12 * 12 * 4
    names = {n for n, p in stage.named_parameters() if hollow.is_hollow(p)}
    assert not names


def test_tied_parameters_stay_tied_between_and_inside_stages(tmp_path: Path) -> None:
    file = load(f"{MODELS}:tied")
    layered, weights = cut_hollow(file, SEED, tmp_path, first=True)
    assert weights is not None
    ties = layered.tied()
    assert ties == cut(file, file.build(SEED)).tied()
    weights.load(layered, [layered.stage(range(1))], CPU)
    assert layered.tied() == ties, "also where one stage has storage for it and the other has not"
    weights.load(layered, [layered.stage(range(len(layered.layers)))], CPU)
    assert not hollow.hollow(layered.model)
    assert layered.model.into.weight is layered.model.out.weight


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 4), nn.Linear(12, 4)
        self.two.weight = nn.Parameter(self.one.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: load(f"{MODELS}:partly").model(), "it cannot be cut without storage"),
        (Aliased, "cannot be written apart"),
    ],
)
def test_what_cannot_be_so_is_built_whole_and_said(model, why: str, tmp_path: Path, caplog) -> None:
    file = file_of(model)
    with caplog.at_level(logging.WARNING, logger="foreplan"):
        layered, weights = cut_hollow(file, SEED, tmp_path, first=True)
    assert weights is None
    assert why in caplog.text
    assert not hollow.hollow(layered.model)
    plain = file.build(SEED)
    assert all(torch.equal(p, q) for p, q in zip(layered.model.parameters(), plain.parameters(), strict=True))


def test_a_models_own_error_is_said_as_before(tmp_path: Path) -> None:
    file = load(f"{MODELS}:failing")
    with pytest.raises(PlanError, match="forward fails") as raised:
        cut_hollow(file, SEED, tmp_path, first=True)
    assert "mat1 and mat2" in raised.value.why


def test_a_full_disk_is_no_reason_to_stop(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    file = file_of(Drawn)
    _, weights = cut_hollow(file, SEED, tmp_path, first=True)
    assert weights is None
    assert "cannot be written" in caplog.text
    assert (tmp_path / FILE).exists()


def test_a_model_too_large_for_the_host_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda kind: 10 * 2**30)
    monkeypatch.setattr(devices, "memory_bytes", lambda kind: 12 * 2**30)
    check_room(10 * 2**30, "model.py")
    with pytest.raises(PlanError, match="too large for this host") as raised:
        check_room(28 * 2**30, "model.py")
    assert raised.value.code == DEVICE
    assert "take 28.00 GiB, and 10.00 GiB are free of 12.00 GiB" in raised.value.why


KEPT = """
import torch
from torch import nn
from kept import net as imported

at_once, later = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)), None

def model(): return at_once

def lazily():
    global later
    later = later or nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))
    return later

def elsewhere(): return imported()

def batch(n): return torch.randn(n, 12), torch.randn(n, 4)
"""
NET = """
import functools
from torch import nn

@functools.cache
def net(): return nn.Sequential(nn.Linear(12, 4))
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "kept.py").write_text(NET)
    (tmp_path / "model.py").write_text(KEPT)
    monkeypatch.delitem(sys.modules, "kept", raising=False)
    return str(tmp_path / "model.py")


@pytest.mark.parametrize("name", ["model", "lazily"])
def test_ranks_that_keep_their_model_start_with_the_first_ones_values(
    kept: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made at import, whose random state is each process' own, or in the first call, here without storage."""
    path = f"{kept}:{name}"
    found = []
    for number in range(2):
        layered, weights = cut_hollow(load(path), SEED, tmp_path, first=not number)
        assert weights is not None
        stage = layered.stage(range(3))
        weights.load(layered, [stage, layered.loss], CPU)
        found.append(nn.utils.parameters_to_vector(stage.parameters()))
        weights.close()
    assert torch.equal(*found)
    assert caplog.messages[0].startswith("every rank holds the whole model")


def test_a_model_that_is_kept_is_made_again_with_storage(kept: str) -> None:
    file = load(f"{kept}:lazily")
    assert hollow.hollow(hollow.build(file, SEED))
    assert hollow.hollow(file.build(SEED)), "it keeps the one without"
    assert not hollow.hollow(hollow.real(file, SEED))
    file = load(f"{kept}:elsewhere")
    hollow.build(file, SEED)
    with pytest.raises(PlanError, match="made in a call before"):
        hollow.real(file, SEED)
