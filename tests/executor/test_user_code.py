"""What is wrong with a model file is said in the user's terms, with their file's line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from executor.layers import cut
from executor.model_file import ModelFile, load
from planner.basis.errors import PlanError

GOOD = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 2)

def batch(n):
    return torch.randn(n, 4), torch.randn(n, 2)
"""


def written(folder: Path, more: str) -> str:
    (folder / "model.py").write_text(GOOD + more)
    return str(folder / "model.py")


def tried(path: str) -> None:
    """Do with a model file what a profile does first."""
    file = load(path)
    model = file.build(0)
    file.optimizer(model.parameters())
    layered = cut(file, model)
    (x,), y = file.draw(2, 0)
    layered.loss(model(x), y)


@pytest.mark.parametrize(
    ("more", "what", "why"),
    [
        ("batch_size = 'many'", "batch_size is no positive whole number", "it is 'many'"),
        ("batch_size = 0", "batch_size is no positive whole number", "it is 0"),
        ("def optimizer(p): pass", "does not return an optimizer", "it returns NoneType"),
        ("def optimizer(p): return torch.optim.LBFGS(p)", "computes the loss several times", "closure"),
        ("def loss(o, t): return 1.5", "does not return a loss", "it returns float"),
        ("def loss(o, t): return (o - t) ** 2", "does not return a loss", "a tensor of (2, 2)"),
        ("import sys; sys.exit(3)", "importing it fails", "SystemExit: 3"),
        ("def batch(n): return None", "does not return (inputs, targets)", "it returns NoneType"),
        ("def model(): return None", "does not return a torch module", "it returns NoneType"),
        ("def model(): torch.zeros(2) @ torch.zeros(3)", "model() fails", "RuntimeError"),
    ],
)
def test_wrong_model_files(more: str, what: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        tried(written(tmp_path, more))
    assert what in raised.value.what
    assert why in raised.value.why
    assert raised.value.where.startswith(str(tmp_path / "model.py"))


def test_a_fault_in_a_library_is_not_given_a_line_of_the_user_s_file(tmp_path: Path) -> None:
    (tmp_path / "beside_a_model.py").write_text("def fails():\n    raise ArithmeticError('far away')\n")
    path = written(tmp_path, "import beside_a_model\nbatch = lambda n: beside_a_model.fails()\n")
    with pytest.raises(PlanError) as raised:
        load(path).draw(2, 0)
    line = len(GOOD.splitlines()) + 2
    assert raised.value.where == f"{path}:{line}, in <lambda>"
    path = written(tmp_path, "import beside_a_model\nbatch = beside_a_model.fails\nimport inspect\n")
    with pytest.raises(PlanError) as raised:
        load(path).draw(2, 0)
    assert ":" not in raised.value.where.partition(", in")[0]


def of(folder: Path, more: str) -> ModelFile:
    return load(written(folder, more))


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(f"part.{i}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]


def test_an_optimizer_that_asks_for_names_gets_those_of_the_whole_model(tmp_path: Path) -> None:
    text = "def optimizer(named_parameters): return torch.optim.SGD([p for n, p in named_parameters if '1' in n])"
    file = of(tmp_path, text)
    pairs = named((2, 2), (2,), (3,))
    optimizer = file.optimizer_of(pairs)
    assert optimizer is not None
    assert [p is pairs[1][1] for p in optimizer.param_groups[0]["params"]] == [True]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor", "NAdam"])
def test_a_part_of_the_model_may_have_none_of_a_group(tmp_path: Path, kind: str) -> None:
    """Every part has all groups, so that a scheduler finds as many everywhere; a step passes over empty ones."""
    text = f"""def optimizer(named_parameters):
    named = list(named_parameters)
    return torch.optim.{kind}([{{"params": [p for _, p in named if p.dim() == n]}} for n in (1, 2)], lr=1e-3)"""
    optimizer = of(tmp_path, text).optimizer_of(pairs := named((2,)))
    assert optimizer is not None
    pairs[0][1].grad = torch.ones(2)
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


def test_a_part_of_the_model_may_have_nothing_that_is_trained(tmp_path: Path) -> None:
    text = "def optimizer(parameters): return torch.optim.SGD([p for p in parameters if p.dim() == 2])"
    file = of(tmp_path, text)
    assert file.optimizer_of(named((2,))) is None
    assert file.optimizer_of([]) is None
    assert file.optimizer_of(named((2, 2))) is not None
