"""Evaluation: modes that come back."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from executor import averaging
from executor.model_file import load
from executor.modes import evaluating

MODELS = str(Path(__file__).parent / "small_models.py")


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()  # frozen, as one does with a backbone's statistics
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, True, False, True]


def test_checking_the_loss_leaves_frozen_modules_frozen() -> None:
    file = load(f"{MODELS}:kept")
    model = file.build(0)
    model.norm.eval()
    averaging.check(file, model)
    assert not model.norm.training
    assert model.training
