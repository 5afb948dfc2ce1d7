"""What a run must do as a plain loop does it, where a stage knows a part of the model only."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from executor import hollow
from executor.agreement import agree
from executor.averaging import Averaging, check, weight_of
from executor.batch import Drawn
from executor.labels import NO_ENDS, Ends, check_mean, check_one, ends_of
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.updating import own_optimizer
from planner.basis.errors import PlanError

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    def forward(self, x): return self.head(self.b(self.a(x).tanh()).tanh())

def model(): return Net()
def batch(n): return torch.randn(n, 4), torch.randint(3, (n,))

def hooked():
    made = Net()
    made.b.weight.register_hook(lambda gradient: gradient * 0.5)
    return made

def by_place_optimizer(named_parameters):
    groups = [{"params": [p], "lr": 0.1 * 0.5**place} for place, (_, p) in enumerate(reversed(named_parameters))]
    return torch.optim.SGD(groups)

class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    def forward(self, x):
        x = self.a(x)
        for _ in range(4):
            x = self.norm(x).tanh()
        return self.head(x)

def listed():
    norm = nn.BatchNorm1d(6)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), norm, nn.Tanh(), nn.Linear(6, 3))

class Looking(nn.BatchNorm1d):
    def forward(self, x): return super().forward(x) * (1.0 if x.sum() > 1e9 else 2.0)

def hidden():
    made = Again()
    made.norm = Looking(6)
    return made

class Noisy(Net):
    def forward(self, x): return super().forward(x + torch.randn_like(x))

class Counting(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x)

class Warming(Counting):
    def forward(self, x): return super().forward(x) * min(1.0, self.calls / 10)

by_place, again, noisy, counting, warming = Net, Again, Noisy, Counting, Warming
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(MODEL)
    return str(tmp_path / "model.py")


def test_a_parameters_hooks_outlive_its_being_without_data(path: str) -> None:
    model = hollow.build(load(f"{path}:hooked"), 0)
    hollow.fill([model], lambda tensor: torch.ones(tensor.shape))
    weight = model.get_parameter("b.weight")
    weight.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full_like(weight, 0.5))


def test_a_stages_groups_are_those_of_the_whole_models_optimizer(path: str) -> None:
    """A rate that follows from a parameter's place among all is the same wherever the parameter is trained."""
    file = load(f"{path}:by_place")
    model = file.build(0)
    whole = file.optimizer_of(model.named_parameters())
    assert whole is not None
    rates = {id(p): group["lr"] for group in whole.param_groups for p in group["params"]}
    for part in (model.get_submodule("a"), model.get_submodule("b"), model.get_submodule("head")):
        held = set(part.parameters())
        own = own_optimizer(file, model, {name: p for name, p in model.named_parameters() if p in held})
        assert own is not None
        assert {id(p): group["lr"] for group in own.param_groups for p in group["params"]} == {
            id(p): rates[id(p)] for p in part.parameters()
        }
        assert len(own.param_groups) == len(whole.param_groups)
    assert own_optimizer(file, model, {}) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("again", ["a", "norm", "head"]), ("listed", ["0", "1", "4", "5"]), ("hidden", ["a", "norm", "head"])],
)
def test_statistics_of_a_module_that_is_called_several_times_stay_in_one_layer(
    path: str, name: str, expected: list[str]
) -> None:
    """No plan has them in two stages, each of which would count its own: of a graph, a list, a module kept whole."""
    file = load(f"{path}:{name}")
    layered = cut(file, file.build(0))
    assert [layer.name for layer in layered.layers] == expected
    agree(file, layered)
    inputs, _ = file.draw(5, seed=1)
    plain = file.build(0)
    plain(*inputs)
    values: Any = inputs
    for i in range(len(expected)):
        values = layered.stage(range(i, i + 1))(*values)
        values = values if isinstance(values, tuple) else (values,)
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(layered.model.get_buffer(key), buffer)


def test_labels_among_the_inputs_are_weighed_as_targets_are(path: str) -> None:
    labels = torch.tensor([[1, 2, -100, -100], [-100, -100, -100, -100]])
    part = Drawn(samples=2, given={"x": torch.zeros(2, 4), "labels": labels}, targets=None)
    assert weight_of(load(path), part) == 0.5
    assert weight_of(load(path), Drawn(samples=2, given={"x": labels}, targets=None)) == 2


