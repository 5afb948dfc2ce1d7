"""What a model file's `data()` and `evaluate()` return, a Dataset or a DataLoader, and how it becomes batches.

A DataLoader says how its samples are put together, in which order and by how many worker processes. Its batches are not
used as they are: a step's batch is the plan's, and each replica takes its share of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from executor.batch import Drawn, tensors
from executor.faults import as_script
from executor.seeding import mixed, seeded
from executor.torch_adapter import pytree
from executor.user_code import explained
from planner.basis.errors import PlanError

AHEAD = 2
"""Batches that every worker makes ready before they are asked for (torch's own number)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset of the model file at `path`, as its function `call` returned it; where None, nobody says.

    `order` is the sampler of the user's DataLoader where it has one of its own; without, samples come in a `shuffle`d
    order or in the dataset's; `begun` are the states in which its generators are at first. `streams` says that samples
    can only be had one after another.
    """

    path: str
    call: str
    dataset: Any
    streams: bool
    shuffle: bool
    collate: Callable[[list[Any]], Any] = default_collate
    order: Sampler[Any] | None = None
    generator: torch.Generator | None = None
    begun: tuple[torch.Tensor, ...] = ()
    seed: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    ahead: int = AHEAD
    pinned: bool = False
    begin_worker: Callable[[int], None] | None = None
    kept: list[Any] = field(default_factory=list)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generators of the user's own order, of which it takes another one in every epoch."""
        return _generators(self.generator, self.order)

    @property
    def samples(self) -> int | None:
        """How many samples an epoch has; None where nobody says, as of a stream without a length."""
        own = self.order if self.order is not None else self.dataset
        if not isinstance(own, Sized):
            return None
        try:
            with explained(self.path, f"the length of {self.call}'s dataset", self.correct("len(d)")):
                return len(own)
        except PlanError:
            if self.streams:
                return None
            raise

    def item(self, index: Any) -> Any:
        """Return one sample. Raises `PlanError` with its index when the dataset fails."""
        with explained(self.path, f"sample {index} of {self.call}", self.correct(f"d[{index}]")):
            return self.dataset[index]

    def items(self, indices: Sequence[Any]) -> list[Any]:
        """Return samples, all at once where the dataset can give them so. Raises `PlanError` when it fails."""
        together = getattr(self.dataset, "__getitems__", None)
        if not callable(together):
            return [self.item(index) for index in indices]
        some = ", ".join(map(str, indices[:8])) + (" …" if len(indices) > 8 else "")
        with explained(self.path, f"samples {some} of {self.call}", self.correct(f"d.__getitems__({[*indices][:8]})")):
            return list(together(list(indices)))

    def together(self, items: list[Any]) -> Drawn:
        """Return samples as one batch, put together as the DataLoader does it.

        Raises `PlanError` when they do not go together, or what comes out are no inputs and targets.
        """
        try:
            found = self.collate(items)
        except Exception as error:
            shapes = list(dict.fromkeys(_described(item) for item in items))
            raise PlanError(
                what=f"the samples of {self.call} cannot be put into one batch",
                where=f"{self.path}, {'default_collate' if self.collate is default_collate else 'collate_fn'}",
                why=f"samples are {' and '.join(shapes[:3])}"
                if len(shapes) > 1
                else f"{type(error).__name__}: {error}",
                fix="make all samples alike: pad or crop them in the dataset, or in the collate_fn of a DataLoader",
            ) from error
        return self.drawn(found, len(items))

    def drawn(self, found: Any, samples: int) -> Drawn:
        """Return a batch as it was put together as inputs and targets. Raises `PlanError` where it has none."""
        if isinstance(found, Mapping):  # a model that returns its own loss has its targets among its inputs
            batch = Drawn(samples=samples, given=dict(found), targets=None)
        elif isinstance(found, (tuple, list)) and len(found) == 2:
            given = dict(found[0]) if isinstance(found[0], Mapping) else found[0]
            batch = Drawn(samples=samples, given=tuple(given) if isinstance(given, list) else given, targets=found[1])
        else:
            size = f" of {len(found)}" if isinstance(found, (tuple, list)) else ""
            raise PlanError(
                what=f"the samples of {self.call} are no pairs of inputs and targets",
                where=self.path,
                why=f"a batch of them is a {type(found).__name__}{size}",
                fix="let the dataset return (inputs, targets), inputs as a tuple or a dict where there are several; or "
                "a dict, for a model that returns its own loss",
            )
        every = [("an input", t) for t in batch.inputs] + [("a target", t) for t in tensors(batch.targets)]
        wrong = next(((of, t) for of, t in every if not t.dim() or t.shape[0] != samples), None)
        if not batch.inputs or wrong is not None:
            raise PlanError(
                what=f"a batch of {samples} samples of {self.call} has other than {samples} of them",
                where=self.path,
                why="its inputs have no tensors" if wrong is None else f"{wrong[0]} is {tuple(wrong[1].shape)}",
                fix="let the collate_fn return inputs and targets whose first dimension is the number of samples",
            )
        return batch

    def first(self, samples: int) -> Drawn:
        """Return the first samples as a batch, the same whenever it is asked for. They are kept: they may be dear.

        Raises `PlanError` when there are fewer.
        """
        if len(self.kept) < samples:
            self.kept[:] = self._first(samples)
        if len(self.kept) < samples:
            raise self.too_short(len(self.kept), samples)
        return self.together(self.kept[:samples])

    def _first(self, samples: int) -> list[Any]:
        """Return so many samples, or as many as there are; what each of them draws depends on its place alone."""
        found: list[Any] = []
        stream = self._begun() if self.streams else iter(range(len(self.dataset)))
        for place in range(samples):
            with seeded(mixed(place)), explained(self.path, f"{self.call}'s dataset", self.correct("next(iter(d))")):
                more = list(itertools.islice(stream, 1))
                found += more if self.streams else self.items(more)
        return found

    def _begun(self) -> Iterator[Any]:
        with seeded(mixed(0)), explained(self.path, f"{self.call}'s dataset", self.correct("iter(d)")):
            return iter(self.dataset)

    def too_short(self, found: int, samples: int) -> PlanError:
        """Build the error for a dataset that has not one whole batch: nothing is used twice without a word."""
        return PlanError(
            what=f"{self.call} has fewer samples than one step's batch",
            where=self.path,
            why=f"it has {found}, and a batch is {samples}",
            fix=f"plan with a smaller batch (batch_size = {1 << max(0, found.bit_length() - 1)} in the model file), or "
            "have more data",
        )

    def correct(self, what: str) -> str:
        """Return what to do about a dataset, d, of which something does not work."""
        return f"correct it until {what} works, where d is the dataset of {self.call}"


class Drawing:
    """So many samples, each drawn by the model file's `batch(1)` from a seed that no training step uses."""

    def __init__(self, draw: Callable[[int], Any], samples: int) -> None:
        self.draw, self.samples = draw, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        with seeded(_LAST_SEED - index):
            return self.draw(1)


_LAST_SEED = 2**32 - 1
"""The largest that numpy takes. Training counts up from the run's seed, which is below half of it."""


def _behind_another(items: list[Any]) -> Any:
    """Put batches of one sample behind each other."""
    return pytree.tree_map(
        lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0], *items
    )


