"""The examples train: their loss falls in a real pipeline, and the memory of a run is what was predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from executor.evaluated import metrics_of
from executor.layers import cut
from executor.model_file import load
from executor.modes import evaluating
from executor.run import run
from executor.training import recorded
from planner.basis.errors import PlanError
from planner.orders.action import parse
from planner.orders.operations import FORWARD, REDUCE_GRAD
from planner.placement import partition
from planner.values.plan import Plan, Stage
from planner.values.trace import COMPUTE

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_batches_that_differ_between_processes_are_refused(tmp_path: Path) -> None:
    path = f"{Path(__file__).parent / 'small_models.py'}:unseeded"
    stages = tuple(Stage(layers=layers, devices=(f"d{s}",)) for s, layers in enumerate((tuple("0123"), tuple("456"))))
    plan = Plan(strategy="gpipe", schedule="gpipe", stages=stages, microbatches=2, batch=4)
    with pytest.raises(PlanError, match="draws different samples in different processes") as raised:
        run(path, plan, device="cpu", steps=1, seed=0, folder=tmp_path, capacity_bytes=(1e9, 1e9))
    assert raised.value.where.startswith("rank ")


def test_a_loss_that_is_no_number_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREPLAN_TEST_NAN", "1")
    path = f"{Path(__file__).parent / 'small_models.py'}:diverging"
    plan = Plan(
        strategy="single",
        schedule="1f1b",
        stages=(Stage(layers=tuple("0123456"), devices=("d0",)),),
        microbatches=2,
        batch=4,
    )
    with pytest.raises(PlanError, match="the loss is no number any more") as raised:
        run(path, plan, device="cpu", steps=1, seed=0, folder=tmp_path, capacity_bytes=(1e9,), max_restarts=3)
    assert "so it is the loss itself" in raised.value.why
    assert not (tmp_path / "examined").exists()


@pytest.mark.parametrize(("example", "batch", "steps"), [("gpt", 16, 24), ("digits", 64, 24), ("loader", 64, 24)])
def test_the_loss_falls(example: str, batch: int, steps: int, tmp_path: Path) -> None:
    path = str(EXAMPLES / f"{example}.py")
    file = load(path)
    names = [layer.name for layer in cut(file, file.build(0)).layers]
    stages = tuple(
        Stage(layers=tuple(names[i] for i in r), devices=(f"d{s}",))
        for s, r in enumerate(partition.equal(len(names), 2))
    )
    plan = Plan(strategy="1f1b", schedule="1f1b", stages=stages, microbatches=4, batch=batch)
    every = 7 if example == "digits" else None
    outcome = run(
        path, plan, device="cpu", steps=steps, seed=0, folder=tmp_path, capacity_bytes=(1e9, 1e9), evaluate_every=every
    )
    judged = [e.step for e in outcome.evaluations]
    assert judged == {"gpt": [], "digits": [7, 14, 21, 24], "loader": [24]}[example]
    quarter = steps // 4
    first, last = outcome.losses[:quarter], outcome.losses[-quarter:]
    assert sum(last) < sum(first)
    assert len(outcome.losses) == steps
    assert len(outcome.steps) == len(recorded(steps))
    for trace in outcome.steps:
        assert [e.action for e in trace.events if e.lane == COMPUTE and e.device == 0][:2] == ["0LOAD", "0F0"]
        assert sum(parse(e.action).op == FORWARD for e in trace.events if e.lane == COMPUTE) == 8
        assert not any(e.op == REDUCE_GRAD for e in trace.events)
        assert all(e.start <= e.ready <= e.end for e in trace.events)
    assert all(point.total > 0 for point in outcome.peak)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    trained = file.build(1)
    trained.load_state_dict(weights)
    if file.evaluate is not None:  # the last evaluation is of the weights that are kept
        count = outcome.evaluations[-1].samples
        assert count == file.evaluate.source.samples
        drawn = file.evaluate.source.first(count)
        with evaluating(trained), torch.no_grad():
            outputs = trained(*drawn.inputs)
        assert outcome.evaluations[-1].loss == pytest.approx(float(file.loss(outputs, drawn.targets)), rel=1e-5)
        accuracy = metrics_of(file, outputs, drawn)["accuracy"]
        assert outcome.evaluations[-1].metrics == {"accuracy": pytest.approx(accuracy, rel=1e-6)}
    inputs, targets = file.draw(batch, seed=10_000)
    untrained = file.build(0)
    with torch.no_grad():
        assert file.loss(trained(*inputs), targets) < file.loss(untrained(*inputs), targets)
