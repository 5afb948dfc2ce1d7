"""How true is the prediction? Profile, predict and run, several times over, and print the errors split by cause.

    .venv/bin/python benchmarks/how_true_is_the_prediction/run.py --rounds 3

Every round measures a new profile and then runs every plan, so that drift of a shared machine hits both. The table
shows medians over the rounds, the worst round behind them, and the noise of the measured steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def plan(folder: str, *arguments: str) -> dict:
    """Run one command of foreplan and return its JSON data."""
    command = [sys.executable, "-m", "planner.cli.main", *arguments, "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    if document["status"] != "ok":
        raise SystemExit(f"{' '.join(arguments)}: {document['error']}")
    return document["data"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", default="gpt,digits", help="names of examples, with commas between")
    parser.add_argument("--plans", default="gpipe,1f1b", help="strategies, with commas between; -recompute may follow")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--m", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=23, help="the first three warm up")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing per profile")
    parser.add_argument("--out", default=str(HERE / "results.json"), help="every round's figures go here")
    options = parser.parse_args()
    found: list[dict] = []
    for _ in range(options.rounds):
        for example in options.examples.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = str(ROOT / "examples" / f"{example}.py")
                profile = plan(folder, "profile", path, "--budget", str(options.budget))
                simulated = plan(folder, "simulate", "--k", str(options.k), "--m", str(options.m))
                names = [p["plan"] for p in simulated["plans"]]
                for wanted in options.plans.split(","):
                    recompute = "-recompute" if wanted.endswith("-recompute") else ""
                    strategy = wanted.removesuffix("-recompute")
                    k = 1 if strategy == "single" else options.k
                    name = f"{strategy}-k{k}-m{options.m}{recompute}"
                    if name not in names:
                        continue
                    data = plan(folder, "run", name, "--steps", str(options.steps))
                    found.append({"example": example, "profile_noise": profile["noise_fraction"], **data})
                    line(example, name, [found[-1]])
    Path(options.out).write_text(json.dumps({"hardware": hardware(), "runs": [slim(f) for f in found]}, indent=1))
    print(f"\n{hardware()}\nmedians over {options.rounds} rounds of {options.steps} steps\n")
    print("| example | plan | predicted | measured | total | replay | worst total | memory | noise | inside |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for example, name in dict.fromkeys((f["example"], f["plan"]) for f in found):
        line(example, name, [f for f in found if (f["example"], f["plan"]) == (example, name)], table=True)
    ranking(found)


def line(example: str, name: str, runs: list[dict], *, table: bool = False) -> None:
    """Print one row: medians over runs of one plan."""

    def median(get) -> float:
        return statistics.median(get(r) for r in runs)

    total = median(lambda r: r["errors"]["total"]["relative_error"])
    replay = median(lambda r: r["errors"]["replay"]["relative_error"])
    worst = max((r["errors"]["total"]["relative_error"] for r in runs), key=abs)
    memory = max((m["relative_error"] for r in runs for m in r["errors"]["memory"]), key=abs)
    cells = [
        example,
        name,
        f"{1e3 * median(lambda r: r['predicted']['step_s']):.1f} ms",
        f"{1e3 * median(lambda r: r['measured']['step_s']):.1f} ms",
        f"{100 * total:+.1f} %",
        f"{100 * replay:+.1f} %",
        f"{100 * worst:+.1f} %",
        f"{100 * memory:+.1f} %",
        f"{100 * median(lambda r: r['noise_fraction']):.1f} %",
        f"{100 * median(lambda r: r['steps_inside_interval_fraction']):.0f} %",
    ]
    print("| " + " | ".join(cells) + " |" if table else "  ".join(cells), flush=True)


def ranking(found: list[dict]) -> None:
    """Print Kendall's tau between predicted and measured order, and what the predicted best costs against the best."""
    for example in dict.fromkeys(f["example"] for f in found):
        by_plan: dict[str, list[dict]] = {}
        for f in found:
            if f["example"] == example:
                by_plan.setdefault(f["plan"], []).append(f)
        pairs = [
            tuple(statistics.median(r[side]["step_s"] for r in runs) for side in ("predicted", "measured"))
            for runs in by_plan.values()
        ]
        if len(pairs) < 2:
            continue
        signs = [(1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1) for i, a in enumerate(pairs) for b in pairs[i + 1 :]]
        regret = min(pairs)[1] / min(p[1] for p in pairs) - 1
        tau = sum(signs) / len(signs)
        print(
            f"\n{example}: Kendall's tau over {len(pairs)} plans {tau:.2f}, "
            f"regret of the predicted best {100 * regret:.1f} %"
        )


def hardware() -> str:
    """The machine, without its name."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def slim(run: dict) -> dict:
    """What is worth keeping of a run: no paths, no losses."""
    return {key: run[key] for key in run if key not in ("report", "weights", "losses")}


if __name__ == "__main__":
    main()
