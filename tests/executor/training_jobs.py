"""What the processes of the training tests do: several runs in one launch, each as a rank of `plan run` does it."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor.devices import Backend
from executor.ending import ask
from executor.evaluation import prepare
from executor.evaluations import Evaluations
from executor.layers import cut
from executor.model_file import load
from executor.rank import Rank
from executor.rates import Rates
from executor.steps import Extent, announce
from executor.training import Training
from executor.worker import join
from planner.values.plan import Plan

SEED = 3


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A run of so many steps; somebody asks for its end after `stop_s`, where that is not 0.

    The model is evaluated every so many steps, where that is not 0.
    """

    name: str
    model: str
    plan: Plan
    steps: int
    stop_s: float = 0.0
    evaluate_every: int = 0


class Cases(msgspec.Struct, frozen=True, kw_only=True):
    folder: str
    cases: tuple[Case, ...]


def train(case: Case, folder: Path, backend: Backend) -> None:
    """Train as one rank, and save what it has then."""
    rank = dist.get_rank()
    file = load(case.model)
    layered = cut(file, file.build(SEED))
    evaluates = prepare(file, layered, case.plan) if case.evaluate_every else None
    me = Rank(file, layered, case.plan, backend, rank, seed=SEED)
    own = folder / case.name
    own.mkdir(exist_ok=True)
    announce(own, Extent(steps=case.steps))
    if case.stop_s and rank == dist.get_world_size() - 1:
        threading.Timer(case.stop_s, ask, (own,)).start()
    rates = Rates(file, me.optimizers, case.steps)
    evaluations = None
    if evaluates is not None:
        told = own if rank == 0 else None
        extent = Extent(steps=case.steps)
        evaluations = Evaluations(evaluates(me), rates, extent, every=case.evaluate_every, folder=told)
    Training(me, rates, backend, own, offset=0.0, where=case.name).run(case.steps, evaluations)
    torch.save(me.state(), own / f"rank{rank}.pt")


@record
def main(path: str) -> None:
    job = msgspec.json.decode(Path(path).read_bytes(), type=Cases)
    backend = join("cpu", 1)
    for case in job.cases:
        train(case, Path(job.folder), backend)
    dist.barrier()
    dist.destroy_process_group()
