"""Gradients that a user computes: autograd Functions and hooks stay in a model that is captured and cut."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from executor.agreement import agree
from executor.compiling import COMPILERS, compiled_layers
from executor.evaluated import agree_evaluated
from executor.layers import cut
from executor.model_file import load
from executor.opaque import Opaques
from executor.own_gradients import own_gradients
from planner.basis.errors import PlanError
from profiles.kinds import find
from tests.executor.gradient_models import Adversary, Chain, Inplace, Reverse, Scale

MODELS = Path(__file__).parent / "gradient_models.py"


def test_functions_and_hooks_are_calls_between_which_is_cut() -> None:
    """The agreement check compares gradients: it shows a reversal that is lost, or a hook of half a gradient."""
    file = load(f"{MODELS}:adversary")
    parts = cut(file, file.build(0))
    agree(file, parts)
    names = [f"{part}.{i}" for part in ("features", "label", "domain") for i in range(3)]
    assert [layer.name for layer in parts.layers] == names
    assert not parts.opaque
    for samples in (1, 5):
        (inputs, targets), model = file.draw(samples, seed=1), parts.model
        model.zero_grad()
        file.loss(model(*inputs), targets).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        first, second = parts.stage(range(4)), parts.stage(range(4, 9))
        sent = first(*inputs)
        received = tuple(value.detach().requires_grad_() for value in sent)
        parts.loss(second(*received), targets).backward()
        torch.autograd.backward(sent, [value.grad for value in received])
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("module_hooks", "its backward has hooks"),
        ("hook_of_a_value", "a hook of a gradient computes with a value of the forward"),
        ("function", "Through takes an object of builtin_function_or_method"),
        ("in_place", "Inplace writes into what it takes"),
    ],
)
def test_what_cannot_be_a_call_lets_its_module_stay_whole(name: str, why: str) -> None:
    file = load(f"{MODELS}:{name}")
    parts = cut(file, file.build(0))
    agree(file, parts)
    assert parts.opaque == (("odd", why),)
    assert [layer.name for layer in parts.layers] == ["into", "middle", "odd", "label", "domain"]


def test_the_model_that_is_evaluated_and_its_kinds_have_the_calls_too() -> None:
    file = load(f"{MODELS}:adversary")
    parts = cut(file, file.build(0))
    agree_evaluated(file, parts)
    inputs, targets = file.draw(3, seed=1)
    find(parts, inputs)
    if not any(map(shutil.which, COMPILERS)):
        return
    compiled = compiled_layers(parts)
    stage = compiled.stage(range(len(compiled.layers)))
    expected = parts.loss(parts.stage(range(len(parts.layers)))(*inputs), targets)
    torch.testing.assert_close(compiled.loss(stage(*inputs), targets), expected)


def test_a_hook_of_nodes_is_refused() -> None:
    file = replace(load(f"{MODELS}:adversary"), model=lambda: Chain("hook of nodes"))
    with pytest.raises(PlanError, match="do not compute") as raised:
        agree(file, cut(file, file.build(0)))
    assert raised.value.fix.endswith("hooks of grad_fn are lost, others not")


def test_a_count_that_only_gradients_show_is_refused() -> None:
    file = load(f"{MODELS}:warming")
    with pytest.raises(PlanError, match="counts, and computes with the count") as raised:
        agree(file, cut(file, file.build(0)))
    assert raised.value.where.endswith(", scale")


def test_capturing_leaves_functions_and_hooks_as_they_were() -> None:
    before = [(dict(vars(kind))) for kind in (Reverse, Scale, Inplace, torch.Tensor)]
    with own_gradients(Opaques(Adversary())):
        assert Reverse.forward is not before[0]["forward"].__func__
    assert [dict(vars(kind)) for kind in (Reverse, Scale, Inplace, torch.Tensor)] == before
