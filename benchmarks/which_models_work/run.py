"""Which models go through profile, simulate and run unmodified, and do they train as a plain loop trains them?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from executor.feed import open_feed
from executor.layers import cut
from executor.model_file import load
from planner.basis.errors import PlanError
from planner.store import Run, Store

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models.py"
STEPS, MICROBATCHES, BATCH = 5, 2, 8
TOLERANCE = 1e-6
"""Relative difference of every step's loss."""


NAMES = (
    *("gpt2", "llama", "qwen2", "mixtral", "mamba", "bert", "distilbert", "t5", "whisper", "vit", "resnet_hf"),
    *("resnet50", "vit_torchvision", "convnext", "unet"),
    *("nn_transformer", "lstm", "siamese", "tied"),
)


def main() -> int:
    """Try the models that are named, or all; return 7 when one that can be tried does not work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help="Models of models.py; default: all.")
    parser.add_argument("--plan", default="gpipe-k2-m2", help="The plan that is run.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    titles = (
        "captured",
        "layers",
        "cut points",
        "stays whole",
        "profiled",
        "simulated",
        "run at K = 2",
        "loss differs by",
    )
    print("|", " | ".join(("model", *titles)), "|")
    print("|---|--:|--:|--:|---|--:|---|---|--:|")
    failed = 0
    for name in chosen.names:
        row = _tried(name, chosen.plan)
        failed += row[-1] not in ("equal", "not installed")
        print("|", " | ".join([name, *row[:-1]]), "|", flush=True)
    return 7 if failed else 0


def _tried(name: str, plan: str) -> list[str]:
    """One row of the table, and in a word how it ended."""
    path = f"{MODELS}:{name}"
    row = ["-"] * 8
    try:
        file = load(path)
        model = file.build(0)
        began = time.monotonic()
        layered = cut(file, model)
        row[0] = f"{time.monotonic() - began:.1f} s"
        row[1], row[2] = str(len(layered.layers)), str(len(layered.layers) - 1)
        row[3] = ", ".join(path or "the model" for path, _ in layered.opaque) or "nothing"
    except PlanError as error:
        missing = "ModuleNotFoundError" in error.why
        row[0] = "not installed" if missing else f"{error.what}: {error.why}"
        return [*row, "not installed" if missing else "not captured"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        for place, words in (
            (4, ["profile", path, "--sizes", "1,2,4", "--budget", "2"]),
            (5, ["simulate", "--k", "2", "--m", str(MICROBATCHES), "--batch", str(BATCH)]),
            (6, ["run", plan, "--steps", str(STEPS)]),
        ):
            found = _plan(words, folder)
            if found is None or "error" in found:
                row[place] = found["error"]["what"] if found else "failed"
                return [*row, words[0]]
            row[place] = f"{time.monotonic() - began:.0f} s" if place == 4 else "yes"
        _, run = Store(Path(folder) / ".plan").load_run()
    worst = max(abs(a - b) / abs(b) for a, b in zip(run.measured.losses, _plain(path, run), strict=True))
    row[7] = f"{worst:.1e}"
    return [*row, "equal" if worst <= TOLERANCE else "other losses"]


def _plan(words: list[str], folder: str) -> dict[str, Any] | None:
    """What a command answers, run as a user runs it."""
    command = [sys.executable, "-W", "ignore", "-c", "from planner.cli.main import main; main()", *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    text = done.stdout if done.returncode == 0 else done.stderr
    try:
        return dict(json.loads(text[text.index("{") :]))
    except ValueError:
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        return None


def _plain(path: str, run: Run) -> list[float]:
    """The losses of the same steps in a plain loop that accumulates gradients over the same micro-batches."""
    plan, file = run.measured.plan, load(path)
    model = file.build(0)
    optimizer = file.optimizer_of((name, p) for name, p in model.named_parameters() if p.requires_grad)
    assert optimizer is not None
    losses, feed = [], open_feed(file, BATCH)
    for _ in range(STEPS):
        drawn = feed.take()
        total = 0.0
        for part in drawn.split(plan.microbatches):
            args, keywords = part.arguments()
            loss = file.loss(model(*args, **keywords), part.targets) / plan.microbatches
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    sys.exit(main())
