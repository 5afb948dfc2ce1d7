"""What a user would write without foreplan: examples/gpt.py on torch's own pipelining, or under its DDP.

torchrun --nproc-per-node 2 by_hand.py 1f1b     (gpipe, data-parallel; prints the seconds from start to first step)
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
MODEL = Path(__file__).resolve().parents[2] / "examples" / "gpt.py"


def imported(path: Path = MODEL) -> ModuleType:
    """Import the model file as any script would."""
    spec = importlib.util.spec_from_file_location("by_hand_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage_of(model: Any, rank: int, ranks: int) -> nn.Module:
    """Return a run of the model's layers: as many blocks on every rank, with the embedding or the head at the ends."""
    share = len(model.blocks) // ranks
    layers: list[nn.Module] = list(model.blocks[rank * share : (rank + 1) * share])
    if rank == 0:
        layers.insert(0, model.embedding)
    if rank == ranks - 1:
        layers += [model.norm, model.head]
    return nn.Sequential(*layers)


def pipelined(file: ModuleType, schedule: str, microbatches: int, seed: int = 0) -> Callable[[], object]:
    """Return a training step of a pipeline over all ranks."""
    torch.manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = stage_of(file.model(), rank, ranks)
    optimizer = file.optimizer(module.parameters())
    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    runtime = SCHEDULES[schedule](stage, microbatches, lambda o, t: file.loss(o, t) / microbatches, scale_grads=False)

    def step() -> None:
        inputs, targets = file.batch(file.batch_size)
        runtime.step(*((inputs,) if rank == 0 else ()), target=targets if rank == ranks - 1 else None, losses=[])
        optimizer.step()
        optimizer.zero_grad()

    return step


def replicated(file: ModuleType, microbatches: int, seed: int = 0) -> Callable[[], object]:
    """Return a training step of DDP, which adds up gradients over its share of the micro-batches."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(file.model())
    optimizer = file.optimizer(model.parameters())
    share = microbatches // dist.get_world_size()

    def step() -> None:
        inputs, targets = file.batch(file.batch_size // dist.get_world_size())
        parts = list(zip(inputs.chunk(share), targets.chunk(share), strict=True))
        for x, y in parts[:-1]:
            with model.no_sync():
                (file.loss(model(x), y) / share).backward()
        x, y = parts[-1]
        (file.loss(model(x), y) / share).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(file: ModuleType, kind: str, microbatches: int) -> Callable[[], object]:
    """Return the training step of one kind."""
    return replicated(file, microbatches) if kind == "data-parallel" else pipelined(file, kind, microbatches)


def main() -> None:
    """Train one step, and say how long it took from the start of the command."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step = step_of(imported(), sys.argv[1], int(sys.argv[2]))
    step()
    if dist.get_rank() == 0:
        print(f"first step done at {time.monotonic()}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
