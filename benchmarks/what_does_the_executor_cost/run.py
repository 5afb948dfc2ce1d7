"""What does the executor cost beside a hand-written script on torch.distributed.pipelining, or under DDP?"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from executor.launch import launch
from executor.layers import cut
from executor.model_file import load
from executor.rank import Rank
from executor.recording import events
from executor.steps import file_of
from executor.worker import join
from planner.store import Store
from planner.values.plan import Plan, Stage

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import by_hand  # noqa: E402

KINDS = ("1f1b", "gpipe", "data-parallel")
RANKS = 2
ACTIONS = 10_000
"""So many recorded actions are counted in bytes."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks compare: steps of each kind, `block` of them at once, in turn, `rounds` times."""

    folder: str
    kinds: tuple[str, ...]
    microbatches: int
    rounds: int
    block: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per step of every block, of each kind: by hand, ours recorded, ours not; and the bytes of recording."""

    seconds: dict[str, dict[str, list[float]]]
    recorded_bytes: float


def main() -> int:
    """Compare throughput, recording and start-up; return 7 where the executor is slower than the script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", action="append", choices=KINDS, help="Default: all.")
    parser.add_argument("--m", type=int, default=8, help="Micro-batches of a step.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=4, help="Steps at once.")
    parser.add_argument("--starts", type=int, default=5, help="Launches of each, for the seconds to the first step.")
    chosen = parser.parse_args()
    kinds = tuple(chosen.kind or KINDS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = Job(folder=temporary, kinds=kinds, microbatches=chosen.m, rounds=chosen.rounds, block=chosen.block)
        (folder / "job.json").write_bytes(msgspec.json.encode(job))
        launch(worker, str(folder / "job.json"), RANKS, folder / "logs")
        found = msgspec.json.decode((folder / "found.json").read_bytes(), type=Found)
        slower = _throughput(found)
        print(f"\n{ACTIONS} recorded actions take {found.recorded_bytes / 2**20:.1f} MiB of a rank's memory\n")
        if chosen.starts:
            _start_up(folder, kinds[0], chosen.m, chosen.starts)
    return 7 if slower else 0


def _throughput(found: Found) -> bool:
    """Print a line per kind; return whether the script is faster than its noise explains."""
    print("| | by hand | plan run | throughput ratio | noise of the ratio | recording costs |")
    print("|---|--:|--:|--:|--:|--:|")
    slower = False
    for kind, seconds in found.seconds.items():
        hand, ours, bare = (seconds[name] for name in ("by hand", "recorded", "bare"))
        ratios = [h / o for h, o in zip(hand, ours, strict=True)]
        costs = [o / b - 1 for o, b in zip(ours, bare, strict=True)]
        middle = statistics.median(ratios)
        noise = 1.2533 * statistics.stdev(ratios) / math.sqrt(len(ratios))  # of a median of normal draws
        slower |= middle + 2 * noise < 1.0
        print(
            f"| {kind} | {1e3 * statistics.median(hand):.1f} ms | {1e3 * statistics.median(ours):.1f} ms "
            f"| {middle:.3f} | {noise:.3f} | {100 * statistics.median(costs):+.1f} % |"
        )
    return slower


@record
def worker(path: str) -> None:
    """Take blocks of steps in turn on every rank, and write what they took."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    backend = join("cpu", 1)
    seconds: dict[str, dict[str, list[float]]] = {}
    size = 0.0
    for kind in job.kinds:
        file = load(str(by_hand.MODEL))
        me = Rank(
            file,
            cut(file, file.build(0)),
            _plan(kind, job.microbatches, file.batch_size),
            backend,
            dist.get_rank(),
            seed=0,
        )
        hand = by_hand.step_of(by_hand.imported(), kind, job.microbatches)
        ways: dict[str, Callable[[], object]] = {
            "by hand": hand,
            "recorded": lambda me=me: me.step(stamping=True),  # type: ignore[misc]
            "bare": lambda me=me: me.step(stamping=False),  # type: ignore[misc]
        }
        seconds[kind] = {name: [] for name in ways}
        for turn in range(job.rounds + 1):
            names = list(ways)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                dist.barrier()
                begin = time.perf_counter()
                for _ in range(job.block):
                    ways[name]()
                dist.barrier()
                if turn:  # the first block is a warm-up
                    seconds[kind][name].append((time.perf_counter() - begin) / job.block)
        size = max(size, _recorded_bytes(me, backend))
        me.feed.close()
    if dist.get_rank() == 0:
        found = Found(seconds=seconds, recorded_bytes=size)
        (Path(job.folder) / "found.json").write_bytes(msgspec.json.encode(found))
    dist.barrier()
    dist.destroy_process_group()


def _recorded_bytes(me: Rank, backend: object) -> float:
    """Bytes by which a process grows with what is kept of so many actions, until they are written."""
    me.step()
    gc.collect()
    before, kept, count = _resident(), [], 0
    while count < ACTIONS:
        kept.append((me.stamped, events(me, me.stamped, dist.get_rank(), backend, 0.0)))  # type: ignore[arg-type]
        count += len(me.stamped)
        me.stamped = [type(one)(one.action, one.start, one.ready, one.end, one.repeats) for one in me.stamped]
    return (_resident() - before) * ACTIONS / count


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _plan(kind: str, microbatches: int, batch: int) -> Plan:
    """The plan that `by_hand` hard-codes."""
    file = load(str(by_hand.MODEL))
    names = [layer.name for layer in cut(file, file.build(0)).layers]
    if kind == "data-parallel":
        stages: tuple[Stage, ...] = (Stage(layers=tuple(names), devices=("d0", "d1")),)
        return Plan(
            strategy=kind,
            schedule="1f1b",
            stages=stages,
            microbatches=microbatches,
            batch=batch,
            bucket_bytes=25 * 2**20,
        )
    blocks = [name for name in names if name.startswith("blocks.")]
    half = names.index(blocks[len(blocks) // RANKS])
    stages = (Stage(layers=tuple(names[:half]), devices=("d0",)), Stage(layers=tuple(names[half:]), devices=("d1",)))
    return Plan(strategy=kind, schedule=kind, stages=stages, microbatches=microbatches, batch=batch)


def _start_up(folder: Path, kind: str, microbatches: int, starts: int) -> None:
    """Print the seconds from a command to its first finished step, of both, launched in turn."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    plan = [sys.executable, "-m", "planner.cli.main"]
    quiet = {"cwd": folder, "env": environment, "check": True, "stdout": subprocess.PIPE, "text": True}
    subprocess.run([*plan, "profile", str(by_hand.MODEL), "--budget", "5"], **quiet)  # type: ignore[call-overload]
    subprocess.run([*plan, "simulate", "--k", str(RANKS), "--m", str(microbatches)], **quiet)  # type: ignore[call-overload]
    name = f"{kind}-k{RANKS}-m{microbatches}"
    script = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), str(HERE / "by_hand.py")]
    ours, theirs = [], []
    for _ in range(starts):
        begin = time.monotonic()
        done = subprocess.run([*script, kind, str(microbatches)], **quiet)  # type: ignore[call-overload]
        theirs.append(float(re.findall(r"first step done at ([\d.]+)", done.stdout)[0]) - begin)
        begin = time.monotonic()
        subprocess.run([*plan, "run", name, "--steps", "1"], **quiet)  # type: ignore[call-overload]
        run, _ = Store(folder / ".plan").load_run()
        ours.append(_first_step(run) - begin)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"start to first step, {name}, {starts} launches of each in turn:")
    print(f"script {statistics.median(theirs):.2f} s, plan run {statistics.median(ours):.2f} s, ratio {ratio:.2f}")


def _first_step(run: Path) -> float:
    """When the first step of a run was over, on the machine's monotonic clock."""
    import struct

    return float(struct.unpack_from("<5d", file_of(run, 0).read_bytes())[1])


if __name__ == "__main__":
    sys.exit(main())
