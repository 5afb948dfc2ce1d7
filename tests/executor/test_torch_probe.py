"""Another torch is refused where it is first imported, with the names that it lacks."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining import _backward

from executor import torch_probe
from planner.basis.errors import PlanError

ROOT = Path(__file__).parent.parent.parent
RANGE = 'pip install "torch>=2.11,<2.16"'


def test_this_torch_has_every_name() -> None:
    assert torch_probe.missing() == []


def test_a_missing_name_is_said_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_backward, "stage_backward_weight")
    with pytest.raises(PlanError) as caught:
        importlib.reload(torch_probe)
    assert caught.value.what == f"torch {torch.__version__} lacks what foreplan uses of it"
    assert caught.value.where.endswith(": torch.distributed.pipelining._backward.stage_backward_weight")
    assert caught.value.why == "foreplan works with torch 2.11 to 2.15"
    assert caught.value.fix == RANGE


def test_a_missing_module_and_a_missing_attribute_of_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.init", None)
    monkeypatch.setattr(torch.autograd.profiler.profile, "__init__", lambda self: None)
    lacking = torch_probe.missing()
    assert lacking[0] == "torch.autograd.profiler.profile().kineto_results"
    assert lacking[1].startswith("torch.nn.init (")
    assert len(lacking) == 2


@pytest.mark.parametrize("version", ["2.10.0+cpu", "2.9.1", "1.13.1"])
def test_an_old_torch(version: str) -> None:
    with pytest.raises(PlanError, match=f"torch {re.escape(version)} is too old") as caught:
        torch_probe.probe(version)
    assert caught.value.fix == RANGE


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.15.0", "2.16.0a0+git1234567", "3.0"])
def test_a_newer_torch_may_do_as_well(version: str) -> None:
    torch_probe.probe(version)


def test_the_package_asks_for_the_oldest_that_works() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch>=" + ".".join(map(str, torch_probe.OLDEST)) in project["dependencies"]


def test_every_private_name_that_the_adapter_touches_is_asked_for() -> None:
    tree = ast.parse((ROOT / "executor" / "torch_adapter.py").read_text())
    needed = torch_probe.NEEDED | torch_probe.COMPILING
    asked = {part for names in needed.values() for name in names for part in re.findall(r"\w+", name)}
    asked |= {part for module in needed for part in module.split(".")}
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            used |= {*str(node.module).split("."), *(alias.name for alias in node.names)}
    private = {name for name in used - own if name.startswith("_") and not name.startswith("__")}
    assert private - asked == set()
