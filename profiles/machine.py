"""Measure the machine: links over the real backend, what an action costs by itself, how busy cores slow each other.

All of it in jobs of real ranks, started as a run's are. No model is asked, so what is found is kept (`profiles.kept`).
"""

from __future__ import annotations

import datetime
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
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
from executor.model_file import ModelFile
from executor.rank import Rank
from executor.reduction import add_up
from executor.torch_adapter import post
from executor.worker import join
from planner.programs.program import RECEIVES, SENDS
from planner.values.cluster import AllReduce, Cluster, Device, Host, Link
from planner.values.plan import Plan, Stage
from profiles import crowding, kept
from profiles.hardware import kind_of

MESSAGE_BYTES = (4, 2**14, 2**16, 2**18, 2**20, 2**22)
COPY_BYTES = (*MESSAGE_BYTES, 2**26)
POST_BYTES = (2**6, 2**16, 2**18, 2**20, 2**22)
ROUNDS = 15
QUIETER = 0.5
"""Share of the load under which a busy machine was measured, from which on it is worth measuring again."""
PROBE_STEPS = 8
PROBE_MICROBATCHES = 8
CROWD_S = 4.0
"""Seconds for which a standard load is run on busy cores."""


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of the probe are told."""

    device: str
    folder: str


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What they find: seconds by message bytes, posting and action overheads."""

    transfers: tuple[tuple[int, float], ...]
    transfer_work: tuple[tuple[int, float], ...]
    reductions: tuple[tuple[int, float], ...]
    posts: tuple[tuple[int, float], ...]
    action_s: float


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine as a cluster, and the executor's own time per forward or backward.

    `launch_s` is how long it takes to start and end as many processes as crowd its cores; `created` is when it was
    measured, `load` how many processes wanted a core then.
    """

    cluster: Cluster
    action_s: float
    launch_s: float
    created: str
    load: float = 0.0

    def __post_init__(self) -> None:
        if not self.cluster.hosts or not all(0 <= n < math.inf for n in (self.action_s, self.launch_s)):
            raise ValueError("a machine has a host, and its seconds are finite and not negative")
        if self.created:
            datetime.datetime.fromisoformat(self.created)


def machine(kind: str, *, again: bool = False) -> Machine:
    """Return what was found of this machine's devices of one kind, measured now if it is not kept or `again`.

    What was found while others kept the cores busy is measured again when they do so by `QUIETER` at most.
    Raises `PlanError` (exit 6) when a rank of the probe fails.
    """
    key, load = kept.key_of(kind), os.getloadavg()[0]
    known = None if again else kept.read(key, Machine)
    if known is None or (known.load > devices.cores() and load <= QUIETER * known.load):
        known = msgspec.structs.replace(measure(kind), load=load)
        kept.save(key, known)
    # what a control group allows changes from one start to the next
    hosts = tuple(msgspec.structs.replace(h, memory_bytes=devices.memory_bytes("cpu")) for h in known.cluster.hosts)
    return msgspec.structs.replace(known, cluster=msgspec.structs.replace(known.cluster, hosts=hosts))


def measure(kind: str) -> Machine:
    """Measure this machine with the devices of one kind. A single GPU has no link to another one to measure.

    Those to the host's memory are taken to be alike.

    Raises `PlanError` (exit 6) when a rank of the probe fails.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    cores = devices.cores()
    if kind == "cuda":
        count = torch.cuda.device_count()
        host = Host(name="local", cores=cores, memory_bytes=devices.memory_bytes("cpu"))
        known = kind_of(devices.describe("cuda"))
        gpus = tuple(
            Device(name=f"d{i}", memory_bytes=devices.memory_bytes("cuda"), host="local", threads=1, kind=known)
            for i in range(count)
        )
        copies = copied(devices.open_device("cuda"))
        cluster = Cluster(
            name="this machine",
            hosts=(host,),
            devices=gpus,
            links=tuple(link_of(copies, between=(gpu.name, host.name)) for gpu in gpus),
        )
        ranks = count
    else:
        host = Host(name="local", cores=cores, memory_bytes=devices.memory_bytes("cpu"))
        cluster = Cluster(name="this machine", hosts=(host,), elastic=True)
        ranks = max(2, min(cores, 8))
    if ranks < 2:
        return Machine(cluster=cluster, action_s=0.0, launch_s=0.0, created=now)
    launch_s = 0.0
    with tempfile.TemporaryDirectory(prefix="foreplan-") as folder:
        path = Path(folder) / "probe.json"
        path.write_bytes(msgspec.json.encode(Probe(device=kind, folder=folder)))
        launch(main, str(path), ranks, Path(folder) / "logs", kept=False)
        found = msgspec.json.decode((Path(folder) / "found.json").read_bytes(), type=Found)
        if kind == "cpu":
            crowd = crowding.measure(crowding.Load(device=kind, budget_s=CROWD_S))
            host, launch_s = msgspec.structs.replace(host, slowdown=crowd.slowdown), crowd.launch_s
    link = link_of(found.transfers)
    cluster = msgspec.structs.replace(
        cluster,
        hosts=(host,),
        links=(link, *cluster.links),
        posts=found.posts,
        transfer_work=found.transfer_work if kind == "cpu" else (),
        all_reduces=(AllReduce(devices=ranks, points=found.reductions),),
    )
    return Machine(cluster=cluster, action_s=found.action_s, launch_s=launch_s, created=now)


