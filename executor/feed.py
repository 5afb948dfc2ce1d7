"""What a rank's LOAD takes its replica's share of a step's batch from."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from executor.batch import Drawn
from executor.data import Given, Source
from executor.model_file import ModelFile
from executor.parent import die_with_parent
from executor.shares import Address, Shares
from planner.basis.errors import RUN_FAILED, USAGE, PlanError, said


class Feed(Protocol):
    """One replica's shares of the batches of all steps, one after another; every rank of the replica sees the same."""

    @property
    def steps(self) -> int | None:
        """How many steps an epoch has; None where there are no epochs."""

    def set_epoch(self, epoch: int) -> None:
        """Go on with the first step of an epoch."""

    def start(self, step: int) -> None:
        """Go on with the share of a step, which is counted from the run's first on."""

    def take(self) -> Drawn:
        """Return the share of the next step; behind the last of an epoch comes the first of the next one."""

    def close(self) -> None:
        """Let go of what makes batches ready. Nothing can be taken any more."""


class Draws:
    """Shares drawn by `batch(n)`: as many as are asked for, each from a seed of its own.

    There are no epochs: whatever `set_epoch` is told, the next share is drawn from the next seed.
    """

    steps: int | None = None

    def __init__(self, file: ModelFile, samples: int, *, replicas: int = 1, replica: int = 0, seed: int = 0) -> None:
        self.file, self.samples, self.replicas, self.replica, self.seed = file, samples, replicas, replica, seed
        self.step = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: no sample is ever drawn again."""

    def start(self, step: int) -> None:
        """Go on with the share of a step."""
        self.step = step

    def take(self) -> Drawn:
        """Draw the share of the next step."""
        seed = (1 + self.seed + self.step) * self.replicas + self.replica  # the weights' seed is `self.seed` itself
        drawn = self.file.drawn(self.samples, seed)
        self.step += 1
        return drawn

    def close(self) -> None:
        """There is nothing to let go of."""


class Making(Protocol):
    """Makes shares of a source, each at its address."""

    source: Source
    steps: int | None

    def addresses(self, epoch: int) -> Iterator[Address]:
        """Yield where the shares are, from the first of an epoch on."""

    def __getitem__(self, address: Address) -> Drawn:
        """Make one."""


class Dealt:
    """Shares of a dataset, dealt to replicas sample by sample.

    Without `workers` a share is made when it is taken; with them, as many processes make the next ones ready meanwhile.
    They end with this process. `like` is a batch as the plan's stages expect it.
    """

    def __init__(self, shares: Making, like: Drawn, *, workers: int, device: torch.device) -> None:
        self.shares, self.like, self.workers, self.device = shares, like, workers, device
        self.steps = shares.steps
        self.addresses = _Anew(shares)
        self.made: Iterator[Any] | None = None
        self.loader: DataLoader[Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go on with the first step of an epoch."""
        self.addresses.epoch, self.addresses.skipped, self.made = epoch, 0, None

    def start(self, step: int) -> None:
        """Go on with the share of a step. A stream is read up to there from its epoch's begin, and its draws drawn."""
        epoch, behind = divmod(step, self.steps) if self.steps else (0, step)
        self.set_epoch(epoch)
        if self.shares.source.streams:
            for _ in range(behind):
                self.take()
        else:
            self.addresses.skipped = behind

    def take(self) -> Drawn:
        """Return the share of the next step.

        Raises `PlanError` when the dataset fails, or the share differs from others in more than its numbers, and
        `StopIteration` behind the last one, where there is one.
        """
        if self.made is None:
            self.made = self._ready() if self.workers else map(self.shares.__getitem__, iter(self.addresses))
        try:
            found = next(self.made)
        except RuntimeError as error:  # torch's words about its workers
            raise PlanError(
                what="a process that makes batches has ended",
                where=f"{self.shares.source.path}, {self.shares.source.call}",
                why=str(error).splitlines()[0],
                fix="look for too little memory (dmesg), or make batches with num_workers=0 to see what happens",
                code=RUN_FAILED,
            ) from error
        if isinstance(found, str):
            raise said(found, code=USAGE) or RuntimeError(found)
        assert isinstance(found, Drawn)
        if found.form != self.like.form:
            raise self._unlike(found)
        # What workers made lies in memory that is shared with them, of which each piece holds a file open.
        return found.each(torch.Tensor.clone) if self.workers and self.device.type == "cpu" else found

    def close(self) -> None:
        """End the processes that make batches."""
        self.made = self.loader = None

    def _ready(self) -> Iterator[Any]:
        source = self.shares.source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking beside threads: torch's workers use none of ours
            if self.loader is None:
                self.loader = DataLoader(
                    _Said(self.shares),
                    batch_size=None,
                    sampler=self.addresses,
                    num_workers=self.workers,
                    collate_fn=_as_it_is,
                    pin_memory=source.pinned and self.device.type == "cuda",
                    worker_init_fn=_Begun(source.begin_worker),
                    multiprocessing_context="fork",  # the model file's classes are known to no other process
                    generator=torch.Generator(),  # the training's own draws stay what they are
                    prefetch_factor=source.ahead,
                    persistent_workers=True,
                )
            return iter(self.loader)

    def _unlike(self, found: Drawn) -> PlanError:
        def words(drawn: Drawn) -> str:
            return ", ".join(f"{dtype} {shape}" for dtype, shape in drawn.form[1:]).replace("torch.", "")

        return PlanError(
            what="a batch has other shapes than those that the plan was made for",
            where=f"{self.shares.source.path}, {self.shares.source.call}",
            why=f"its samples are {words(found)} where {words(self.like)} are expected",
            fix="make all samples alike: pad or crop them to one length in the dataset or in the collate_fn",
            code=RUN_FAILED,
        )


