"""A training run against a plain loop that does the same: losses, learning rates and final weights."""

from __future__ import annotations

import dataclasses
import math
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import nn

from executor.devices import Backend, open_device
from executor.ending import ask
from executor.feed import open_feed
from executor.launch import launch
from executor.model_file import load
from executor.rates import Rates
from executor.recording import RankStep, recording_of
from executor.run import run
from executor.saving import await_all, save
from executor.steps import Extent, announce, encode, file_of, joined
from executor.training import recorded
from executor.worker import Job, extent_of
from planner.basis.errors import PlanError
from planner.simulate.predict import simulate
from planner.values.plan import Plan, Stage
from planner.values.step import Step
from profiles.rates import rate_s
from tests import factory
from tests.executor.test_gradients import plan_of
from tests.executor.training_jobs import SEED, Case, Cases, main, train

MODELS = str(Path(__file__).parent / "small_models.py")
STEPS = 50


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Backend]:
    """This process as the only rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield open_device("cpu")
    dist.destroy_process_group()
    torch.set_num_threads(threads)


class Plain(NamedTuple):
    """What a plain loop has found in its steps, and its weights behind them."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]


def plain(model: str, plan: Plan, steps: int, asked: int) -> Plain:
    """Accumulate over the same micro-batches in a plain loop, for some of the steps that it was asked for.

    The gradients of each replica's share are added up apart, and then those of all, so that all is equal to the last
    digit. Another order of additions has other last digits, and AdamW, which divides by a gradient's own size,
    makes much of them: added up as one, 50 steps have losses that are 1.04e-6 of themselves off, and weights 9.5e-7.
    """
    file = load(model)
    whole = file.build(SEED)
    trained = [p for p in whole.parameters() if p.requires_grad]
    optimizer = file.optimizer(trained)
    scheduler = file.scheduler(optimizer, asked) if file.scheduler else None
    replicas = range(plan.replicas)
    feeds = [
        open_feed(file, plan.batch // plan.replicas, replicas=plan.replicas, replica=r, seed=SEED) for r in replicas
    ]
    losses, rates, norms = [], [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(steps):
        total, gradients = 0.0, list[list[torch.Tensor]]()
        for feed in feeds:
            own = 0.0
            for part in feed.take().split(plan.microbatches // plan.replicas):
                args, keywords = part.arguments()
                loss = file.loss(whole(*args, **keywords), part.targets) / plan.microbatches
                loss.backward()
                own += float(loss.detach())
            total += own
            gradients.append([p.grad for p in trained if p.grad is not None])
            optimizer.zero_grad()
        for parameter, shares in zip(trained, zip(*gradients, strict=True), strict=True):
            parameter.grad = sum(shares[1:], start=shares[0])
        rates.append(optimizer.param_groups[0]["lr"])
        if file.clip:
            norms.append(float(nn.utils.clip_grad_norm_(whole.parameters(), file.clip)))
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(total)
    torch.set_num_threads(threads)
    return Plain(losses, rates, norms, whole.state_dict())


def compare(case: Case, folder: Path) -> None:
    """Hold what a case's ranks have left against the plain loop of as many steps."""
    ranks = len(case.plan.devices)
    steps = joined(folder / case.name, ranks)
    losses, rates, norms, weights = plain(case.model, case.plan, len(steps), case.steps)
    found: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        found |= torch.load(folder / case.name / f"rank{rank}.pt", weights_only=True)
    assert [step.rate for step in steps] == pytest.approx(rates, rel=1e-12)
    known = [step.norm for step in steps if not math.isnan(step.norm)]
    assert known == pytest.approx(norms, rel=1e-6)
    assert found.keys() == weights.keys()
    assert [step.loss for step in steps] == losses
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["scheduled", "halving", "clipped"])
def test_one_device_is_the_plain_loop(name: str, alone: Backend, tmp_path: Path) -> None:
    model = f"{MODELS}:{name}"
    case = Case(name=name, model=model, plan=plan_of(model, "1f1b", 1), steps=STEPS)
    train(case, tmp_path, alone)
    compare(case, tmp_path)
    lines = recording_of(tmp_path / name, 0).read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=RankStep).step for line in lines] == list(recorded(STEPS))


def test_who_asks_before_the_first_step_gets_one(alone: Backend, tmp_path: Path) -> None:
    model = f"{MODELS}:scheduled"
    case = Case(name="asked", model=model, plan=plan_of(model, "1f1b", 1), steps=STEPS)
    (tmp_path / "asked").mkdir()
    assert not ask(tmp_path / "asked"), "nothing is trained yet"
    announce(tmp_path / "asked", Extent(steps=STEPS))
    assert ask(tmp_path / "asked")
    train(case, tmp_path, alone)
    assert len(joined(tmp_path / "asked", 1)) == 1
    compare(case, tmp_path)


def test_stages_and_replicas_are_the_plain_loop(tmp_path: Path) -> None:
    """With a scheduler, over two stages or replicas; and a run that is stopped has the weights of its last step."""
    some = [
        Case(name=f"{name}-{k}-{r}", model=model, plan=plan_of(model, "1f1b", k, replicas=r), steps=STEPS)
        for name, model in ((name, f"{MODELS}:{name}") for name in ("scheduled", "halving"))
        for k, r in ((2, 1), (1, 2))
    ]
    some += [
        msgspec.structs.replace(case, name=f"stopped-{case.name}", steps=10**6, stop_s=0.4)
        for case in some
        if case.name.startswith("scheduled")
    ]
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=tuple(some))))
    launch(main, str(spec), 2, tmp_path / "logs")
    for case in some:
        compare(case, tmp_path)
        done = [len(joined_alone(tmp_path / case.name, rank)) for rank in range(2)]
        assert done[0] == done[1], "all ranks end behind the same step"
        assert done[0] < 10**6
    assert len({len(joined(tmp_path / case.name, 2)) for case in some if not case.stop_s}) == 1


