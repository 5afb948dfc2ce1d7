"""What `data()` returns reaches a step as a plain loop with DataLoader and DistributedSampler would have it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from executor.feed import Dealt, dealt, open_feed
from executor.model_file import ModelFile, load
from planner.basis.errors import PlanError

MODEL = """
import itertools, random
import numpy as np
import torch
from torch import nn
from torch.utils.data import *

def model():
    return nn.Linear(3, 2)

class Numbers(Dataset):
    def __init__(self, size=37): self.size = size
    def __len__(self): return self.size
    def __getitem__(self, i): return torch.tensor([float(i), 0.0, 1.0]), i % 2

class Noisy(Numbers):
    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item(), random.random() + np.random.rand()]), i % 2

class Counting(IterableDataset):
    def __init__(self, size=37, first=0, every=1): self.size, self.first, self.every = size, first, every
    def __iter__(self):
        for i in range(self.first, self.size, self.every):
            yield torch.tensor([float(i), torch.rand(()).item(), 0.0]), 0
"""
Make = Callable[[str], ModelFile]


@pytest.fixture
def written(tmp_path: Path) -> Make:
    def make(more: str) -> ModelFile:
        path = tmp_path / "model.py"
        path.write_text(f"{MODEL}\n{more}\n")
        return load(str(path))

    return make


def seen(feed: Any, steps: int) -> list[list[int]]:
    """The numbers of the samples of each step."""
    return [feed.take().inputs[0][:, 0].int().tolist() for _ in range(steps)]


def batches(loader: DataLoader[Any]) -> list[list[int]]:
    return [inputs[:, 0].int().tolist() for inputs, _ in loader]


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [False, True])
def test_replicas_have_what_distributed_sampler_gives_them(replicas: int, shuffle: bool, written: Make) -> None:
    file = written(f"def data(): return DataLoader(Numbers(), batch_size=8, shuffle={shuffle})")
    dataset = file.data.source.dataset  # type: ignore[union-attr]
    together = []
    for replica in range(replicas):
        feed = open_feed(file, 8 // replicas, replicas=replicas, replica=replica, seed=5)
        sampler = DistributedSampler(dataset, replicas, replica, shuffle=shuffle, seed=5)
        loader = DataLoader(dataset, 8 // replicas, sampler=sampler, drop_last=True)
        expected = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            expected += batches(loader)[: feed.steps]
        assert feed.steps == 4
        found = seen(feed, 8)
        assert found == expected
        feed.set_epoch(1)
        assert seen(feed, 2) == expected[4:6]
        together.append(found)
    one = seen(open_feed(file, 8, seed=5), 8)
    assert [sorted(chain(*step)) for step in zip(*together, strict=True)] == [sorted(step) for step in one]


def test_one_replica_is_a_plain_loader_with_a_seeded_generator(written: Make) -> None:
    feed = open_feed(written("def data(): return Numbers()"), 8, seed=5)  # a dataset without a loader is shuffled
    generator = torch.Generator()
    dataset = feed.shares.source.dataset  # type: ignore[attr-defined]
    loader = DataLoader(dataset, 8, sampler=RandomSampler(dataset, generator=generator), drop_last=True)
    expected = []
    for epoch in range(2):
        generator.manual_seed(5 + epoch)
        expected += batches(loader)
    assert seen(feed, 8) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        "shuffle=True, generator=torch.Generator().manual_seed(7)",
        "sampler=WeightedRandomSampler([1.0] * 30 + [5.0] * 7, 40, generator=torch.Generator().manual_seed(7))",
        "sampler=SubsetRandomSampler(range(3, 30), generator=torch.Generator().manual_seed(7))",
    ],
)
def test_a_loader_with_its_own_order_keeps_it(sampling: str, written: Make) -> None:
    file = written(f"def data(): return DataLoader(Numbers(), batch_size=8, drop_last=True, {sampling})")
    loader = file.data.make()  # type: ignore[union-attr]
    expected = [batches(loader) for _ in range(3)]
    feed = open_feed(file, 8, seed=5)
    assert feed.steps == len(expected[0])
    assert seen(feed, 2 * feed.steps) == expected[0] + expected[1]
    feed.set_epoch(2)
    assert seen(feed, 1) == expected[2][:1]
    feed.set_epoch(0)
    assert seen(feed, 1) == expected[0][:1]
    shares = [seen(open_feed(file, 4, replicas=2, replica=r, seed=5), 2) for r in range(2)]
    assert shares == [[step[r::2] for step in expected[0][:2]] for r in range(2)]


def test_a_sampler_that_draws_gives_all_ranks_one_order(written: Make) -> None:
    file = written("def data(): return DataLoader(Numbers(), 8, sampler=WeightedRandomSampler([1.0] * 37, 40))")
    torch.manual_seed(1)
    first = seen(open_feed(file, 8, seed=5), 10)
    torch.manual_seed(2)
    assert seen(open_feed(file, 8, seed=5), 10) == first
    assert first[:5] != first[5:]


@pytest.mark.parametrize("data", ["Noisy()", "DataLoader(Noisy(), 8, num_workers=2)"])
def test_what_samples_draw_depends_on_their_place_alone(data: str, written: Make) -> None:
    """Two processes of a replica see the same, with workers or without; the training's own generator stays as it is."""
    file = written(f"def data(): return {data}")
    states = torch.get_rng_state()

    def taken(replica: int, workers: int | None) -> list[torch.Tensor]:
        feed = open_feed(file, 4, replicas=2, replica=replica, seed=5, workers=workers)
        found = [feed.take().inputs[0] for _ in range(6)]
        feed.close()
        return found

    one, two, other = taken(0, 0), taken(0, None), taken(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    drawn = torch.cat([*one, *other])[:, 1:]
    assert len(drawn.unique(dim=0)) == len(drawn)
    assert torch.equal(states, torch.get_rng_state())


def test_both_functions_split_a_dataset_alike(written: Make) -> None:
    file = written(
        "def data(): return random_split(Numbers(), [25, 12])[0]\n"
        "def evaluate(): return DataLoader(random_split(Numbers(), [25, 12])[1], 4, shuffle=False)"
    )
    assert file.evaluate is not None
    judged = dealt(file, file.evaluate, 4)
    trained = seen(open_feed(file, 5), 5)
    assert judged.steps == 3
    assert sorted(chain(*trained, *seen(judged, 3))) == list(range(37))


@pytest.mark.parametrize("workers", [0, 3])
def test_replicas_take_a_stream_s_samples_in_turn(workers: int, written: Make) -> None:
    file = written("def data(): return Counting()")
    feeds = [open_feed(file, 4, replicas=2, replica=r, seed=5, workers=workers) for r in range(2)]
    first, second = (seen(feed, 5) for feed in feeds)
    assert first[:4] == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22], [24, 26, 28, 30]]
    assert second[:4] == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23], [25, 27, 29, 31]]
    assert (first[4], second[4]) == (first[0], second[0])  # what is left is no whole step: the stream begins anew
    assert [feed.steps for feed in feeds] == [None, None]
    for feed in feeds:
        feed.close()


