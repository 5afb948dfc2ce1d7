"""Cutting models into layers: the three ways, skips, ties, and models that cannot be cut."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from executor import agreement, averaging
from executor.agreement import agree
from executor.layers import LayeredModel, cut
from executor.model_file import ModelFile, load
from executor.surroundings import on
from planner.basis.errors import PlanError
from planner.cli.profile import _notes
from tests.factory import profile

HERE = Path(__file__).parent
MODELS = HERE / "small_models.py"
EXAMPLES = HERE.parent.parent / "examples"


def layered(path: str) -> LayeredModel:
    file = load(path)
    return cut(file, file.build(0))


@pytest.mark.parametrize(
    "path",
    [
        str(MODELS),
        f"{MODELS}:skips",
        f"{MODELS}:tied",
        f"{MODELS}:listed",
        str(EXAMPLES / "gpt.py"),
        str(EXAMPLES / "digits.py"),
        str(EXAMPLES / "unet.py"),
    ],
)
def test_every_cut_computes_what_the_model_computes(path: str) -> None:
    file = load(path)
    model = file.build(0)
    parts = cut(file, model)
    inputs, _ = file.draw(2, seed=1)
    expected = model(*inputs)
    count = len(parts.layers)
    for k in range(1, count + 1):
        values: tuple[torch.Tensor, ...] = inputs
        for s in range(k):
            result = parts.stage(range(s * count // k, (s + 1) * count // k))(*values)
            values = result if isinstance(result, tuple) else (result,)
        assert torch.equal(values[0], expected), f"{k} stages"


def test_sequential_children_are_layers() -> None:
    assert [layer.name for layer in layered(str(MODELS)).layers] == [str(i) for i in range(7)]


def test_traced_calls_are_layers_and_skips_are_wires() -> None:
    parts = layered(f"{MODELS}:skips")
    assert [layer.name for layer in parts.layers] == ["first", "second", "third", "fourth"]
    early = next(wire for wire in parts.wires if wire.source == 0)
    assert early.targets == (1, 2), "operations between two calls belong to the call before them"
    assert early.name in parts.crossing(1)
    assert early.name in parts.crossing(2), "a skip is relayed past the layers that do not read it"
    assert early.name not in parts.crossing(3)


def test_unet_has_skips() -> None:
    parts = layered(str(EXAMPLES / "unet.py"))
    names = [layer.name for layer in parts.layers]
    spans = {(names[w.source], names[w.targets[-1]]) for w in parts.wires if len(w.targets) > 1 and w.source >= 0}
    assert any(source == "down1" for source, _ in spans)
    assert any(source == "down2" for source, _ in spans)


def test_tied_parameters_are_found_by_identity() -> None:
    assert layered(f"{MODELS}:tied").tied() == (("into.weight", "into", "out"),)
    assert layered(str(MODELS)).tied() == ()


def test_listed_layers_keep_their_names_in_the_model() -> None:
    assert [layer.name for layer in layered(f"{MODELS}:listed").layers] == ["parts.0", "parts.1", "parts.2"]


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("failing", "forward", "correct it"),
        ("nothing", "has no nothing()", "define nothing()"),
    ],
)
def test_models_that_cannot_be_cut(name: str, what: str, fix: str) -> None:
    with pytest.raises(PlanError) as raised:
        layered(f"{MODELS}:{name}")
    assert what in raised.value.what
    assert fix in raised.value.fix


def test_a_failing_forward_names_the_line() -> None:
    with pytest.raises(PlanError) as raised:
        layered(f"{MODELS}:failing")
    line = next(i for i, text in enumerate(MODELS.read_text().splitlines(), 1) if "self.second(self.first(x))" in text)
    assert f"small_models.py:{line}" in raised.value.where


def test_what_cannot_be_followed_stays_whole() -> None:
    """A module that looks at values is one layer; what is around it is cut as ever."""
    assert [layer.name for layer in layered(f"{MODELS}:untraceable").layers] == ["dynamic"]
    file = load(f"{MODELS}:partly")
    parts = cut(file, file.build(0))
    assert [layer.name for layer in parts.layers] == ["into", "middle", "out"]
    agree(file, parts)
    for samples in (1, 4, 7):
        (x,), _ = file.draw(samples, seed=samples)
        assert torch.equal(parts.stage(range(3))(x), parts.model(x))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("forgets", "no layer trains parts.1.bias"),
        ("reorders", "the loss of a batch is"),
        ("adds", "no layer trains"),
    ],
)
def test_layers_that_compute_something_else_are_refused(name: str, why: str) -> None:
    file = load(f"{MODELS}:{name}")
    with pytest.raises(PlanError, match="do not compute what the model computes") as raised:
        agree(file, cut(file, file.build(0)))
    assert why in raised.value.why


@pytest.mark.parametrize("name", ["model", "skips", "tied", "twice", "kept", "fields", "listed", "untraceable"])
def test_a_cut_model_agrees_with_the_whole(name: str) -> None:
    file = load(f"{MODELS}:{name}")
    agree(file, cut(file, file.build(0)))


def test_children_that_write_into_what_they_take_may_stand_behind_a_cut() -> None:
    """Each stage takes a leaf, into which nothing may be written; the gradients are those of the whole model."""
    chained = nn.Sequential(
        nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 4)
    )
    file = dataclasses.replace(load(str(MODELS)), model=lambda: chained)
    parts = cut(file, chained)
    assert [layer.changes for layer in parts.layers] == [(), ("v0",), (), ("v2",), ()]
    inputs, targets = file.draw(4, seed=0)
    file.loss(chained(*inputs), targets).backward()
    expected = [p.grad for p in chained.parameters()]
    chained.zero_grad()
    seams = [inputs[0]]
    made = []
    for i in range(len(parts.layers)):
        made.append(parts.stage(range(i, i + 1))(seams[-1]))
        seams.append(made[-1].detach().requires_grad_())
    file.loss(seams[-1], targets).backward()
    for output, seam in zip(reversed(made), reversed(seams), strict=False):
        output.backward(seam.grad)
    torch.testing.assert_close([p.grad for p in chained.parameters()], expected)


@pytest.mark.parametrize("name", ["model", "ignoring", "weighted", "fields"])
def test_a_loss_is_a_mean_of_micro_batches(name: str) -> None:
    file = load(f"{MODELS}:{name}")
    averaging.check(file, file.build(0))


def test_a_loss_that_is_a_sum_is_refused() -> None:
    file = load(f"{MODELS}:summed")
    with pytest.raises(PlanError, match="not the mean") as raised:
        averaging.check(file, file.build(0))
    assert raised.value.why.endswith("it is a sum")
    assert "weight(inputs, targets)" in raised.value.fix


def test_what_stays_whole_and_what_nothing_reads_is_said() -> None:
    file = load(f"{MODELS}:partly")
    ((path, why),) = cut(file, file.build(0)).opaque
    assert path == "middle"
    assert "data-dependent" in why
    of = msgspec.structs.replace(profile([1.0]), opaque=((path, why),), unused=("a", "b", "c", "d"))
    whole, unused = _notes(of)
    assert whole.startswith("middle stays whole inside a layer")
    assert unused == "nothing reads a, b, c and 1 more: no stage trains them"
    file = load(f"{MODELS}:kept")
    parts = cut(file, file.build(0))
    assert set(parts.unheld()) == {"unread", "unused.weight", "unused.bias"}


def test_a_captured_stage_makes_its_tensors_where_it_is() -> None:
    """Masks and positions are captured on the CPU; a stage that is moved makes them on its own device."""
    parts = layered(f"{MODELS}:fields")
    stage = on(parts.stage(range(len(parts.layers))), torch.device("meta"))
    result = stage(torch.zeros(2, 5, dtype=torch.long, device="meta"), torch.zeros(2, 5, device="meta"))
    assert result.device.type == "meta"
    assert all(tensor.is_meta for tensor in (*stage.parameters(), *stage.buffers()))


def test_batches_depend_on_the_seed_alone() -> None:
    file = load(str(EXAMPLES / "gpt.py"))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = file.draw(4, seed=7)[0][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(file.draw(4, seed=7)[0][0], first)
    assert not torch.equal(file.draw(4, seed=8)[0][0], first)


def test_how_many_samples_there_are_is_nothing_fixed() -> None:
    """A model that asks with `len` is followed for any batch; one that makes a plain number of it is refused."""
    file = load(f"{MODELS}:lengths")
    model = file.build(0)
    parts = cut(file, model)
    agree(file, parts)
    for samples in (1, 4, 7):
        inputs, targets = file.draw(samples, seed=1)
        assert torch.equal(
            parts.loss(parts.stage(range(len(parts.layers)))(*inputs), targets), file.loss(model(*inputs), targets)
        )
    with pytest.raises(PlanError, match="takes the batch size for a fixed number"):
        layered(f"{MODELS}:fixed")


def test_what_is_frozen_is_cut_as_it_would_be_unfrozen() -> None:
    parts = layered(f"{MODELS}:frozen")
    names = ["into", *(f"backbone.{i}" for i in range(4)), *(f"head.{i}" for i in range(3))]
    assert [layer.name for layer in parts.layers] == names


class Forgetful(nn.Module):
    """Replaces a buffer in a way that no graph follows; its first loss does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 8), nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1 + self.seen
        self._buffers["seen"] = self.seen + 1
        return self.out(self.into(x) * scale)