def joined_alone(folder: Path, rank: int) -> list[Step]:
    """One rank's steps."""
    data = file_of(folder, rank).read_bytes()
    return [Step(*numbers) for numbers in struct.iter_unpack("<5d", data)]


def test_schedulers_that_cannot_work_are_refused() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(PlanError, match="nothing to go by"):
        Rates(load(f"{MODELS}:plateau"), {0: optimizer}, 10)
    with pytest.raises(PlanError, match="does not return a scheduler") as raised:
        Rates(load(f"{MODELS}:unscheduled"), {0: optimizer}, 10)
    assert "NoneType" in raised.value.why
    nothing = Rates(load(f"{MODELS}:scheduled"), {}, 10)
    nothing.step(0)
    assert math.isnan(nothing.current)
    over = Rates(load(f"{MODELS}:scheduled"), {0: optimizer}, 2)
    optimizer.step()
    over.step(0)
    over.step(0)
    with pytest.raises(PlanError, match="fails") as raised:
        over.step(0)
    assert "ValueError" in raised.value.why


def test_setting_the_rate_is_in_the_prediction() -> None:
    """Every stage that is updated does it once per step; what it takes is measured where the model file does it."""
    backend = open_device("cpu")
    measured = rate_s(load(f"{MODELS}:scheduled"), backend, nn.Linear(2, 2))
    assert 0 < measured < 0.01
    assert rate_s(load(MODELS), backend, nn.Linear(2, 2)) == 0
    profile = factory.profile([1.0] * 4, machine=factory.devices(2), optimizer_s=0.5)
    slower = msgspec.structs.replace(profile, rate_s=0.25)
    names = tuple(layer.name for layer in profile.layers)
    stages = (Stage(layers=names[:2], devices=("d0",)), Stage(layers=names[2:], devices=("d1",)))
    plan = Plan(strategy="1f1b", schedule="1f1b", stages=stages, microbatches=2, batch=8)
    before, after = (simulate(known, plan, known.machine) for known in (profile, slower))
    assert after.step_s == pytest.approx(before.step_s + 0.25)


def test_groups_by_the_dimensions_of_parameters_have_a_rate() -> None:
    """As in many a training script: no weight decay for what has one dimension, another rate for one of the names."""

    def make(named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        flat = [p for _, p in named_parameters if p.dim() < 2]
        weights = [p for name, p in named_parameters if "weight" in name]
        return torch.optim.SGD([{"params": flat}, {"params": weights}], lr=0.1)

    file = dataclasses.replace(load(f"{MODELS}:scheduled"), optimizer=make)
    assert 0 < rate_s(file, open_device("cpu"), nn.Linear(2, 2)) < 0.01


def test_validation_moves_a_plateau() -> None:
    file = dataclasses.replace(load(f"{MODELS}:plateau"), evaluate=lambda: None)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rates = Rates(file, {0: optimizer}, 10)
    for _ in range(12):
        rates.step(0)
        assert rates.current == 0.1
    for _ in range(12):
        rates.judge(1.0)
    assert rates.current == pytest.approx(0.01)
    with pytest.raises(PlanError, match="nothing to go by") as raised:
        Rates(file, {0: optimizer}, 10, judged=False)
    assert "--evaluate-every is 0" in raised.value.why


def test_epochs_need_data_and_its_length(tmp_path: Path) -> None:
    plan = plan_of(MODELS, "1f1b", 1)
    with pytest.raises(PlanError, match="--epochs needs data") as raised:
        run(MODELS, plan, device="cpu", epochs=2, seed=0, folder=tmp_path, capacity_bytes=(1e9,))
    assert "--steps 1000" in raised.value.fix
    job = Job(model=MODELS, plan=plan, device="cpu", steps=0, epochs=2, seed=0, folder="", patience_s=1.0)
    feed = open_feed(load(MODELS), 16)
    with pytest.raises(PlanError, match="how long an epoch is"):
        extent_of(job, feed)
    feed.steps = 25
    assert extent_of(job, feed) == Extent(steps=50, epoch=25)
    assert extent_of(msgspec.structs.replace(job, epochs=0, steps=60), feed) == Extent(steps=60, epoch=25)


def test_what_a_rank_has_not_written_is_not_known(tmp_path: Path) -> None:
    file_of(tmp_path, 0).write_bytes(encode([Step(i, i + 1, 0.0, math.nan) for i in range(3)]))
    assert joined(tmp_path, 2) == []
    file_of(tmp_path, 1).write_bytes(encode([Step(i, i + 2, 0.5, 0.1) for i in range(4)])[:-1])
    assert joined(tmp_path, 2) == [Step(i, i + 2, 0.5, 0.1) for i in range(3)]
    assert joined(tmp_path, 2, skip=2) == [Step(2, 4, 0.5, 0.1)]


def test_ranks_wait_for_the_slowest_to_save(tmp_path: Path) -> None:
    for rank in range(2):
        threading.Timer(0.1 * rank, save, ({"a": torch.zeros(4)}, tmp_path / f"rank{rank}.pt")).start()
    await_all(tmp_path, 2, "pt")
    assert torch.load(tmp_path / "rank1.pt", weights_only=True)["a"].tolist() == [0.0] * 4


def test_weights_that_have_no_room_leave_those_of_before(tmp_path: Path) -> None:
    """As on a full disk: a limit on how large a file may be."""
    path = tmp_path / "weights.pt"
    save({"a": torch.zeros(4)}, path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(PlanError, match="cannot be written") as raised:
            save({"a": torch.zeros(10**5)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "kept" in raised.value.fix
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pt"]
