"""How busy processes slow each other down on shared cores: a model's own passes, or a standard load's."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor import devices
from executor.devices import Backend
from executor.launch import launch
from executor.layers import cut
from executor.model_file import load
from executor.worker import join
from planner.values.cluster import Cluster
from profiles.chain import Chain

ROUNDS, PASSES = 3, 8
STANDARD_SAMPLES, STANDARD_WIDTH = 256, 512
"""Of the standard load: two linear layers and a GELU of this width and four times it, as in a small transformer."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks run for `budget_s` seconds: a model file's step on so many samples; without one, a standard load.

    Samples of a model of sequences have `sequence` tokens.
    """

    device: str
    budget_s: float
    model: str = ""
    samples: int = 1
    sequence: int = 0


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """How much slower a busy process gets, beyond its share of the cores, by the number of busy processes.

    `launch_s` are the seconds that the processes took to start and to end.
    """

    slowdown: tuple[tuple[int, float], ...]
    launch_s: float


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    load: Load
    folder: str


class _Found(msgspec.Struct, frozen=True, kw_only=True):
    slowdown: tuple[tuple[int, float], ...]
    seconds: float


def measure(load: Load) -> Crowd:
    """Run a load in up to 8 processes, at most twice as many as there are cores.

    Raises `PlanError` (exit 6) when one of them fails.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foreplan-") as folder:
        path = Path(folder) / "job.json"
        path.write_bytes(msgspec.json.encode(_Job(load=load, folder=folder)))
        launch(main, str(path), processes(), Path(folder) / "logs", kept=False)
        found = msgspec.json.decode((Path(folder) / "found.json").read_bytes(), type=_Found)
    return Crowd(slowdown=found.slowdown, launch_s=time.monotonic() - begin - found.seconds)


def crowded(cluster: Cluster, found: Crowd) -> Cluster:
    """Return a cluster whose hosts slow down as was found."""
    hosts = tuple(msgspec.structs.replace(host, slowdown=found.slowdown) for host in cluster.hosts)
    return msgspec.structs.replace(cluster, hosts=hosts)


def processes() -> int:
    """How many processes crowd the cores."""
    return min(2 * devices.cores(), 8)


@record
def main(path: str) -> None:
    """Run one of the processes."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=_Job)
    backend = join(job.load.device, 1)
    one_pass = _passes_of_model(job.load, backend) if job.load.model else _standard(backend)
    begin = time.monotonic()
    slowdown = _slowdown(one_pass, job.load.budget_s, backend)
    if dist.get_rank() == 0:
        found = _Found(slowdown=slowdown, seconds=time.monotonic() - begin)
        (Path(job.folder) / "found.json").write_bytes(msgspec.json.encode(found))
    dist.barrier()
    dist.destroy_process_group()


def _passes_of_model(asked: Load, backend: Backend) -> Callable[[], object]:
    file = load(asked.model, asked.sequence)
    chain = Chain(file, cut(file, file.build(0)), backend.device)
    inputs, targets = chain.draw(asked.samples)
    return lambda: chain.loss(chain.whole(*inputs), targets).backward()


def _standard(backend: Backend) -> Callable[[], object]:
    width = STANDARD_WIDTH
    module = torch.nn.Sequential(
        torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
    ).to(backend.device)
    x = torch.ones(STANDARD_SAMPLES, width, device=backend.device, requires_grad=True)
    return lambda: module(x).sum().backward()


def _slowdown(work: Callable[[], object], budget_s: float, backend: Backend) -> tuple[tuple[int, float], ...]:
    """Compare passes on rank 0 alone and together with others, in turn, so that drift hits both.

    Up to the number of cores, what is lost is lost in caches and memory; beyond it, what switching costs on top of
    the smaller share of the cores.
    """
    cores = devices.cores()
    counts = [n for n in (2, 4, 8) if n <= dist.get_world_size()]
    alone: dict[int, list[float]] = {n: [] for n in counts}
    together: dict[int, list[float]] = {n: [] for n in counts}

    def one_pass() -> float:
        begin = time.monotonic()
        work()
        return time.monotonic() - begin

    one_pass()
    took = torch.tensor(one_pass(), dtype=torch.float64, device=backend.device)
    dist.all_reduce(took, dist.ReduceOp.MAX)  # all at once: the slowest of those passes that are to come
    passes = int(budget_s / (ROUNDS * 2 * len(counts) * max(float(took), 1e-6)))
    for _ in range(ROUNDS):
        for n in counts:
            torch.set_num_threads(max(1, cores // n))
            for busy, found in ((1, alone), (n, together)):
                dist.barrier()
                if dist.get_rank() < busy:
                    found[n] += [one_pass() for _ in range(max(1, min(passes, PASSES)))]
                dist.barrier()
    if dist.get_rank() > 0:
        return ()
    shares = {n: max(1.0, n * max(1, cores // n) / cores) for n in counts}
    ratios = [(n, statistics.mean(together[n]) / statistics.mean(alone[n]) / shares[n]) for n in counts]
    return ((1, 1.0), *((n, max(1.0, ratio)) for n, ratio in ratios))
