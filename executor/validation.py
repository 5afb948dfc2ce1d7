"""Validation data in micro-batches, dealt to the replicas in turn: every sample is used once, none is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from executor.batch import Drawn
from executor.data import Source
from executor.feed import Dealt
from executor.model_file import ModelFile
from executor.seeding import mixed, seeded
from executor.shares import Address
from executor.user_code import explained

SEED = 1
"""What samples draw is the same in every evaluation, of every run."""


class Parts(Dataset[Any]):
    """One replica's micro-batches of `samples`, the last one of all of as many as are left.

    An order of the user's DataLoader says which samples there are: a sampler may have a part of the dataset alone.
    """

    steps: int | None = None

    def __init__(self, source: Source, samples: int, *, replicas: int, replica: int) -> None:
        self.source, self.samples, self.replicas, self.replica = source, samples, replicas, replica
        self.stream: Iterator[Any] = iter(())

    def addresses(self, epoch: int) -> Iterator[Address]:
        """Yield where the micro-batches are; of a stream without end."""
        if self.source.streams:
            self.stream = iter(self.source.dataset)
            return (Address(epoch, step, [], mixed(SEED, step)) for step in itertools.count())
        order = self._order()
        cuts = range(0, len(order), self.samples)[self.replica :: self.replicas]
        return (Address(epoch, at, order[at : at + self.samples], mixed(SEED, at)) for at in cuts)

    def _order(self) -> list[Any]:
        order = self.source.order
        if order is None:
            return list(range(self.source.samples or 0))
        states = [generator.get_state() for generator in self.source.generators]
        with seeded(SEED), explained(self.source.path, f"the sampler of {self.source.call}"):
            found = list(order)
        for generator, state in zip(self.source.generators, states, strict=True):
            generator.set_state(state)  # training may go by the same one
        return found

    def __getitem__(self, address: Address) -> Drawn:
        """Make a micro-batch. Raises `PlanError` when the dataset fails, and `StopIteration` where a stream ends."""
        with seeded(address.seed):
            if not self.source.streams:
                return self.source.together(self.source.items(address.indices))
            with explained(self.source.path, f"{self.source.call}'s stream", self.source.correct("list(d)")):
                several = [list(itertools.islice(self.stream, self.samples)) for _ in range(self.replicas)]
            if not several[self.replica]:
                raise StopIteration
            return self.source.together(several[self.replica])


class Validation:
    """The micro-batches of one replica, over and over again. Workers that make them live as long as this does."""

    def __init__(self, file: ModelFile, samples: int, *, replicas: int = 1, replica: int = 0) -> None:
        assert file.evaluate is not None, "who asks knows that there is some"
        source = file.evaluate.source
        workers = 0 if source.streams else source.workers or 0
        parts = Parts(file.evaluate.renewed() if workers else source, samples, replicas=replicas, replica=replica)
        self.dealt = Dealt(parts, file.drawn(2, seed=0), workers=workers, device=torch.device("cpu"))

    def __iter__(self) -> Iterator[Drawn]:
        """Yield all micro-batches. Raises `PlanError` when one cannot be made, or has other shapes than in training."""
        self.dealt.set_epoch(0)
        while True:
            try:
                part = self.dealt.take()
            except StopIteration:
                return
            yield part
