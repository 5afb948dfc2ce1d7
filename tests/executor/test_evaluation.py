"""Evaluation: as a plain loop in eval() finds it, and training as it is without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from executor import averaging
from executor.averaging import weight_of
from executor.evaluated import agree_evaluated, cut_evaluated, dealt, metrics_of
from executor.evaluations import Evaluations, evaluated
from executor.labels import NO_ENDS
from executor.launch import launch
from executor.layers import cut
from executor.model_file import load
from executor.modes import evaluating
from executor.steps import Extent
from executor.validation import Validation
from planner.basis.errors import PlanError
from planner.values.evaluation import Evaluation
from tests.executor.jobs import SEED, STEPS, Case, Cases, evaluate
from tests.executor.test_gradients import MODELS, plan_of


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


@pytest.mark.parametrize("name", ["moody", "steady", "kept", "fields", "partly", "tied", "twice", "skips", "listed"])
def test_a_model_cut_in_evaluation_mode_agrees_with_the_whole(name: str) -> None:
    file = load(f"{MODELS}:{name}")
    model = file.build(0)
    modes = [part.training for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layered = cut(file, model)
    before = torch.get_rng_state()
    agree_evaluated(file, layered)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    again = cut_evaluated(file, layered).layered
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(p) for layer in again.layers for p in layer.module.parameters()} <= own, "no second copy"


def test_another_order_in_evaluation_mode_is_refused_where_stages_cannot_follow_it() -> None:
    file = load(f"{MODELS}:turning")
    layered = cut(file, file.build(0))
    again = cut_evaluated(file, layered).layered
    assert dealt(plan_of(file.path, "1f1b", 1), layered, again) == [range(3)]
    with pytest.raises(PlanError, match="cannot be evaluated in the stages that train it") as raised:
        dealt(plan_of(file.path, "1f1b", 3), layered, again)
    assert "layer 'one'" in raised.value.where


def test_a_head_for_training_alone_is_no_layer_of_the_evaluation() -> None:
    """Its stage passes on what it gets."""
    file = load(f"{MODELS}:helped")
    layered = cut(file, file.build(0))
    again = cut_evaluated(file, layered).layered
    assert [layer.name for layer in layered.layers] == ["one", "helper", "two", "out"]
    assert dealt(plan_of(file.path, "1f1b", 4), layered, again) == [range(1), range(1, 1), range(1, 2), range(2, 3)]


class Told:
    """Evaluates and judges without a model."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def run(self, step: int) -> Evaluation:
        return Evaluation(step=step, loss=1 / step, samples=3, seconds=0.5)

    def judge(self, loss: float) -> None:
        self.losses.append(loss)


@pytest.mark.parametrize(
    ("every", "epoch", "when"), [(0, 0, [10]), (4, 0, [4, 8, 10]), (0, 5, [5, 10]), (3, 5, [3, 6, 9, 10])]
)
def test_when_a_run_evaluates_and_who_is_told(every: int, epoch: int, when: list[int], tmp_path: Path) -> None:
    one: Any = Told()
    evaluations = Evaluations(one, one, Extent(steps=10, epoch=epoch), every=every, folder=tmp_path)
    for done in range(1, 11):
        if evaluations.due(done):
            evaluations.behind(done)
    assert [found.step for found in evaluated(tmp_path)] == when
    assert evaluated(tmp_path, skip=len(when) - 1) == [one.run(10)]
    assert one.losses == [1 / step for step in when]


def plain(model: str, state: dict[str, torch.Tensor], samples: int) -> dict[str, float]:
    """What a loop over all validation data finds, micro-batch by micro-batch."""
    file = load(model)
    whole = file.build(SEED)
    whole.load_state_dict(state)
    whole.eval()
    sums: dict[str, float] = {}
    weight, count = 0.0, 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for part in Validation(file, samples):
            args, keywords = part.arguments()
            outputs = whole(*args, **keywords)
            each = weight_of(file, part, (1, 0) if model.endswith(":shifting") else NO_ENDS)
            found = {"loss": float(file.loss(outputs, part.targets)), **metrics_of(file, outputs, part)}
            for name, value in found.items() if each else ():  # the mean of nothing is no number
                sums[name] = sums.get(name, 0.0) + each * value
            weight += each
            count += part.samples
    torch.set_num_threads(threads)
    return {"samples": count, **{name: value / weight for name, value in sums.items()}}


def cases(k: int) -> list[Case]:
    found = []
    for name in ("moody", "steady", "ignored"):
        model = f"{MODELS}:{name}"
        found.append(Case(name=f"{name}-1", model=model, plan=plan_of(model, "1f1b", k)))
        if k == 2:
            found.append(Case(name=f"{name}-2", model=model, plan=plan_of(model, "1f1b", 1, replicas=2)))
    for name in ("partly", "shifting") if k == 2 else ():
        found.append(Case(name=f"{name}-1", model=f"{MODELS}:{name}", plan=plan_of(f"{MODELS}:{name}", "1f1b", 2)))
    return found


@pytest.mark.parametrize("k", [1, 2])
def test_stages_evaluate_as_a_plain_loop_and_train_as_without(k: int, tmp_path: Path) -> None:
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=tuple(cases(k)))))
    launch(evaluate, str(spec), k, tmp_path / "logs")
    for case in cases(k):
        ranks: list[list[Any]] = [torch.load(tmp_path / f"{case.name}.{r}.pt", weights_only=True) for r in range(k)]
        one_replica = ranks if case.plan.replicas == 1 else ranks[:1]
        for evaluations in zip(*(rank[:-2] for rank in ranks), strict=True):
            seen = [{**e["evaluation"], "seconds": 0.0} for e in evaluations]
            assert all(one == seen[0] for one in seen), "every rank knows the same"
            places = zip(evaluations, one_replica, strict=False)
            state = {name: tensor for e, _ in places for name, tensor in e["state"].items()}
            expected = plain(case.model, state, case.plan.samples)
            found = {**seen[0]["metrics"], "loss": seen[0]["loss"], "samples": seen[0]["samples"]}
            # Replicas add up their sums: another order of additions.
            assert found == (expected if case.plan.replicas == 1 else pytest.approx(expected, rel=1e-12)), case.name
        assert [e["evaluation"]["step"] for e in ranks[0][:-2]] == list(range(STEPS, 2 * STEPS + 1))
        for rank in ranks:
            with_it, without = rank[-2:]
            assert with_it["losses"] == without["losses"], f"{case.name}: training is another one"
            for name, tensor in without["state"].items():
                assert torch.equal(with_it["state"][name], tensor), f"{case.name}: {name}"