def test_a_stream_that_shards_itself_is_asked(written: Make) -> None:
    file = written(
        "class Sharded(Counting):\n"
        "    def __len__(self): return len(range(self.first, self.size, self.every))\n"
        "    def shard(self, num_shards, index): return Sharded(self.size, index, num_shards)\n"
        "    def set_epoch(self, epoch): self.first += 100 * epoch; self.size += 100 * epoch\n"
        "def data(): return Sharded(17)"
    )
    feeds = [open_feed(file, 4, replicas=2, replica=r, seed=5) for r in range(2)]
    assert [feed.steps for feed in feeds] == [2, 2]  # one replica has 9 samples, the other 8
    first, second = (seen(feed, 3) for feed in feeds)
    assert first == [[0, 2, 4, 6], [8, 10, 12, 14], [100, 102, 104, 106]]
    assert second == [[1, 3, 5, 7], [9, 11, 13, 15], [101, 103, 105, 107]]


def test_the_loader_says_how_samples_go_together(written: Make) -> None:
    file = written(
        "def together(items):\n"
        "    return {'x': torch.stack([x for x, _ in items]), 'labels': torch.tensor([y for _, y in items])}\n"
        "def data(): return DataLoader(Numbers(), batch_size=8, collate_fn=together)"
    )
    taken = open_feed(file, 8).take()
    assert taken.names == ("x", "labels")
    assert taken.targets is None
    assert taken.given["labels"].tolist() == [i % 2 for i in range(8)]
    assert file.batch_size == 8
    assert file.drawn(3, 0).given["x"][:, 0].tolist() == [0, 1, 2]