def source_of(
    path: str, function: str, make: Callable[[], Any], *, shuffle: bool, draw: Callable[[int], Any] | None = None
) -> Source:
    """Call a model file's `data()` or `evaluate()` and return what it gives; a bare dataset is `shuffle`d or not.

    With `draw`, which draws so many samples, it may also return how many are to be drawn.

    What it draws, for example where to split a dataset, is the same in every process and for both functions. Raises
    `PlanError` when it fails, returns anything else, or returns a DataLoader that cannot be dealt to replicas.
    """
    call = f"{function}()"
    with seeded(0), as_script(path), explained(path, call):
        found = make()
    if draw is not None and isinstance(found, int) and not isinstance(found, bool) and found > 0:
        drawing = Drawing(draw, found)
        return Source(path=path, call=call, dataset=drawing, streams=False, shuffle=False, collate=_behind_another)
    if isinstance(found, DataLoader):
        return _of_loader(path, call, found)
    streams = isinstance(found, IterableDataset)
    if (not streams and not (hasattr(found, "__getitem__") and hasattr(found, "__len__"))) or isinstance(
        found, (str, bytes, Mapping, torch.Tensor)
    ):
        raise PlanError(
            what=f"{call} returns no dataset",
            where=path,
            why=f"it returns {type(found).__name__}",
            fix="return a torch.utils.data.Dataset, an IterableDataset, or a DataLoader of one",
        )
    return Source(path=path, call=call, dataset=found, streams=streams, shuffle=shuffle and not streams)


