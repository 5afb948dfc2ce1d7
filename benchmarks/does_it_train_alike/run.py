"""Does `plan run best --epochs` train as a plain loop trains? Two models of transformers on data that is installed."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from planner.store import Store
from planner.values.plan import Plan

HERE = Path(__file__).resolve().parent
MODELS = ("gpt2", "vit")
TOLERANCE = 1e-6
"""Relative difference of any update's loss in float32."""
NUDGES, ROOM = (-4e-7, -2e-7, 2e-7, 4e-7), 3.0
"""In bf16 a rounding that falls otherwise moves a weight by 2^-9 of itself, and training amplifies that. So the plain
loop is run again there with its first weights larger by these shares, a few units in the last place, and `plan run` may
differ by `ROOM` times as much as those do. Until the first rounding that falls otherwise it is equal."""
SHOWN = 8
"""Steps of a curve in the table."""


def main() -> int:
    """Train the models that are named, or all; return 7 where a loss is another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=MODELS, help="gpt2, vit; default: both.")
    parser.add_argument("--plan", default="best", help="The plan that is run.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="Keep profiles, runs and pages in this folder.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for name in chosen.names:
        with contextlib.ExitStack() as stack:
            folder = chosen.keep / name if chosen.keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            failed += not _alike(name, folder, chosen.plan, chosen.epochs)
    return 7 if failed else 0


def _alike(name: str, folder: Path, plan: str, epochs: int) -> bool:
    """Train a model both ways, print the curves and say whether they are one."""
    path = HERE / f"{name}.py"
    _plan(["profile", str(path), "--sizes", "2,4,8"], folder)
    _plan(["simulate", "--k", "2", "--m", "4"], folder)
    _plan(["run", plan, "--epochs", str(epochs)], folder)
    _, run = Store(folder / ".plan").load_run()
    ours = list(run.measured.losses)
    plain = _plain(path, run.measured.plan, epochs)
    worst, room = _farthest(ours, plain), TOLERANCE
    print(f"\n### {name}: {run.measured.plan}, {len(ours)} updates\n")
    print("| update | plain loop | plan run | differs by |\n|--:|--:|--:|--:|")
    for i in sorted({round(j * (len(ours) - 1) / (SHOWN - 1)) for j in range(SHOWN)}):
        print(f"| {i + 1} | {plain[i]:.6f} | {ours[i]:.6f} | {abs(ours[i] - plain[i]) / abs(plain[i]):.1e} |")
    print(f"\nlargest difference of any update's loss: {worst:.1e}")
    if hasattr(_imported(path), "precision"):
        floor = max(_farthest(_plain(path, run.measured.plan, epochs, nudge), plain) for nudge in NUDGES)
        equal = next((i for i, pair in enumerate(zip(ours, plain, strict=True)) if pair[0] != pair[1]), len(ours))
        print(f"updates until then that are equal bit for bit: {equal}")
        print(f"of the plain loop from itself, with other last places in its first weights: {floor:.1e}")
        room = ROOM * floor
    for found in run.measured.evaluations:
        metrics = ", ".join(f"{metric} {value:.3f}" for metric, value in found.metrics.items())
        print(f"validation at update {found.step}: loss {found.loss:.6f} {metrics}")
    return worst <= room


def _farthest(losses: list[float], plain: list[float]) -> float:
    """The largest relative difference of any update's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))


def _plan(words: list[str], folder: Path) -> None:
    """Run a command as a user runs it. Raises `SystemExit` with its words where it fails."""
    command = [sys.executable, "-W", "ignore", "-c", "from planner.cli.main import main; main()", *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"plan {' '.join(words)}: {done.stdout}{done.stderr}")


def _imported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _plain(path: Path, plan: Plan, epochs: int, nudge: float = 0.0) -> list[float]:
    """The losses of a plain loop: torch alone, which accumulates gradients over as many micro-batches."""
    file = _imported(path)
    torch.manual_seed(0)
    model = file.model().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge)
    replicas = plan.replicas
    loaders = [_loader(file.data(), plan.batch // replicas, replicas, r) for r in range(replicas)]
    wants_names = "named" in file.optimizer.__code__.co_varnames[0]
    optimizer = file.optimizer(list(model.named_parameters()) if wants_names else list(model.parameters()))
    scheduler = file.scheduler(optimizer)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=getattr(file, "precision", "") == "bf16")
    parts, losses = plan.microbatches // replicas, []
    for epoch in range(epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for shares in zip(*loaders, strict=True):
            total = 0.0
            for share in shares:
                for part in _split(share, parts):
                    with mixed:
                        loss = _loss(file, model, part) / (parts * replicas)
                    loss.backward()
                    total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), file.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(total)
    return losses


def _loader(loader: DataLoader[Any], batch: int, replicas: int, replica: int) -> DataLoader[Any]:
    sampler = DistributedSampler(loader.dataset, replicas, replica, shuffle=True, seed=0, drop_last=True)
    return DataLoader(loader.dataset, batch, sampler=sampler, collate_fn=loader.collate_fn, drop_last=True)


def _split(share: Any, parts: int) -> list[Any]:
    if isinstance(share, dict):
        pieces = {key: tensor.chunk(parts) for key, tensor in share.items()}
        return [{key: pieces[key][i] for key in pieces} for i in range(parts)]
    inputs, targets = share
    return list(zip(_split(inputs, parts), targets.chunk(parts), strict=True))


def _loss(file: Any, model: torch.nn.Module, part: Any) -> torch.Tensor:
    if isinstance(part, dict):
        loss: torch.Tensor = model(**part).loss
        return loss
    inputs, targets = part
    own: torch.Tensor = file.loss(model(**inputs), targets)
    return own


if __name__ == "__main__":
    sys.exit(main())
