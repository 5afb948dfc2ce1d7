"""What a rank's LOAD costs: drawing a share, or taking it from processes that have made it ready, or waiting for them.

All of it is measured on the feed that a rank has in a run. What copying to a device takes follows from its link to the
host's memory, which is the machine's (`profiles.machine`).
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
LEAST = 2
"""Shares of each size that are taken at least."""
WORTH = 0.25
"""A worker process has to save this share of the making at least, beyond what it costs to take from it."""


class Loaded(NamedTuple):
    """`load` are seconds of LOAD by samples, `batch_bytes` bytes of inputs and targets, `loading` how data are made.

    Sizes that were `left_out` for want of time follow from smaller ones, in proportion.
    """

    load: tuple[Timing, ...]
    batch_bytes: tuple[tuple[int, int, int], ...]
    loading: Loading | None
    left_out: tuple[int, ...] = ()


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
    """Measure the loading of shares of each size, of as many as there is time for within `budget_s`: of one at least.

    `between` two shares the model computes, as it does in training: it evicts what the loading left in the caches.
    Raises `PlanError` when the data fail or have not one whole batch of the largest size.
    """
    begun, kinds = time.monotonic(), 1 if file.data is None else 2
    made: list[_Taken] = []
    for samples in sizes:
        if made:
            expected = kinds * LEAST * statistics.median(made[-1].seconds) * samples / made[-1].share.samples
            if time.monotonic() - begun + expected > budget_s:
                break
        made.append(_taken(file, backend, samples, 0, between, budget_s / len(sizes) / kinds))
    sizes, left_out = sizes[: len(made)], tuple(sizes[len(made) :])
    timings = tuple(Timing.of(n, taken.seconds) for n, taken in zip(sizes, made, strict=True))
    bytes_ = tuple(_bytes(layered, taken.share) for taken in made)
    last, inputs, targets = bytes_[-1]
    bytes_ += tuple((n, inputs * n // last, targets * n // last) for n in left_out)
    if file.data is None:
        return Loaded(_longer(timings, left_out), bytes_, None, left_out)
    source, largest = file.data.source, made[-1]
    busy = min(1.0, sum(largest.busy) / (sum(largest.seconds) or 1.0))
    workers = source.workers or 0
    each = max(0.0, budget_s - (time.monotonic() - begun)) / len(sizes)
    ready = [_taken(file, backend, n, workers or 1, between, each, taken) for n, taken in zip(sizes, made, strict=True)]
    if not workers:
        making, taking = (statistics.median(taken.seconds) for taken in (largest, ready[-1]))
        saved = making * (1.0 if backend.device.type != "cpu" else 1.0 - busy)
        workers = int(saved > taking + WORTH * making)
    workers = min(workers, 1) if source.streams else workers
    if workers:
        making_s, timings = timings, tuple(Timing.of(n, taken.seconds) for n, taken in zip(sizes, ready, strict=True))
    loading = Loading(
        workers=workers,
        making=_longer(making_s, left_out) if workers else (),
        busy=busy,
        samples=source.samples or 0,
    )
    return Loaded(_longer(timings, left_out), bytes_, loading, left_out)


def _longer(timings: tuple[Timing, ...], more: Sequence[int]) -> tuple[Timing, ...]:
    """Return timings, and behind them those of more samples in proportion to the last."""
    last = timings[-1]
    return (*timings, *(last.scaled(n / last.samples, samples=n) for n in more))


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
        if i >= LEAST and time.monotonic() - begun > budget_s:
            break
        between()
        time.sleep(wait)
        begin, worked = time.monotonic(), time.process_time()
        share = feed.take()
        seconds.append(time.monotonic() - begin)
        busy.append(time.process_time() - worked)
    feed.close()
    return _Taken(seconds[1:], busy[1:], share)


def _bytes(layered: LayeredModel, share: Drawn) -> tuple[int, int, int]:
    inputs, targets = layered.parted(share.inputs, share.targets)
    return share.samples, sum(t.nbytes for t in inputs), sum(t.nbytes for t in tensors(targets))