def test_samples_are_fetched_together_where_that_is_quicker(written: Make) -> None:
    file = written(
        "class Quick(Numbers):\n"
        "    def __getitem__(self, i): raise NotImplementedError\n"
        "    def __getitems__(self, some): return [Numbers.__getitem__(self, i) for i in some]\n"
        "def data(): return DataLoader(Quick(), batch_size=8)"
    )
    assert seen(open_feed(file, 8), 1) == [list(range(8))]


BAD = [
    ("def data(): return Numbers(7)", "data() has fewer samples than one step's batch", "it has 7, and a batch is 8"),
    (
        "def data(): return DataLoader(Numbers(), 8, sampler=SubsetRandomSampler(range(5)))",
        "data() has fewer samples than one step's batch",
        "it has 5, and a batch is 8",
    ),
    ("def data(): return Counting(5)", "data() has fewer samples than one step's batch", "it has 5, and a batch is 8"),
    (
        "class Bad(Numbers):\n"
        "    def __getitem__(self, i): return torch.ones(3) / (i != 6), 1 // (i != 6)\n"
        "def data(): return DataLoader(Bad(), batch_size=8)",
        "sample 6 of data() fails",
        "ZeroDivisionError",
    ),
    (
        "class Bad(Numbers):\n    def __getitem__(self, i): return torch.ones(3 + i // 4), 1\n"
        "def data(): return DataLoader(Bad(), batch_size=8)",
        "the samples of data() cannot be put into one batch",
        "samples are of shape (3,) and of shape (4,)",
    ),
    (
        "class Bad(Numbers):\n    def __getitem__(self, i): return torch.ones(3 + (i > 7)), 1\n"
        "def data(): return DataLoader(Bad(), batch_size=8)",
        "other shapes than those that the plan was made for",
        "its samples are float32 (4,), int64 () where float32 (3,), int64 () are expected",
    ),
    ("def data(): return 'digits'", "data() returns no dataset", "it returns str"),
    ("def data(): pass", "data() returns no dataset", "it returns NoneType"),
    ("def data(): return iter(())", "data() returns no dataset", "it returns tuple_iterator"),
    ("def data(): return open('nowhere')", "data() fails", "FileNotFoundError"),
    (
        "def data(): return DataLoader(Numbers(), batch_size=None)",
        "the DataLoader of data() makes its batches itself",
        "batch_size=None",
    ),
    (
        "class Own(BatchSampler): pass\n"
        "def data(): return DataLoader(Numbers(), batch_sampler=Own(range(9), 3, False))",
        "the DataLoader of data() makes its batches itself",
        "a batch_sampler",
    ),
    (
        "class Own(DataLoader):\n    def __iter__(self): return iter(())\n"
        "def data(): return Own(Numbers(), batch_size=8)",
        "the DataLoader of data() makes its batches itself",
        "an __iter__ of its own, as a Own",
    ),
    (
        "batch_size = 16\ndef data(): return DataLoader(Numbers(), batch_size=8)",
        "two sizes of a step's batch",
        "batch_size is 16, and the DataLoader of data() has 8",
    ),
    (
        "def data(): return DataLoader(Numbers(), 8, sampler=(i for i in range(9)))",
        "nobody knows how many samples",
        "generator, has no length",
    ),
    ("def data(): return [torch.ones(3)] * 20", "no pairs of inputs and targets", "a batch of them is a Tensor"),
    (
        "def data(): return DataLoader(Numbers(), 8, collate_fn=lambda items: (torch.ones(3, 3), torch.ones(3)))",
        "has other than",
        "an input is (3, 3)",
    ),
    (
        "def short(items): return torch.ones(len(items), 3), torch.ones(len(items) - 1)\n"
        "def data(): return DataLoader(Numbers(), 8, collate_fn=short)",
        "has other than",
        "a target is (",
    ),
    (
        "def one(items): return torch.ones(len(items), 3), {'class': torch.tensor(1)}\n"
        "def data(): return DataLoader(Numbers(), 8, collate_fn=one)",
        "has other than",
        "a target is ()",
    ),
    (
        "class Short(Counting):\n    def __len__(self): return 90\n"
        "def data(): return Short()",
        "the stream of data() ends before its epoch does",
        "37 samples where its length says 90",
    ),
    (
        "class Uneven(Counting):\n"
        "    def __len__(self): return 40\n"
        "    def shard(self, num_shards, index): return Uneven(37 - 9 * index)\n"
        "def data(): return Uneven()",
        "the stream of data() ends before its epoch does",
        "28 samples where its length says 40",
    ),
]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("more", "what", "why"), BAD)
def test_what_is_wrong_with_data_is_said(more: str, what: str, why: str, workers: int, written: Make) -> None:
    def trained() -> None:
        file, replicas = written(more), 2 if "num_shards" in more else 1
        feed = open_feed(file, 8 // replicas, replicas=replicas, replica=replicas - 1, workers=workers)
        try:
            seen(feed, 12)
        finally:
            feed.close()

    with pytest.raises(PlanError) as raised:
        trained()
    assert what in raised.value.what
    assert why in raised.value.why
    assert "model.py" in raised.value.where
    assert raised.value.fix


def test_measuring_wants_no_more_samples_than_there_are(written: Make) -> None:
    file = written("def data(): return Numbers(7)")
    assert file.batch_size == 64
    with pytest.raises(PlanError, match="fewer samples than one step's batch"):
        file.drawn(8, seed=0)


def test_what_is_measured_is_fetched_once(written: Make) -> None:
    file = written(
        "asked = []\n"
        "class Dear(Noisy):\n"
        "    def __getitem__(self, i):\n        asked.append(i)\n        return super().__getitem__(i)\n"
        "def data(): return Dear()"
    )
    two, eight = file.drawn(2, seed=0), file.drawn(8, seed=1)
    assert torch.equal(file.drawn(2, seed=3).inputs[0], two.inputs[0])
    assert torch.equal(eight.inputs[0][:2], two.inputs[0])
    assert file.data is not None
    assert file.data.make.__globals__["asked"] == [0, 1, *range(8)]


def test_a_file_may_have_a_variable_called_data(written: Make) -> None:
    assert written("data = [1]\ndef batch(n): return torch.ones(n, 3), torch.ones(n, 2)").data is None


def _holding(file: ModelFile, pids: Any) -> None:
    feed = open_feed(file, 8, workers=2)
    feed.take()
    pids.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def test_nothing_is_left_of_a_process_that_is_killed(written: Make) -> None:
    file = written("def data(): return Numbers()")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_holding, args=(file, there))
    process.start()
    workers = here.recv()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    until = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(workers) == 2
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_feed_that_nobody_holds_is_gone(written: Make) -> None:
    """No circle leaves it to the garbage collector, which closes the pipes of its workers before they are told."""
    file = written("def data(): return DataLoader(Numbers(), batch_size=8, num_workers=1)")
    gc.disable()
    try:
        feed = open_feed(file, 8)
        feed.take()
        gone = weakref.ref(feed)
        del feed
        assert gone() is None
    finally:
        gc.enable()


def test_a_closed_feed_has_ended_its_workers(written: Make) -> None:
    feed = open_feed(written("def data(): return Numbers()"), 8, workers=2)
    feed.take()
    assert isinstance(feed, Dealt)
    assert len(multiprocessing.active_children()) == 2
    feed.set_epoch(3)
    feed.take()
    assert len(multiprocessing.active_children()) == 2
    feed.close()
    assert not multiprocessing.active_children()