@record
def main(path: str) -> None:
    """Run one rank of the probe."""
    probe = msgspec.json.decode(Path(path).read_bytes(), type=Probe)
    backend = join(probe.device, 1)
    measured = [(size, *_transfer(size, backend)) for size in MESSAGE_BYTES]
    reductions = [(size, _reduction(size, backend)) for size in MESSAGE_BYTES]
    posts = [(size, _posting(size, backend)) for size in POST_BYTES]
    action_s = _action(backend)
    if dist.get_rank() == 0:
        found = Found(
            transfers=_ascending([(size, seconds) for size, seconds, _ in measured]),
            transfer_work=_ascending([(size, work) for size, _, work in measured]),
            reductions=_ascending(reductions),
            posts=_ascending(posts),
            action_s=action_s,
        )
        (Path(probe.folder) / "found.json").write_bytes(msgspec.json.encode(found))
    dist.barrier()
    dist.destroy_process_group()


def _ascending(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A smaller message never takes longer: disturbances only ever add time, so it gets the larger one's."""
    shortest, kept = float("inf"), []
    for size, seconds in reversed(points):
        shortest = min(shortest, seconds)
        kept.append((size, shortest))
    return tuple(reversed(kept))


def copied(backend: Backend) -> tuple[tuple[int, float], ...]:
    """Return the seconds of a copy from the host's memory to a device by its bytes, as a rank's LOAD does it."""
    found = []
    for size in COPY_BYTES:
        tensor = torch.ones(size // 4)

        def copy(tensor: torch.Tensor = tensor) -> torch.Tensor:
            return tensor.to(backend.device, copy=True)

        found.append((size, _timed(backend, ROUNDS, copy)))
    return _ascending(found)


def link_of(transfers: tuple[tuple[int, float], ...], between: tuple[str, str] = ("local", "local")) -> Link:
    """Return the link on which messages of so many bytes took so many seconds, the smallest first.

    Where a disturbed small message took as long as a large one, the line through both says nothing of the bandwidth: it
    is at most what the largest message alone shows, times two.
    """
    (least, latency_s), (most, longest_s) = transfers[0], transfers[-1]
    return Link(
        between=between,
        latency_s=latency_s,
        bandwidth_bytes_per_s=(most - least) / max(longest_s - latency_s, longest_s / 2),
        points=transfers,
    )


def _timed(backend: Backend, rounds: int, work: Callable[[], object]) -> float:
    times = []
    for _ in range(rounds + 2):
        backend.synchronize()
        begin = time.monotonic()
        work()
        backend.synchronize()
        times.append(time.monotonic() - begin)
    return statistics.median(times[2:])


def _transfer(size: int, backend: Backend) -> tuple[float, float]:
    """One way of a ping-pong between the ranks 0 and 1: its seconds, and the core seconds it takes from one end."""
    rank = dist.get_rank()
    tensor = torch.ones(max(1, size // 4), device=backend.device)

    def message(operation: Callable[..., object]) -> None:
        for work in post([dist.P2POp(operation, tensor, 1 - rank)]):  # as the executor posts
            work.wait()

    def there_and_back() -> None:
        if rank < 2:
            message(dist.irecv if rank else dist.isend)
            message(dist.isend if rank else dist.irecv)

    dist.barrier()
    works: list[float] = []

    def worked() -> None:
        before = time.process_time()
        there_and_back()
        works.append(time.process_time() - before)

    seconds = _timed(backend, ROUNDS, worked)
    return seconds / 2, statistics.median(works) / 2


def _reduction(size: int, backend: Backend) -> float:
    tensor = torch.ones(max(1, size // 4), device=backend.device)
    dist.barrier()
    return _timed(backend, ROUNDS, lambda: add_up(tensor))


_DISPLACING = 2**22
"""Floats, 16 MiB: reading and writing as many leaves little of anything else in a core's caches."""


class _Layer(torch.nn.Module):
    """A layer with one parameter; `busy` makes it compute for a few milliseconds and displace what is in the caches."""

    def __init__(self, *, busy: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.work = torch.ones(_DISPLACING) if busy else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.work is not None:
            torch.relu(self.work)
        return x * self.scale


def _pipeline(size: int, backend: Backend, *, busy: bool) -> tuple[Rank, dict[str, list[float]]]:
    """Run a pipeline with messages of `size` bytes through the executor itself; return seconds by operation."""
    count = dist.get_world_size()
    file = ModelFile(
        path="probe",
        model=lambda: torch.nn.Sequential(*(_Layer(busy=busy) for _ in range(count))),
        batch=lambda n: (torch.ones(n, size // 4), torch.ones(n, size // 4)),
        loss=lambda outputs, targets: (outputs - targets).sum(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        layers=None,
        batch_size=PROBE_MICROBATCHES,
    )
    plan = Plan(
        strategy="probe",
        schedule="1f1b",
        stages=tuple(Stage(layers=(str(i),), devices=(f"d{i}",)) for i in range(count)),
        microbatches=PROBE_MICROBATCHES,
        batch=PROBE_MICROBATCHES,
    )
    rank = Rank(file, cut(file, file.build(0)), plan, backend, dist.get_rank(), seed=0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in range(PROBE_STEPS):
        rank.step()
        backend.synchronize()
        for stamped in rank.stamped if step >= 2 else []:
            seconds[stamped.action.op].append(backend.seconds(stamped.end) - backend.seconds(stamped.ready))
    return rank, seconds


def _posting(size: int, backend: Backend) -> float:
    """Seconds that posting a send or receive takes between layers that compute: the mean over all ranks."""
    _, seconds = _pipeline(size, backend, busy=True)
    posts = [s for op in (*SENDS, *RECEIVES) for s in seconds[op]]
    mean = torch.tensor([statistics.median(posts)], dtype=torch.float64, device=backend.device)
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _action(backend: Backend) -> float:
    """Seconds that a forward or backward takes in the executor beyond the layer's own."""
    rank, seconds = _pipeline(64, backend, busy=False)
    x = torch.ones(1, 16, device=backend.device, requires_grad=True)
    direct = []
    for _ in range(50):
        backend.synchronize()
        begin = backend.stamp()
        output = rank.stages[dist.get_rank()].module(x)
        middle = backend.stamp()
        torch.autograd.backward(output, torch.ones_like(output))
        end = backend.stamp()
        backend.synchronize()
        direct += [backend.seconds(middle) - backend.seconds(begin), backend.seconds(end) - backend.seconds(middle)]
    return max(0.0, statistics.median(seconds["F"] + seconds["B"]) - statistics.median(direct))