def _of_loader(path: str, call: str, loader: DataLoader[Any]) -> Source:
    own = ""
    if type(loader).__iter__ is not DataLoader.__iter__:
        own = f"an __iter__ of its own, as a {type(loader).__name__}"
    elif loader.batch_size is None:
        own = "batch_size=None" if loader.batch_sampler is None else "a batch_sampler"
    elif type(loader.batch_sampler) is not BatchSampler and not _streams(loader):
        own = "a batch_sampler"
    if own or loader.batch_size is None:
        raise PlanError(
            what=f"the DataLoader of {call} makes its batches itself",
            where=path,
            why=f"it has {own}, and a step's batch is the plan's, dealt to replicas sample by sample",
            fix="return torch's own DataLoader, of a dataset of single samples, with a sampler for their order",
        )
    sampler: Any = loader.sampler
    order, seed, shuffle = None, None, False
    if isinstance(sampler, DistributedSampler):  # dealing is ours; its order and seed are the user's
        shuffle, seed = sampler.shuffle, sampler.seed
    elif type(sampler) is RandomSampler and sampler.generator is None and not sampler.replacement:
        shuffle = len(sampler) == len(sampler.data_source)
        order = None if shuffle else sampler
    elif not _streams(loader) and type(sampler) is not SequentialSampler:
        order = sampler
        if not isinstance(order, Sized):
            raise PlanError(
                what=f"nobody knows how many samples an epoch of {call} has",
                where=path,
                why=f"its sampler, a {type(order).__name__}, has no length",
                fix="give the sampler a __len__",
            )
    return Source(
        path=path,
        call=call,
        dataset=loader.dataset,
        streams=_streams(loader),
        shuffle=shuffle,
        collate=loader.collate_fn,
        order=order,
        generator=loader.generator,
        begun=tuple(generator.get_state() for generator in _generators(loader.generator, order)),
        seed=seed,
        batch_size=loader.batch_size if loader.batch_size > 1 else None,  # 1 is what DataLoader takes of itself
        workers=loader.num_workers or None,
        ahead=loader.prefetch_factor or AHEAD,
        pinned=loader.pin_memory,
        begin_worker=loader.worker_init_fn,
    )


def _generators(own: torch.Generator | None, order: Any) -> tuple[torch.Generator, ...]:
    found = (own, getattr(order, "generator", None))
    return tuple({id(g): g for g in found if isinstance(g, torch.Generator)}.values()) if order is not None else ()


def _streams(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _described(item: Any) -> str:
    shapes = [tuple(torch.as_tensor(t).shape) for t in tensors(item)]
    return f"of shape {', '.join(map(str, shapes))}" if shapes else f"a {type(item).__name__}"


class Given:
    """What a model file's `data()` or `evaluate()` gives, asked for when it is needed first."""

    def __init__(
        self,
        path: str,
        function: str,
        make: Callable[[], Any],
        *,
        shuffle: bool,
        draw: Callable[[int], Any] | None = None,
    ) -> None:
        self.path, self.function, self.make, self.shuffle, self.draw = path, function, make, shuffle, draw
        self._source: Source | None = None

    @property
    def source(self) -> Source:
        """The dataset and how it becomes batches. Raises `PlanError` when the function fails or returns no data."""
        if self._source is None:
            self._source = source_of(self.path, self.function, self.make, shuffle=self.shuffle, draw=self.draw)
        return self._source

    def renewed(self) -> Source:
        """Ask the function again, so that no file which a dataset has opened here is shared with worker processes."""
        self._source = None
        return self.source