def test_what_a_forward_leaves_in_buffers_is_compared() -> None:
    file = load(f"{MODELS}:warming")
    agree(file, cut(file, file.build(0)))
    averaging.check(file, file.build(0))
    file = dataclasses.replace(file, model=Forgetful)
    with pytest.raises(PlanError, match="do not compute") as raised:
        agree(file, cut(file, file.build(0)))
    assert raised.value.why == "what forward leaves in seen is another one than the model's"


def test_a_slow_model_is_checked_with_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one sample takes long a cut is checked with it alone, which still tells another network; not batch norm."""
    drawn: list[int] = []
    draw = ModelFile.drawn
    monkeypatch.setattr(ModelFile, "drawn", lambda file, n, seed: drawn.append(n) or draw(file, n, seed))
    file = load(f"{MODELS}:skips")
    parts = cut(file, file.build(0))
    for slow, expected in ((1e9, [1, 1, 3, 3]), (0.0, [1, 1])):
        monkeypatch.setattr(agreement, "SLOW_S", slow)
        drawn.clear()
        assert agree(file, parts) > 0
        assert drawn == expected
    with pytest.raises(PlanError, match="do not compute what the model computes"):
        agree(file, dataclasses.replace(parts, layers=(parts.layers[0], *parts.layers[2:])))


class Reversed(torch.autograd.Function):
    """Returns what it gets, and turns its gradient round: no loss tells."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(Reversed.apply(self.first(x)))


