"""Every figure of the audit, predicted as it was derived (benchmarks/does_it_survive_an_audit)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "does_it_survive_an_audit"


def figures():
    sys.path.insert(0, str(FOLDER))
    try:
        registry = importlib.import_module("figure")
        for file in sorted(FOLDER.glob("audit_*.py")):
            importlib.import_module(file.stem)
        return list(registry.FIGURES)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: f"{figure.section}: {figure.name}")
def test_predicted_as_derived(figure):
    found = figure.compute()
    assert found.predicted == pytest.approx(found.derived, rel=figure.tolerance), figure.derivation
