"""What a profile measures of a model file's data: how long a batch is made, who makes it, and its bytes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from executor.devices import open_device
from executor.layers import cut
from executor.model_file import load
from profiles.loading import Loaded, measure_loading

MODEL = """
import time
import torch
from torch import nn
from torch.utils.data import *

def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

class Numbers(Dataset):
    def __init__(self, seconds=0.0): self.seconds = seconds
    def __len__(self): return 21
    def __getitem__(self, i):
        time.sleep(self.seconds)
        return torch.full((3,), float(i)), i % 2
"""


def measured(folder: Path, more: str) -> Loaded:
    (folder / "model.py").write_text(MODEL + more)
    file = load(str(folder / "model.py"))
    layered = cut(file, file.build(0))
    return measure_loading(file, layered, open_device("cpu"), [2, 8], lambda: None, 0.5)


def test_what_waits_is_made_by_a_worker(tmp_path: Path) -> None:
    found = measured(tmp_path, "def data(): return DataLoader(Numbers(0.05), batch_size=8)")
    assert found.loading is not None
    assert found.loading.workers == 1
    assert [timing.samples for timing in found.loading.making] == [timing.samples for timing in found.load] == [2, 8]
    assert all(timing.median_s >= 0.05 * timing.samples for timing in found.loading.making)
    assert found.loading.busy < 0.5
    assert found.loading.samples == 21
    assert found.batch_bytes == ((2, 2 * 3 * 4, 2 * 8), (8, 8 * 3 * 4, 8 * 8))


def test_what_computes_is_not_moved_to_a_worker_on_the_same_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "process_time", time.monotonic)  # a core is busy all the time, whatever else runs here
    found = measured(tmp_path, "def data(): return Numbers()\nbatch_size = 8")
    assert found.loading is not None
    assert (found.loading.workers, found.loading.making, found.loading.busy) == (0, (), 1.0)


@pytest.mark.parametrize(("data", "workers"), [("Numbers()", 2), ("Stream()", 1)])
def test_the_user_s_workers_are_used(data: str, workers: int, tmp_path: Path) -> None:
    stream = "class Stream(IterableDataset):\n    def __iter__(self): return (Numbers()[i] for i in range(21))\n"
    found = measured(tmp_path, f"{stream}def data(): return DataLoader({data}, 8, num_workers=2)")
    assert found.loading is not None
    assert found.loading.workers == workers
    assert found.loading.samples == (0 if workers == 1 else 21)


def test_drawn_batches_are_not_made_by_anybody_else(tmp_path: Path) -> None:
    found = measured(tmp_path, "def batch(n): return torch.ones(n, 3), torch.ones(n, dtype=torch.int64)")
    assert found.loading is None
    assert [timing.samples for timing in found.load] == [2, 8]
