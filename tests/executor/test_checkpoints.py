"""A run that is taken up again is the run that was never broken off, to the last bit; and what becomes of bad disks."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from executor import checkpoint_files, checkpoints, nonfinite
from executor.checkpointing import Checkpointing, forget_behind, found_by_all
from executor.checkpoints import Manifest
from executor.devices import Backend, open_device
from executor.layers import cut
from executor.model_file import load
from executor.notes import noted
from executor.rank import Rank
from executor.rates import Rates
from executor.run import run
from executor.seeding import begin
from executor.state import part, restore, weights
from executor.steps import joined
from executor.training import Training
from planner.basis.errors import PlanError
from planner.values.plan import Plan
from tests.executor.remembered_model import KILLED
from tests.executor.test_gradients import plan_of

MODEL = str(Path(__file__).parent / "remembered_model.py")
SEED, STEPS, EVERY = 3, 14, 3
"""Fourteen steps are three epochs and a half."""


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Backend]:
    """This process as the only rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield open_device("cpu")
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def planned(model: str, k: int) -> Plan:
    plan = plan_of(model, "1f1b", k)
    return msgspec.structs.replace(plan, norm=True, batch=16)


def train(folder: Path, backend: Backend, model: str, steps: int, *, of: int = STEPS) -> dict[str, torch.Tensor]:
    """Train up to so many steps `of` a run as its only rank, from the last checkpoint on; return the weights then."""
    file = load(model)
    plan = planned(model, 1)
    me = Rank(file, cut(file, file.build(SEED)), plan, backend, 0, seed=SEED)
    rates = Rates(file, me.optimizers, of)
    found = found_by_all(folder, "", backend.device)
    start = found.manifest.step if found else 0
    forget_behind(folder, 0, start)
    about = Manifest(step=start, steps=of, epoch=4, seed=SEED, model=model, plan=plan)
    checkpointing = Checkpointing(me, rates, folder, about, EVERY)
    begin(SEED)
    if found is not None:
        restore(me, rates, 0, found, of)
    training = Training(me, rates, backend, folder, offset=0.0, where=model, start=start)
    training.run(steps, None, checkpointing)
    me.feed.close()
    return {name: value.clone() for name, value in me.state().items()}


def curve(folder: Path, ranks: int = 1) -> list[tuple[float, float, float]]:
    return [(step.loss, step.rate, step.norm) for step in joined(folder, ranks)]