@pytest.mark.parametrize("returned", ["-1.0", "float('nan')", "float('inf')"])
def test_a_weight_is_a_number_that_is_not_negative(path: str, returned: str) -> None:
    Path(path).write_text(f"{MODEL}\ndef weight(inputs, targets): return {returned}\n")
    part = Drawn(samples=2, given=torch.zeros(2, 4), targets=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(PlanError, match="does not return a weight"):
        weight_of(load(path), part)


def shared(averaging: Averaging, targets: torch.Tensor, loss_of: Any = None) -> list[float]:
    """What the losses of a step's two micro-batches, each 1, are of the whole batch's."""
    parts = [Drawn(samples=len(own), given=torch.zeros(len(own), 4), targets=own) for own in targets.chunk(2)]
    averaging.begin(dict(enumerate(parts)))
    found = [averaging.shared(place, loss_of, lambda: torch.ones(())) for place in range(2)]
    return [0.0 if own is None else float(own) for own in found]


def test_ignored_targets_are_met_in_any_step(path: str) -> None:
    averaging = Averaging(load(path), None, 2, torch.device("cpu"))
    assert shared(averaging, torch.tensor([1, 2, 0, 1])) == [0.5, 0.5]
    assert shared(averaging, torch.tensor([1, 2, -100, 1])) == pytest.approx([2 / 3, 1 / 3])
    assert shared(averaging, torch.tensor([1, 2, -100, -100])) == [1.0, 0.0]
    assert shared(averaging, torch.tensor([1, 2, 0, 1])) == [0.5, 0.5]


def mean_of(first: int, last: int, *, uniform: bool = False, clamped: bool = False) -> Any:
    """A loss of what the labels from `first` to `last` are; `uniform` where the outputs say nothing yet."""

    def loss(part: Drawn) -> torch.Tensor:
        labels = part.targets[:, first:last].flatten()
        logits = torch.zeros(12) if uniform else torch.randn(12, generator=torch.Generator().manual_seed(1))
        logits = logits.expand(len(labels), -1)
        if clamped:
            each = nn.functional.cross_entropy(logits, labels, reduction="sum")
            return each / (labels != -100).sum().clamp(min=1)
        return nn.functional.cross_entropy(logits, labels)

    return loss


@pytest.mark.parametrize(("uniform", "clamped"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (0, 1), (2, 1)])
def test_which_ends_of_sequences_count_is_seen(ends: Ends, uniform: bool, clamped: bool) -> None:
    """Also of outputs that are all alike, whose loss is the same however many labels there are."""
    labels = torch.tensor([[-100, -100, 2, 3, 4, 5], [-100, -100, -100, 3, -100, -100]])
    part = Drawn(samples=2, given=torch.zeros(2, 6), targets=labels)
    loss = mean_of(ends[0], 6 - ends[1], uniform=uniform, clamped=clamped)
    assert ends_of(part, loss) == ends
    check_mean("model.py", part, loss, ends)


def test_labels_that_the_loss_does_not_read_count_all() -> None:
    part = Drawn(samples=2, given={"labels": torch.tensor([[-100, 1, 2], [1, 2, 3]])}, targets=None)
    assert ends_of(part, lambda _: torch.ones(())) == NO_ENDS


def test_of_several_targets_the_one_counts_that_is_ignored_somewhere(path: str) -> None:
    averaging = Averaging(load(path), None, 2, torch.device("cpu"))
    classes, words = torch.tensor([1, 2, 0, 1]), torch.tensor([[0, 1, 2], [-100, -100, 1], [0, 1, 2], [0, 1, 2]])

    def loss_of(part: Drawn) -> torch.Tensor:
        assert torch.equal(part.targets["classes"], classes[:2])
        return mean_of(1, 3)(dataclasses.replace(part, targets=part.targets["words"]))

    whole = Drawn(samples=4, given=torch.zeros(4, 4), targets={"classes": classes, "words": words})
    averaging.begin(dict(enumerate(whole.split(2))))
    found = [averaging.shared(place, loss_of, lambda: torch.ones(())) for place in range(2)]
    assert [float(own) for own in found if own is not None] == pytest.approx([3 / 7, 4 / 7])
    alike = dataclasses.replace(whole, targets=(words, words.clone(), torch.rand(4)))
    check_one(path, alike)
    other = dataclasses.replace(whole, targets=(words, words.roll(1, 0)))
    with pytest.raises(PlanError, match="each elsewhere") as raised:
        averaging.begin({0: whole, 1: other})
    assert "weight(inputs, targets)" in raised.value.fix


def test_a_shift_is_found_in_the_step_in_which_it_matters(path: str) -> None:
    averaging = Averaging(load(path), None, 2, torch.device("cpu"))
    whole = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert shared(averaging, whole) == [0.5, 0.5]
    assert averaging.ends is None, "nobody has been asked"
    some = torch.tensor([[0, -100, -100, 3], [3, 2, 1, 0]])
    assert shared(averaging, some, mean_of(1, 4)) == pytest.approx([1 / 4, 3 / 4])
    assert averaging.ends == (1, 0)


def test_a_mean_of_each_samples_mean_is_refused() -> None:
    """Samples with few labels count as much as those with many, so labels are no measure."""
    labels = torch.tensor([[-100, 1, 2, 3, 4], [-100, 5, 6, 7, 8]])
    part = Drawn(samples=2, given=torch.zeros(2, 5), targets=labels)

    def loss(part: Drawn) -> torch.Tensor:
        own = [row[row != -100].double() for row in part.targets]
        return torch.stack([row.mean() for row in own if len(row)] or [torch.tensor(math.nan)]).mean()

    with pytest.raises(PlanError, match="not the mean over the targets") as raised:
        check_mean("model.py", part, loss, ends_of(part, loss))
    assert "weight(inputs, targets)" in raised.value.fix


def test_a_model_that_draws_also_in_evaluation_mode_is_not_held_against_itself(path: str) -> None:
    file = load(f"{path}:noisy")
    check(file, file.build(0))

    def total(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")

    summed: ModelFile = dataclasses.replace(load(path), loss=total)
    with pytest.raises(PlanError, match="not the mean"):
        check(summed, summed.build(0))


def test_a_number_that_forward_changes_is_no_constant(path: str) -> None:
    """What only counts is let through; what computes with the count would be trained with the first one for ever."""
    for name in ("counting", "warming"):
        file = load(f"{path}:{name}")
        layered = cut(file, file.build(0))
        if name == "counting":
            agree(file, layered)
            continue
        with pytest.raises(PlanError, match="computes with the count") as raised:
            agree(file, layered)
        assert raised.value.where.endswith("calls")
