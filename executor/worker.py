"""What a process of a run does from its start to its end: join, build, step, record, save."""

from __future__ import annotations

import datetime
import gc
import hashlib
import os
import time
import warnings
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor.checkpointing import Checkpointing, forget_behind, found_by_all
from executor.checkpoints import Manifest
from executor.devices import Backend, open_device
from executor.evaluation import prepare
from executor.evaluations import Evaluations
from executor.feed import Feed
from executor.initial import FILE as INITIAL
from executor.initial import cut_hollow
from executor.model_file import ModelFile, load
from executor.parent import LAUNCHER, die_with_parent
from executor.rank import Rank
from executor.rates import Rates
from executor.recording import memory_step
from executor.saving import await_all, save
from executor.seeding import begin, mixed
from executor.state import restore
from executor.steps import Extent, announce
from executor.training import Training
from planner.basis.errors import RUN_FAILED, PlanError
from planner.values.plan import Plan

PATIENCE_S = 60.0
"""How long a rank waits for another one, unless steps are predicted to be so long that more is needed."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of a run are told: to train for `steps`, or for `epochs` where there are such.
    They evaluate the model every so many steps, 0 being never, and None at the end of each epoch and of the run.

    `folder` receives their results; a peer is waited for `patience_s` at most.

    A checkpoint is written behind every so many steps (`checkpoint_every`, 0: never). The run goes on from the newest
    one in its folder, or else in that of another run that it is to `resume`. It ends behind the step
    `examine`, in which it looks for the first layer that makes what is no number.

    `workers` are the processes that make batches of `data()` ready for each rank that loads; as many as the model
    file's DataLoader has, where nothing is said.
    """

    model: str
    plan: Plan
    device: str
    steps: int
    epochs: int = 0
    seed: int
    evaluate_every: int | None = None
    folder: str
    patience_s: float
    workers: int | None = None

    checkpoint_every: int = 0
    resume: str = ""
    examine: int | None = None


@record
def main(path: str) -> None:
    """Run one rank of the job written at `path`. Rank and world come from torchrun's environment."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    backend = join(job.device, job.plan.threads, job.patience_s)
    rank = dist.get_rank()
    file = load(job.model, job.plan.sequence)
    folder = Path(job.folder)
    layered, weights = cut_hollow(file, job.seed, folder, first=rank == 0)
    check_batches(file)
    wanted = file.evaluate is not None and job.evaluate_every != 0
    evaluating = prepare(file, layered, job.plan) if wanted else None
    me = Rank(file, layered, job.plan, backend, rank, seed=job.seed, workers=job.workers, weights=weights)
    evaluator = evaluating(me) if evaluating is not None else None
    if file.compiled:
        me.compile()
        (folder / f"rank{rank}.compiled").touch()
        await_all(folder, dist.get_world_size(), "compiled")
    if weights is not None:  # whatever reads them (the rank, what evaluates) has been made
        weights.close()
    del layered, weights, evaluating
    gc.collect()
    offset = clock_offset(backend)
    if file.compiled:
        (folder / f"rank{rank}.compiled").unlink()
    if rank == 0:
        (folder / INITIAL).unlink()  # all ranks have read it: they have just spoken with each other
    extent = extent_of(job, me.feed)
    rates = Rates(file, me.optimizers, extent.steps, judged=wanted)
    found = found_by_all(folder, job.resume, backend.device)
    start = found.manifest.step if found else 0
    forget_behind(folder, rank, start)
    about = Manifest(step=start, steps=extent.steps, epoch=extent.epoch, seed=job.seed, model=job.model, plan=job.plan)
    checkpointing = Checkpointing(me, rates, folder, about, job.checkpoint_every)
    begin(mixed(job.seed, rank))
    if found is not None:
        restore(me, rates, rank, found, extent.steps)
    if rank == 0:
        announce(folder, extent)
    where = f"{job.model}, plan {job.plan}"
    training = Training(me, rates, backend, folder, offset=offset, where=where, start=start)
    training.examined = job.examine
    evaluations = None
    if evaluator is not None:
        told = folder if rank == 0 else None
        evaluations = Evaluations(evaluator, rates, extent, every=job.evaluate_every or 0, folder=told)
    done = training.run(extent.steps, evaluations, checkpointing)
    save(me.state(), folder / f"rank{rank}.pt")
    if rank == 0:
        me.saved_as.write(folder)
    await_all(folder, dist.get_world_size(), "pt")
    if done == extent.steps:
        found_memory = memory_step(me, rank, backend, offset)  # one step more, behind the weights that are kept
        (folder / f"rank{rank}.memory.json").write_bytes(msgspec.json.encode(found_memory))
    me.feed.close()
    # Not in a `finally`: a rank that fails must report before its peers notice that it is gone.
    dist.barrier()
    dist.destroy_process_group()


def extent_of(job: Job, feed: Feed) -> Extent:
    """Return how many steps a job has. Raises `PlanError` where nobody knows how many an epoch has."""
    if not job.epochs:
        return Extent(steps=job.steps, epoch=feed.steps or 0)
    if feed.steps is None:
        raise PlanError(
            what="nobody knows how long an epoch is",
            where=job.model,
            why="its data has no length",
            fix="say how many steps to train: plan run --steps 1000",
        )
    return Extent(steps=job.epochs * feed.steps, epoch=feed.steps)


def join(device: str, threads: int, patience_s: float = PATIENCE_S) -> Backend:
    """Bind this process to its parent's life and to its device, and join the process group."""
    die_with_parent(os.environ.get(LAUNCHER))
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the launcher, which asks the ranks to end
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    backend = open_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend.communication, timeout=datetime.timedelta(seconds=patience_s))
    return backend


def check_batches(file: ModelFile) -> None:
    """Raise `PlanError` when the ranks draw different batches from one seed: inputs and targets would not match."""
    drawn = [file.drawn(2, seed=0)]
    if file.batch is not None and file.data is not None:
        drawn.append(file.data.source.first(2))
    digest = hashlib.sha256("".join(batch.digest() for batch in drawn).encode())
    if file.data is not None:
        digest.update(str(file.data.source.samples).encode())
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise PlanError(
            what=f"{'batch(n)' if file.data is None else 'data()'} draws different samples in different processes",
            where=file.path,
            why="inputs are used in one process and targets in another, so both must come from the seeded generators",
            fix="draw with torch, random or numpy's global generators, which are seeded before each call",
            code=RUN_FAILED,
        )


def clock_offset(backend: Backend, rounds: int = 9) -> float:
    """Return what to add to this rank's clock to get rank 0's, in seconds.

    Cristian's method: the round trip with the least delay decides. Ranks of one boot share the clock: offset 0.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    boots: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(boots, boot)
    offset = 0.0
    for rank in range(1, dist.get_world_size()):
        if boots[rank] == boots[0] or dist.get_rank() not in (0, rank):
            continue
        trips = []
        stamp = torch.zeros(1, dtype=torch.float64, device=backend.device)
        for _ in range(rounds):
            if dist.get_rank() == 0:
                dist.recv(stamp, rank)
                dist.send(torch.tensor([time.monotonic()], dtype=torch.float64, device=backend.device), rank)
            else:
                before = time.monotonic()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                after = time.monotonic()
                trips.append((after - before, float(stamp) - (before + after) / 2))
        if trips:
            offset = min(trips)[1]
    return offset
