"""What a rank's LOAD costs: drawing a share, or taking it from processes that have made it ready, or waiting for them.

All of it is measured on the feed that a rank has in a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from executor.batch import Drawn, tensors
from executor.devices import Backend
from executor.feed import Feed, open_feed
from executor.layers import LayeredModel
from executor.model_file import ModelFile
from planner.values.profile import Loading, Timing

ROUNDS = 8
"""Shares of each size that are taken at most; the first is not counted."""
WORTH = 0.25
"""A worker process has to save this share of the making at least, beyond what it costs to take from it."""


class Loaded(NamedTuple):
    """`load` are seconds of LOAD by samples, `batch_bytes` bytes of inputs and targets, `loading` how data are made."""

    load: tuple[Timing, ...]
    batch_bytes: tuple[tuple[int, int, int], ...]
    loading: Loading | None


class _Taken(NamedTuple):
    seconds: list[float]
    busy: list[float]
    share: Drawn


def measure_loading(
    file: ModelFile,
    layered: LayeredModel,
    backend: Backend,
    sizes: Sequence[int],
    between: Callable[[], object],
    budget_s: float,
) -> Loaded:
    """Measure the loading of shares of each size, within about `budget_s`.

    `between` two shares the model computes, as it does in training: it evicts what the loading left in the caches.
    Raises `PlanError` when the data fail or have not one whole batch of the largest size.
    """
    each = budget_s / len(sizes) / (1 if file.data is None else 2)
    made = [_taken(file, backend, samples, 0, between, each) for samples in sizes]
    timings = tuple(Timing.of(n, taken.seconds) for n, taken in zip(sizes, made, strict=True))
    bytes_ = tuple(_bytes(layered, taken.share) for taken in made)
    if file.data is None:
        return Loaded(timings, bytes_, None)
    source, largest = file.data.source, made[-1]
    busy = min(1.0, sum(largest.busy) / (sum(largest.seconds) or 1.0))
    workers = source.workers or 0
    ready = [_taken(file, backend, n, workers or 1, between, each, taken) for n, taken in zip(sizes, made, strict=True)]
    if not workers:
        making, taking = (statistics.median(taken.seconds) for taken in (largest, ready[-1]))
        saved = making * (1.0 if backend.device.type != "cpu" else 1.0 - busy)
        workers = int(saved > taking + WORTH * making)
    workers = min(workers, 1) if source.streams else workers
    if workers:
        making_s, timings = timings, tuple(Timing.of(n, taken.seconds) for n, taken in zip(sizes, ready, strict=True))
    loading = Loading(workers=workers, making=making_s if workers else (), busy=busy, samples=source.samples or 0)
    return Loaded(timings, bytes_, loading)


def _taken(
    file: ModelFile,
    backend: Backend,
    samples: int,
    workers: int,
    between: Callable[[], object],
    budget_s: float,
    made: _Taken | None = None,
) -> _Taken:
    """Take shares of so many samples, each when it is ready: as long after the one before as one needs to be `made`."""
    feed: Feed = open_feed(file, samples, workers=workers, device=backend.device)
    wait = 1.2 * statistics.median(made.seconds) if made else 0.0
    seconds: list[float] = []
    busy: list[float] = []
    begun = time.monotonic()
    for i in range(ROUNDS):
        if i > 1 and time.monotonic() - begun > budget_s:
            break
        between()
        time.sleep(wait)
        begin, worked = time.monotonic(), time.process_time()
        share = feed.take().on(backend.device)
        backend.synchronize()
        seconds.append(time.monotonic() - begin)
        busy.append(time.process_time() - worked)
    feed.close()
    return _Taken(seconds[1:], busy[1:], share)


def _bytes(layered: LayeredModel, share: Drawn) -> tuple[int, int, int]:
    inputs, targets = layered.parted(share.inputs, share.targets)
    return share.samples, sum(t.nbytes for t in inputs), sum(t.nbytes for t in tensors(targets))
