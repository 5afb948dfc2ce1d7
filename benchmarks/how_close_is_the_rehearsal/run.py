"""How close is the prediction to a rehearsal: real processes and messages, with waits instead of computing?

    .venv/bin/python benchmarks/how_close_is_the_rehearsal/run.py
    .venv/bin/python benchmarks/how_close_is_the_rehearsal/run.py --k 2,8 --m 8 --strategies 1f1b,gpipe

Plans of a shipped profile are rehearsed one after the other, every strategy that a rank can perform at every K and M.
Prints one row per plan, then medians and 90th percentiles of the absolute errors beside their targets; exits 7 when one
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"total": (0.03, 0.08), "replay": (0.02, 0.05), "memory": (0.02, 0.03)}
"""Median and 90th percentile that are asked for."""
STRATEGIES = "naive,gpipe,1f1b,interleaved,zb-h1,chimera,data-parallel,zero-1"


def plan(folder: str, *arguments: str) -> dict | None:
    """Run one command of foreplan and return its JSON data; None, with the reason printed, where it fails."""
    command = [sys.executable, "-m", "planner.cli.main", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    if document["status"] != "ok":
        print(f"{' '.join(arguments)}: {document['error']['what']}: {document['error']['why']}", file=sys.stderr)
        return None
    return document["data"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="vgg16", help="a shipped profile, or the path of another")
    parser.add_argument("--k", default="2,4,8")
    parser.add_argument("--m", default="4,8,32")
    parser.add_argument("--strategies", default=STRATEGIES, help="with commas between")
    parser.add_argument("--samples", type=int, default=64, help="per micro-batch")
    parser.add_argument("--message-scale", default="0.002")
    parser.add_argument("--steps", type=int, default=8, help="the first three warm up")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="plans are drawn at random until so many have passed"
    )
    parser.add_argument("--quick", action="store_true", help="one plan")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args()
    asked = [
        (int(k), int(m), strategy)
        for k in options.k.split(",")
        for m in options.m.split(",")
        for strategy in options.strategies.split(",")
    ]
    random.Random(0).shuffle(asked)
    begin, found = time.monotonic(), list[dict]()
    if not options.json:
        print("| plan | predicted | rehearsed | total | replay | memory | noise |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for k, m, strategy in asked[: 1 if options.quick else None]:
            if time.monotonic() - begin > options.seconds:
                break
            batch = str(m * options.samples)
            arguments = ("--k", str(k), "--m", str(m), "--batch", batch, "--strategy", strategy)
            if plan(folder, "simulate", "--profile", options.profile, *arguments) is None:
                continue
            rehearsing = ("--rehearse", "--message-scale", options.message_scale, "--steps", str(options.steps))
            data = plan(folder, "run", "best", *rehearsing)
            if data is not None:
                found.append(data)
                if not options.json:
                    print(row(data), flush=True)
    summary = {name: summed(found, name) for name in TARGETS}
    if options.json:
        print(json.dumps({"plans": len(found), "seconds": time.monotonic() - begin, "errors_fraction": summary}))
    else:
        print(f"\n{len(found)} of {len(asked)} plans")
        for name, (middle, high) in summary.items():
            target = TARGETS[name]
            print(f"{name}: median {middle:.1%} (asked {target[0]:.0%}), 90th percentile {high:.1%} ({target[1]:.0%})")
    missed = any(is_ > asked_ for name, own in summary.items() for is_, asked_ in zip(own, TARGETS[name], strict=True))
    raise SystemExit(7 if missed else 0)


def errors(data: dict, name: str) -> list[float]:
    """The relative errors of one kind in a rehearsal."""
    own = data["errors"][name]
    return [e["relative_error"] for e in (own if isinstance(own, list) else [own])]


def summed(found: list[dict], name: str) -> tuple[float, float]:
    """Median and 90th percentile of the absolute errors of a kind, of memory each plan's worst device."""
    each = sorted(max(map(abs, errors(data, name))) for data in found)
    return (statistics.median(each), each[min(len(each) - 1, int(0.9 * len(each)))]) if each else (0.0, 0.0)


def row(data: dict) -> str:
    """One plan's figures."""
    (total,), (replay,) = errors(data, "total"), errors(data, "replay")
    cells = [
        data["plan"],
        f"{1e3 * data['predicted']['step_s']:.1f} ms",
        f"{1e3 * data['measured']['step_s']:.1f} ms",
        f"{100 * total:+.1f} %",
        f"{100 * replay:+.1f} %",
        f"{100 * max(errors(data, 'memory'), key=abs):+.1f} %",
        f"{100 * data['noise_fraction']:.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