class ForForwards(agreement.Allowance):
    """There is time for two forwards, and not for gradients."""

    def allows(self, seconds: float, *, otherwise: str) -> bool:
        return "gradients" not in otherwise or super().allows(math.inf, otherwise=otherwise)


@pytest.mark.parametrize(("name", "why"), [("forgets", "no layer trains"), ("reorders", "the loss of a batch is")])
def test_without_time_for_gradients_the_loss_and_what_is_trained_are_compared(name: str, why: str) -> None:
    """What was not compared is said."""
    file, allowance = load(f"{MODELS}:{name}"), ForForwards(1e9)
    with pytest.raises(PlanError, match="do not compute what the model computes") as raised:
        agree(file, cut(file, file.build(0)), allowance)
    assert why in raised.value.why
    assert "the gradients of the layers were not compared" in allowance.left_out[0]


def test_a_gradient_that_follows_from_no_forward_is_compared_whatever_it_takes() -> None:
    file = dataclasses.replace(
        load(str(MODELS)), model=Turned, layers=lambda model: [model.first, model.second], batch=vectors
    )
    none = agreement.Allowance(0.0)
    with pytest.raises(PlanError, match="do not compute what the model computes") as raised:
        agree(file, cut(file, file.build(0)), none)
    assert "the gradient of first.bias" in raised.value.why
    plain = dataclasses.replace(file, model=lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), layers=None)
    assert agree(plain, cut(plain, plain.build(0)), none) > 0
    assert [words.partition(" were ")[0] for words in none.left_out] == ["the gradients of the layers", "the layers"]


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 12), torch.randn(n, 4)
