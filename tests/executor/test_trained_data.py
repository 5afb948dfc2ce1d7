"""Real ranks that train on `data()` against a plain loop with a DataLoader: the same samples, the same losses."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from executor.feed import open_feed
from executor.launch import launch
from executor.model_file import load
from planner.values.plan import Plan, Stage
from tests.executor.jobs import SEED, Case, Cases, main

MODEL = """
import random
import torch
from torch import nn
from torch.utils.data import *

def model():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

class Numbers(Dataset):
    def __len__(self): return 37
    def __getitem__(self, i): return torch.tensor([float(i), i / 37, i % 5]), torch.tensor([i % 3, i / 37])

class Noisy(Numbers):
    def __getitem__(self, i):
        drawn = torch.tensor([torch.rand(()).item(), random.random()])
        return torch.tensor([float(i), *drawn]), drawn

class Stream(IterableDataset):
    def __iter__(self): return (Noisy()[i] for i in range(37))

def plain_data(): return DataLoader(Numbers(), batch_size=8, shuffle=True)
plain = workers = noisy = stream = model
def workers_data(): return DataLoader(Numbers(), batch_size=8, shuffle=True, num_workers=2)
def noisy_data(): return DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=1)
def stream_data(): return DataLoader(Stream(), batch_size=8, num_workers=1)
"""
LAYERS, BATCH, MICROBATCHES, STEPS, EPOCH = tuple("01234"), 8, 4, 8, 4


def plan_of(stages: int, replicas: int) -> Plan:
    parts = (LAYERS,) if stages == 1 else (LAYERS[:2], LAYERS[2:])
    return Plan(
        strategy="1f1b",
        schedule="1f1b",
        stages=tuple(
            Stage(layers=part, devices=tuple(f"d{r * stages + s}" for r in range(replicas)))
            for s, part in enumerate(parts)
        ),
        microbatches=MICROBATCHES,
        batch=BATCH,
    )


def plain(path: str, replicas: int) -> tuple[list[list[torch.Tensor]], list[float]]:
    """What each replica sees in every step of two epochs, and the losses, as a plain loop has them."""
    file = load(path)
    model = file.build(SEED)
    optimizer = file.optimizer(model.parameters())
    if path.endswith(("plain", "workers")):
        assert file.data is not None
        dataset = file.data.source.dataset
        samplers = [DistributedSampler(dataset, replicas, r, shuffle=True, seed=SEED) for r in range(replicas)]
        loaders = [DataLoader(dataset, BATCH // replicas, sampler=own, drop_last=True) for own in samplers]
        steps = []
        for epoch in range(2):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            steps += list(zip(*loaders, strict=True))[:EPOCH]
    else:  # what a dataset draws is the feed's own: no loader has it the same twice
        feeds = [
            open_feed(file, BATCH // replicas, replicas=replicas, replica=r, seed=SEED, workers=0)
            for r in range(replicas)
        ]
        steps = [[(share.given, share.targets) for share in (f.take() for f in feeds)] for _ in range(STEPS)]
    seen, losses = [], []
    for shares in steps:
        total = 0.0
        parts = [part for x, y in shares for part in zip(x.chunk(4 // replicas), y.chunk(4 // replicas), strict=True)]
        for x, y in parts:
            loss = file.loss(model(x), y) / len(parts)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        seen.append([x for x, _ in shares])
        losses.append(total)
    return seen, losses


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_sees_and_learns_what_a_plain_loop_does(ranks: int, tmp_path: Path) -> None:
    """On one device, in a pipeline, with replicas, over two epochs; samples that draw are the same at both ends."""
    (tmp_path / "model.py").write_text(MODEL)
    path = str(tmp_path / "model.py")
    shapes = {
        1: {"plain": [(1, 1)], "noisy": [(1, 1)]},
        2: {"plain": [(1, 2)], "workers": [(2, 1), (1, 2)], "noisy": [(2, 1), (1, 2)], "stream": [(2, 1), (1, 2)]},
    }[ranks]
    cases = tuple(
        Case(name=f"{name}-{stages}", model=f"{path}:{name}", plan=plan_of(stages, replicas), steps=STEPS)
        for name, own in shapes.items()
        for stages, replicas in own
    )
    spec = tmp_path / "cases.json"
    spec.write_bytes(msgspec.json.encode(Cases(folder=str(tmp_path), cases=cases)))
    launch(main, str(spec), ranks, tmp_path / "logs")
    for case in cases:
        seen, losses = plain(case.model, case.plan.replicas)
        found = [torch.load(tmp_path / f"{case.name}.{rank}.pt", weights_only=True) for rank in range(ranks)]
        for rank, row in enumerate(case.plan.devices):
            stage = next(s for s, own in enumerate(case.plan.stages) if row in own.devices)
            replica = case.plan.stages[stage].devices.index(row)
            expected = [shares[replica] for shares in seen]
            assert all(map(torch.equal, found[rank]["taken"], expected)), case.name
            assert len(found[rank]["taken"]) == STEPS
        total = [sum(step) for step in zip(*(own["history"] for own in found), strict=True)]
        assert total == pytest.approx(losses, rel=1e-6), case.name
