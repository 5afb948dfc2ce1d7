"""Which samples of a dataset each step has for one replica, and how they become a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, DistributedSampler

from executor.batch import Drawn
from executor.data import Source
from executor.seeding import mixed, seeded
from executor.user_code import explained
from planner.basis.errors import PlanError


class Address(NamedTuple):
    """Where a share is found: its step of an epoch, its samples' indices (none of a stream), the seed of its draws."""

    epoch: int
    step: int
    indices: list[Any]
    seed: int


class Shares(Dataset[Any]):
    """One replica's shares of the batches of all steps, as a dataset whose items are found by their addresses.

    What its samples draw depends on the run's seed, the epoch, the step and the replica alone: in another process the
    same share is the same.
    """

    def __init__(self, source: Source, samples: int, *, replicas: int, replica: int, seed: int) -> None:
        self.source, self.samples, self.replica, self.seed = source, samples, replica, seed
        self.batch = samples * replicas
        self.stream = Stream(source, samples, replicas=replicas, replica=replica) if source.streams else None
        self.order = None if source.streams else Order(source, replicas=replicas, replica=replica, seed=seed)
        length = source.samples
        self.steps = self.stream.steps if self.stream else (length or 0) // self.batch
        """Whole steps of an epoch; None of a stream without a length. What is left of an epoch is not used."""
        if self.steps == 0:
            raise source.too_short(length or 0, self.batch)

    def addresses(self, epoch: int) -> Iterator[Address]:
        """Yield where the shares of all steps are, from the first of an epoch on, without end."""
        for number in itertools.count(epoch):
            order = self.order.of(number) if self.order else []
            for step in itertools.count() if self.steps is None else range(self.steps):
                indices = order[step * self.samples : (step + 1) * self.samples]
                yield Address(number, step, indices, self._seed(number, step))

    def _seed(self, epoch: int, step: int) -> int:
        # Replicas that read one stream and take every so manieth sample of it must all see the same stream.
        together = self.stream is not None and self.stream.every > 1
        return mixed(self.seed, epoch, step, *(() if together else (self.replica,)))

    def __getitem__(self, address: Address) -> Drawn:
        """Make a share. Raises `PlanError` when the dataset fails, or its samples do not go together."""
        with seeded(address.seed):
            if self.stream:
                return self.stream.share(address.epoch, address.step)
            return self.source.together(self.source.items(address.indices))


class Order:
    """Which samples of a map-style dataset each step of an epoch has for one replica: the same on every rank.

    As `DistributedSampler(dataset, replicas, replica, shuffle, seed)` has them in an epoch, without its last samples
    where replicas could not have equally many. A sampler of the user's DataLoader is asked for its own order, epoch
    after epoch as the DataLoader asks it, and replicas take its entries in turn.
    """

    def __init__(self, source: Source, *, replicas: int, replica: int, seed: int) -> None:
        self.source, self.replicas, self.replica = source, replicas, replica
        self.seed = seed if source.seed is None else source.seed
        self.states, self.asked = source.begun, 0

    def of(self, epoch: int) -> list[Any]:
        """Return the indices of an epoch's samples in their order."""
        if self.source.order is not None:
            return self._own(epoch)[self.replica :: self.replicas]
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.source.dataset,
            self.replicas,
            self.replica,
            shuffle=self.source.shuffle,
            seed=self.seed,
            drop_last=True,
        )
        sampler.set_epoch(epoch)
        return list(sampler)

    def _own(self, epoch: int) -> list[Any]:
        """The sampler's order in an epoch. Those before are gone through where generators remember them."""
        if epoch < self.asked:
            self.states, self.asked = self.source.begun, 0
        found: list[Any] = []
        for number in range(self.asked if self.states else epoch, epoch + 1):
            found = self._asked(number)
        self.asked = epoch + 1
        return found

    def _asked(self, epoch: int) -> list[Any]:
        order, generators = self.source.order, self.source.generators
        assert order is not None
        for generator, state in zip(generators, self.states, strict=True):
            generator.set_state(state)
        if self.source.generator is not None:  # as DataLoader does first in every epoch, for its workers' seeds
            torch.empty((), dtype=torch.int64).random_(generator=self.source.generator)
        if hasattr(order, "set_epoch"):
            order.set_epoch(epoch)
        with seeded(mixed(self.seed, epoch)), explained(self.source.path, f"the sampler of {self.source.call}"):
            found = list(order)
        self.states = tuple(generator.get_state() for generator in generators)
        return found


class Stream:
    """One replica's samples of an IterableDataset: every so manieth, or its own where the dataset shards itself.

    A dataset with a method `shard(num_shards, index)` (Hugging Face's have it) is asked for the replica's part. Of any
    other every replica reads all samples and takes its own, so that all of them end at the same one.
    """

    def __init__(self, source: Source, samples: int, *, replicas: int, replica: int) -> None:
        self.source, self.samples = source, samples
        parts, self.every, self.replica = [source.dataset], replicas, replica
        sharded = replicas > 1 and callable(getattr(source.dataset, "shard", None))
        if sharded and getattr(source.dataset, "num_shards", replicas) >= replicas:
            with explained(source.path, f"shard({replicas}, …) of {source.call}'s dataset", source.correct("d.shard")):
                parts = [source.dataset.shard(num_shards=replicas, index=r) for r in range(replicas)]
            self.every, self.replica = 1, 0
        self.own = parts[replica if len(parts) > 1 else 0]
        known = [length for length in map(_length, parts) if length is not None]
        self.steps = min(known) // (samples * self.every) if len(known) == len(parts) else None
        """Whole steps of an epoch, of the replica with the fewest samples; None where the dataset has no length."""
        self.iterator: Iterator[Any] = iter(())
        self.epoch, self.taken = 0, 0

    def share(self, epoch: int, step: int) -> Drawn:
        """Return the samples of a step, the one behind that of the last call, or the first one of an epoch.

        A stream without a length begins anew where it ends. Raises `PlanError` when one with a length ends early.
        """
        if step == 0:
            self._begin(epoch)
        items = self._more()
        if items is None and self.steps is None:
            self._begin(self.epoch + 1)
            items = self._more()
        if items is None:
            raise self._short()
        return self.source.together(items)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.taken = epoch, 0
        if hasattr(self.own, "set_epoch"):
            self.own.set_epoch(epoch)
        with self._explained():
            self.iterator = iter(self.own)

    def _more(self) -> list[Any] | None:
        with self._explained():
            found = list(itertools.islice(self.iterator, self.samples * self.every))
        self.taken += len(found)
        return found[self.replica :: self.every] if len(found) == self.samples * self.every else None

    def _explained(self) -> explained:
        call = f"sample {self.taken} or a later one of {self.source.call}'s stream"
        return explained(self.source.path, call, self.source.correct("list(d)"))

    def _short(self) -> PlanError:
        whole = self.samples * self.every
        if self.taken < whole:
            return self.source.too_short(self.taken, whole)
        length = _length(self.own)
        return PlanError(
            what=f"the stream of {self.source.call} ends before its epoch does",
            where=self.source.path,
            why=f"a replica's part has {self.taken} samples where its length says {length}: replicas would part",
            fix="let __len__ say how many samples there are, or leave it out and train for so many --steps",
        )


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
