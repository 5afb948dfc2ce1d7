"""What the processes of the executor's tests do: one step of several plans, their gradients saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.pipelining import PipelineStage

from executor.batch import Drawn
from executor.devices import Backend
from executor.evaluation import prepare
from executor.feed import Feed, open_feed
from executor.initial import cut_hollow
from executor.layers import cut
from executor.model_file import load
from executor.rank import Rank
from executor.worker import join
from planner.orders import schedules
from planner.orders.action import Action
from planner.orders.operations import OPTIMIZER
from planner.values.plan import Plan
from tests.torch_schedules import oracle

SEED = 3


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """So many steps of a plan of a model file; with `oracle` torch's own runtime performs the first, too."""

    name: str
    model: str
    plan: Plan
    oracle: bool = False
    steps: int = 1


class Cases(msgspec.Struct, frozen=True, kw_only=True):
    folder: str
    cases: tuple[Case, ...]


@record
def main(path: str) -> None:
    job = msgspec.json.decode(Path(path).read_bytes(), type=Cases)
    backend = join("cpu", 1)
    rank = dist.get_rank()
    for case in job.cases:
        file = load(case.model)
        folder = _initial(job, case.name)
        layered, weights = cut_hollow(file, SEED, folder, first=rank == 0)
        me = Rank(file, layered, case.plan, backend, rank, seed=SEED, weights=weights)
        found: dict[str, torch.Tensor] = {}

        def watch(action: Action, when: str, me: Rank = me, found: dict[str, torch.Tensor] = found) -> None:
            if action.op == OPTIMIZER and when == "before":
                stage = me.stages[action.stage]
                for name in stage.named:
                    found.pop(name, None)
                found.update({name: gradient.clone() for name, gradient in stage.gradients().items()})

        if file.compiled:
            me.compile()
        taken, losses = _noted(me.feed), []
        for _ in range(case.steps):
            me.step(None, watch)
            losses.append(float(sum(me.losses.values())))
        me.feed.close()
        out = Path(job.folder) / f"{case.name}.{rank}.pt"
        norm = me.all_gradients.norm if me.all_gradients is not None else None
        scale = me.scaling.scale if me.scaling is not None else None
        kept = {"gradients": found, "losses": me.losses, "state": me.state(), "norm": norm, "scale": scale}
        torch.save({**kept, "taken": taken, "history": losses}, out)
        if case.oracle:
            torch.save(_torch_gradients(case, rank), Path(job.folder) / f"{case.name}.torch.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _noted(feed: Feed) -> list[torch.Tensor]:
    """Note the first input of every share that is taken from a feed."""
    taken: list[torch.Tensor] = []
    take = feed.take

    def noted() -> Drawn:
        share = take()
        taken.append(share.inputs[0])
        return share

    feed.take = noted  # type: ignore[method-assign]
    return taken


def _torch_gradients(case: Case, rank: int) -> dict[str, torch.Tensor]:
    """The same order of computes performed by torch's schedule runtime on plain stages."""
    file = load(case.model)
    layered = cut(file, file.build(SEED))
    plan, names = case.plan, layered.parameter_names()
    layers = plan.layer_ranges([layer.name for layer in layered.layers])[rank]
    module = layered.stage(layers)
    stage = PipelineStage(module, rank, len(plan.stages), torch.device("cpu"))
    order = schedules.arrange(plan.schedule, schedules.Shape(len(plan.stages), plan.microbatches))
    runtime = oracle(
        [stage], order, plan.microbatches, lambda output, target: file.loss(output, target) / plan.microbatches
    )
    share = open_feed(file, plan.batch, seed=SEED).take()
    runtime.step(*(share.inputs if rank == 0 else ()), target=share.targets, return_outputs=False)
    return {names[id(p)]: p.grad for p in module.parameters() if p.grad is not None}


STEPS = 2
"""Training steps before a model is evaluated first, and as many after it."""


@record
def evaluate(path: str) -> None:
    """Train and evaluate in between, then train the same without: what was found, and the states of both."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Cases)
    backend = join("cpu", 1)
    rank = dist.get_rank()
    for case in job.cases:
        trained = [
            _trained(case, backend, rank, _initial(job, f"{case.name}.{evaluated}"), evaluated=evaluated)
            for evaluated in (True, False)
        ]
        torch.save([entry for entries in trained for entry in entries], Path(job.folder) / f"{case.name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _initial(job: Cases, name: str) -> Path:
    """A folder for initial weights, of one of several models that the same processes make."""
    folder = Path(job.folder) / f"{name}.initial"
    folder.mkdir(exist_ok=True)
    return folder


def _trained(case: Case, backend: Backend, rank: int, folder: Path, *, evaluated: bool) -> list[dict[str, Any]]:
    """Every evaluation with the state behind it; at last the losses of all steps, and the state behind them."""
    file = load(case.model)
    layered, weights = cut_hollow(file, SEED, folder, first=rank == 0)
    evaluates = prepare(file, layered, case.plan) if evaluated else None
    me = Rank(file, layered, case.plan, backend, rank, seed=SEED, weights=weights)
    evaluator = evaluates(me) if evaluates is not None else None
    torch.manual_seed(SEED)  # of dropout
    found, losses = [], []
    for step in range(2 * STEPS):
        me.step()
        losses.append(sum(float(loss) for loss in me.losses.values()))
        if evaluator is not None and step >= STEPS - 1:
            judged = msgspec.to_builtins(evaluator.run(step + 1))
            found.append({"evaluation": judged, "state": {name: t.clone() for name, t in me.state().items()}})
    return [*found, {"losses": losses, "state": me.state()}]
