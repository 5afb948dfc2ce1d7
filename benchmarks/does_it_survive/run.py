"""Kill ranks of a run at random, many times in a row, and see whether it is the run that nobody has killed.

    python benchmarks/does_it_survive/run.py [--kills 20] [--seed 0] [--json] [--quick]

The model has dropout, batch norm, draws of Python's own, shuffled data made by a worker process, momentum, a scheduler
and clipping: whatever a checkpoint forgets would be seen in the loss. Exits with 7 when anything differs or is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from executor.run import run  # noqa: E402
from executor.steps import joined  # noqa: E402
from planner.values.plan import Plan, Stage  # noqa: E402

MODEL = str(ROOT / "tests" / "executor" / "remembered_model.py")
STAGES = (("0", "1", "2", "3"), ("4", "5", "6", "7"))
EVERY, BETWEEN = 20, 50
"""A checkpoint every so many steps, and a kill within so many behind the last one's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="Two kills.")
    asked = parser.parse_args()
    kills = 2 if asked.quick else asked.kills
    stages = tuple(Stage(layers=own, devices=(f"cpu:{i}",)) for i, own in enumerate(STAGES))
    plan = Plan(strategy="1f1b", schedule="1f1b", stages=stages, microbatches=4, batch=16, norm=True)
    steps = BETWEEN * (kills + 1)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "tmp").mkdir()
        os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None  # apart from what others leave
        before = left()
        whole = trained(plan, folder / "whole", steps)
        killed: list[str] = []
        over = threading.Event()
        murders = threading.Thread(target=kill, args=(folder / "killed", kills, asked.seed, killed, over))
        murders.start()
        began = time.monotonic()
        survived = trained(plan, folder / "killed", steps, checkpoint_every=EVERY, max_restarts=kills)
        took = time.monotonic() - began
        over.set()
        murders.join()
        wait_until_gone(before)
        after = left()
    same = sum(a == b for a, b in zip(whole, survived, strict=False))
    rubbish = {kind: sorted(after[kind] - before[kind]) for kind in after if after[kind] - before[kind]}
    found = {
        "kills": len(killed),
        "steps": steps,
        "steps_alike": same,
        "seconds": took,
        "left_behind": rubbish,
        "signals": {name: killed.count(name) for name in sorted(set(killed))},
    }
    met = len(killed) == kills and same == steps == len(survived) and not rubbish
    if asked.json:
        print(json.dumps({**found, "met": met}))
    else:
        print(f"{len(killed)} of {kills} ranks killed {found['signals']}, in {took:.0f} s with {steps} steps")
        print(f"{same} of {steps} steps have the loss of the run that nobody killed, to the last bit")
        print(f"left behind: {rubbish or 'nothing'}")
        print("met" if met else "NOT met")
    sys.exit(0 if met else 7)


def trained(plan: Plan, folder: Path, steps: int, **how: int) -> tuple[float, ...]:
    """Train, and return the losses."""
    said = (lambda text: print(f"  {text[:100]}", file=sys.stderr)) if how else (lambda text: None)
    outcome = run(
        MODEL, plan, device="cpu", steps=steps, seed=3, folder=folder, capacity_bytes=(1e12, 1e12), say=said, **how
    )
    return outcome.losses


def kill(folder: Path, kills: int, seed: int, killed: list[str], over: threading.Event) -> None:
    """End one of a run's ranks at a random moment of each stretch of its steps."""
    chance = random.Random(seed)
    for number in range(kills):
        target = number * BETWEEN + chance.randrange(EVERY + 1, BETWEEN)
        while len(joined(folder, 2)) < target:
            if over.wait(0.05):
                return
        over.wait(chance.random())
        while len(ranks := ranks_of(os.getpid())) < 2:  # they are just being started again
            if over.wait(0.05):
                return
        how = (signal.SIGKILL, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM)[number % 4]
        os.kill(chance.choice(ranks), how)
        killed.append(how.name)


def ranks_of(parent: int) -> list[int]:
    """The processes that a process has started as ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text().rpartition(")")[2].split()
            if int(status[1]) == parent and "spawn_main" in (path / "cmdline").read_text():
                found.append(int(path.name))
        except OSError:
            continue
    return sorted(found)


def left() -> dict[str, set[str]]:
    """What a run could leave behind: processes of ours, ports, temporary files, semaphores and shared memory."""
    listening = set()
    for name in ("tcp", "tcp6"):
        lines = [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        inodes = {line[9]: line[1] for line in lines if line[3] == "0A"}
        listening |= {inodes[inode] for inode in sockets(os.getpid()) & inodes.keys()}
    return {
        "processes": {str(pid) for pid in ranks_of(os.getpid())},
        "ports": listening,
        "temporary": {path.name for path in Path(tempfile.gettempdir()).iterdir()},
        "shared memory": {path.name for path in Path("/dev/shm").iterdir()} - elsewhere(),
    }


def elsewhere() -> set[str]:
    """The pieces of shared memory that processes use which are not ours: theirs to remove."""
    found = set()
    own = {os.getpid(), *ranks_of(os.getpid())}
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) in own:
            continue
        try:
            lines = (path / "maps").read_text().splitlines()
        except OSError:
            continue
        found |= {line.rpartition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    return found


def sockets(pid: int) -> set[str]:
    """The sockets that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def wait_until_gone(before: dict[str, set[str]], patience_s: float = 10.0) -> None:
    """Give what is ending the time to end."""
    since = time.monotonic()
    while time.monotonic() - since < patience_s and any(left()[kind] - before[kind] for kind in before):
        time.sleep(0.1)


if __name__ == "__main__":
    main()