class _Said(Dataset[Any]):
    """A dataset whose workers say what fails in words, as torch would carry an exception's class and text only."""

    def __init__(self, shares: Making) -> None:
        self.shares = shares

    def __getitem__(self, address: Address) -> Drawn | str:
        try:
            return self.shares[address]
        except PlanError as error:
            return str(error)


class _Anew(Iterable[Address]):
    """The addresses of shares, which begin anew with an epoch each time, behind those that are skipped of it.

    It knows nothing of who takes them: in a circle of references the garbage collector would close the pipe to a worker
    before the worker is told to end, and its end be waited for in vain, for 5 s.
    """

    def __init__(self, shares: Making) -> None:
        self.shares, self.epoch, self.skipped = shares, 0, 0

    def __iter__(self) -> Iterator[Address]:
        return itertools.islice(self.shares.addresses(self.epoch), self.skipped, None)


class _Begun:
    """What a worker process does first: die with its parent, leave Ctrl-C to it, and what the user's loader asks."""

    def __init__(self, own: Callable[[int], None] | None) -> None:
        self.own = own

    def __call__(self, worker: int) -> None:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.own is not None:
            self.own(worker)


def _as_it_is(share: Any) -> Any:
    return share


def open_feed(
    file: ModelFile,
    samples: int,
    *,
    replicas: int = 1,
    replica: int = 0,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device | None = None,
) -> Feed:
    """Return what one of so many replicas takes its shares of so many samples from: the file's data, or its draws.

    By default there are as many `workers` as the file's DataLoader has. `device` is where the shares go.
    """
    if file.data is None:
        return Draws(file, samples, replicas=replicas, replica=replica, seed=seed)
    return dealt(
        file, file.data, samples, replicas=replicas, replica=replica, seed=seed, workers=workers, device=device
    )


def dealt(
    file: ModelFile,
    given: Given,
    samples: int,
    *,
    replicas: int = 1,
    replica: int = 0,
    seed: int = 0,
    workers: int | None = None,
    device: torch.device | None = None,
) -> Dealt:
    """Return the shares of a dataset, what the file trains on or what it is judged by.

    Raises `PlanError` when it has not one whole batch.
    """
    like, source = file.drawn(2, seed=0), given.source
    used = (source.workers or 0) if workers is None else workers
    used = min(used, 1) if source.streams else used  # two workers would each read the whole stream
    shares = Shares(given.renewed() if used else source, samples, replicas=replicas, replica=replica, seed=seed)
    return Dealt(shares, like, workers=used, device=device or torch.device("cpu"))