@pytest.mark.parametrize("name", ["model", "scaled"])
def test_a_run_that_is_taken_up_again_is_the_same(name: str, alone: Backend, tmp_path: Path) -> None:
    """Broken off behind its tenth step, whose checkpoint is lost: it goes on behind the ninth."""
    model = f"{MODEL}:{name}"
    (tmp_path / "whole").mkdir()
    whole = train(tmp_path / "whole", alone, model, STEPS)
    broken = tmp_path / "broken"
    broken.mkdir()
    train(broken, alone, model, 10)
    assert checkpoints.steps(broken / checkpoints.FOLDER) == [10, 9]
    newest, before = (checkpoints.named(broken / checkpoints.FOLDER, step) for step in (10, 9))
    data = bytearray((newest / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "__0_0.distcp").write_bytes(data)
    again = train(broken, alone, model, STEPS)
    (said,) = noted(broken)
    assert f"a checkpoint is damaged: {newest}" in said
    assert before.name not in said
    assert curve(broken) == curve(tmp_path / "whole")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    kept = weights(checkpoints.named(broken / checkpoints.FOLDER, STEPS))
    plain = load(model).build(0)
    plain.load_state_dict(kept)
    assert all(torch.equal(value, whole[key]) for key, value in plain.state_dict().items())


def test_a_longer_run_goes_on_with_its_own_rates(alone: Backend, tmp_path: Path) -> None:
    """A schedule that knows how long the run is: it is asked anew, as torch's own state would end too early."""
    train(tmp_path, alone, MODEL, 6, of=6)
    train(tmp_path, alone, MODEL, STEPS)
    rates = [rate for _, rate, _ in curve(tmp_path)]
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", alone, MODEL, STEPS)
    assert rates[6:] == [rate for _, rate, _ in curve(tmp_path / "whole")][6:]


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_one_before_stays(alone: Backend, tmp_path: Path) -> None:
    train(tmp_path, alone, MODEL, 4)
    home = tmp_path / checkpoints.FOLDER
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))  # a file of more bytes is a full disk
    try:
        train(tmp_path, alone, MODEL, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(joined(tmp_path, 1)) == 8
    assert len(noted(tmp_path)) == 2
    assert "rank 0 cannot write the checkpoint behind step 6" in noted(tmp_path)[0]
    assert sorted(path.name for path in home.iterdir()) == ["step-00000003", "step-00000004"]


def test_what_an_index_may_not_be_made_of_is_not_unpickled(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / checkpoint_files.INDEX).write_bytes(pickle.dumps(Bad()))
    with pytest.raises(pickle.UnpicklingError, match="has no place"):
        checkpoint_files.index_of(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_rank_is_killed_and_the_run_goes_on_by_itself(
    alone: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, of which one is killed behind its ninth step; another plan goes on with what they have left."""
    model = f"{MODEL}:killed"
    monkeypatch.setenv(KILLED, str(tmp_path / "mark"))
    said: list[str] = []
    outcome = run(
        model,
        planned(model, 2),
        device="cpu",
        steps=STEPS,
        seed=SEED,
        folder=tmp_path / "run",
        capacity_bytes=(1e9, 1e9),
        checkpoint_every=EVERY,
        max_restarts=1,
        say=said.append,
    )
    assert (tmp_path / "mark").exists()
    assert "restart 1 of 1" in said[0]
    (tmp_path / "plain").mkdir()
    train(tmp_path / "plain", alone, model, STEPS)
    plain = curve(tmp_path / "plain")
    assert outcome.losses == pytest.approx([loss for loss, _, _ in plain], rel=1e-6)
    assert outcome.rates == tuple(rate for _, rate, _ in plain)
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "run" / checkpoints.FOLDER / "step-00000014").rename(tmp_path / "last")
    (tmp_path / "run" / checkpoints.FOLDER).rename(again / checkpoints.FOLDER)
    train(again, alone, model, STEPS)
    assert [loss for loss, _, _ in curve(again)] == pytest.approx([loss for loss, _, _ in plain[12:]], rel=1e-6)


def test_whose_state_is_no_plain_value_is_refused(alone: Backend, tmp_path: Path) -> None:
    file = load(MODEL)
    me = Rank(file, cut(file, file.build(SEED)), planned(MODEL, 1), alone, 0, seed=SEED)
    rates = Rates(file, me.optimizers, STEPS)
    rates.schedulers[0].strange = object()  # type: ignore[attr-defined]
    about = Manifest(step=0, steps=STEPS, epoch=4, seed=SEED, model=MODEL, plan=me.plan)
    with pytest.raises(PlanError, match="the state of its schedulers is more than numbers"):
        Checkpointing(me, rates, tmp_path, about, EVERY)


def test_pieces_of_a_parameter_are_put_together_and_cut_otherwise() -> None:
    """What ranks share of an optimizer's state is taken up by other ranks, and by one that has it whole."""
    whole = torch.arange(6.0).view(2, 3)
    saved = {0: whole.view(-1)[:4], 4: whole.view(-1)[4:]}
    assert torch.equal(part(saved, whole, 0, whole), whole)
    assert torch.equal(part(saved, torch.empty(3), 2, whole), torch.tensor([2.0, 3.0, 4.0]))
    assert torch.equal(part({0: whole}, torch.empty(3), 3, whole), whole[1])
    assert part({0: torch.tensor(7.0)}, torch.empty(3), 3, whole) == 7


def test_the_first_layer_that_makes_no_number_is_found(alone: Backend, tmp_path: Path) -> None:
    file = load(MODEL)
    me = Rank(file, cut(file, file.build(SEED)), planned(MODEL, 1), alone, 0, seed=SEED)
    with torch.no_grad():
        me.stages[0].named["4.weight"][0, 0] = torch.inf
    nonfinite.watch(me, tmp_path, 0)
    me.step()
    me.feed.close()
    found = nonfinite.first(tmp_path)
    assert found is not None
    assert (found.microbatch, found.layer) == (0, "4")
    assert found.why.startswith("its weights are no numbers")
