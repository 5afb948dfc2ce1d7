"""The user's model file: ordinary Python with `model()`, `data()` or `batch(n)`, and what it may leave out."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from executor.batch import Drawn, checked_batch
from executor.data import Given
from executor.faults import IMPORTING, as_script, check_default_device, explained
from executor.precision import SCALED, checked_precision
from executor.seeding import seeded
from executor.user_code import (
    Loss,
    Optimizer,
    Scheduler,
    checked_function,
    checked_loss,
    checked_optimizer,
    checked_scheduler,
    default_loss,
    default_optimizer,
    limit,
    optimizer_of,
    whole_number,
    yes_or_no,
)
from planner.basis import sources
from planner.basis.errors import PlanError

DEFAULT_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """The functions of a model file. `path` is as given, with `:name` where another model was picked.

    `sequence` is how many tokens a sample has, where the file or its caller says so; 0 where nobody does. `batch` makes
    samples of that length where it `takes_sequence`. `data` is what a run trains on, where `batch` does not draw
    it, and `evaluate` what it is judged by. Measuring, checking and capturing is done with `batch`, or else with the
    first samples of `data`. `clip` is the norm to which all gradients together are clipped, 0 where they are not. The
    model runs in a `precision` of `executor.precision`, "" for its own dtypes. Its layers may be `compiled`
    (`executor.compiling`).
    """

    path: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any] | None
    loss: Loss
    optimizer: Optimizer
    layers: Callable[[nn.Module], Any] | None
    batch_size: int
    splits: Callable[[nn.Module], Any] | None = None
    weight: Callable[[Any, Any], float] | None = None
    scheduler: Scheduler | None = None
    data: Given | None = None
    evaluate: Given | None = None
    clip: float = 0.0
    metrics: Callable[[Any, Any], dict[str, Any]] | None = None
    precision: str = ""
    compiled: bool = False
    sequence: int = 0
    takes_sequence: bool = False

    def build(self, seed: int) -> nn.Module:
        """Make the model with weights that depend on `seed` alone. Raises `PlanError` when `model()` fails."""
        torch.manual_seed(seed)
        with as_script(self.path), explained(self.path, "model()"):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise PlanError(
                what="model() does not return a torch module",
                where=self.path,
                why=f"it returns {type(model).__name__}",
                fix="return an nn.Module from model()",
            )
        lazy = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]
        if lazy:
            raise PlanError(
                what="model() returns parameters that have no shape yet",
                where=self.path,
                why=f"{lazy[0]} gets its shape from the first input that it sees",
                fix="let the model see one in model(): made = Model(); made(batch(2)[0]); return made",
            )
        if self.precision == SCALED and any(p.dtype == torch.float16 for p in model.parameters()):
            raise PlanError(
                what="a model in float16 cannot be trained with a scaled loss",
                where=self.path,
                why="its updates would be too small for its numbers; torch's GradScaler refuses such gradients, too",
                fix="keep the model in float32: precision runs it in float16",
            )
        return model

    def optimizer_of(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer | None:
        """Return the optimizer of a part of the model, by the names in the whole; None where it trains none of it."""
        return optimizer_of(self.path, self.optimizer, named)

    def draw(self, samples: int, seed: int) -> tuple[tuple[Any, ...], Any]:
        """Draw a batch that depends on `seed` alone: the tensors of its inputs, and the targets (`drawn`)."""
        drawn = self.drawn(samples, seed)
        return drawn.inputs, drawn.targets

    def drawn(self, samples: int, seed: int) -> Drawn:
        """Draw a batch that depends on `seed` alone.

        The random state of the caller is left as it was. Raises `PlanError` when `batch()` fails, a tensor of its
        inputs does not have `samples` samples, or its sequences of tokens are not as long as was asked for.
        """
        if self.batch is None:
            assert self.data is not None, "a model file has one of both"
            found = self.data.source.first(samples)
            self._check_length(found.inputs)
            return found
        with seeded(seed), as_script(self.path), explained(self.path, f"batch({samples})"):
            drawn = self.batch(samples)
        found = checked_batch(self.path, f"batch({samples})", samples, drawn)
        self._check_length(found.inputs)
        return found

    def tokens(self) -> int:
        """Return how many tokens a sample has: as is said, or as a drawn one has; 0 where samples are no sequences."""
        return self.sequence or next(iter(lengths(self.draw(2, seed=0)[0])), 0)

    def _check_length(self, inputs: Iterable[torch.Tensor]) -> None:
        found = lengths(inputs)
        if not self.sequence or self.sequence in found or (self.takes_sequence and not found):
            return
        has = f"its samples have {found[0]} tokens" if found else "its inputs are no sequences of tokens"
        raise PlanError(
            what=f"{'batch' if self.batch else 'data'}() does not return sequences of {self.sequence} tokens",
            where=self.path,
            why=has if self.takes_sequence else f"{has}, and it takes no other length",
            fix=f"let it take the length: def {'batch(n, ' if self.batch else 'data('}sequence=64)",
        )


def lengths(inputs: Iterable[torch.Tensor]) -> list[int]:
    """Return the length of every input that has sequences of tokens: integers of the shape (samples, tokens)."""
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    return [tensor.shape[1] for tensor in inputs if tensor.dim() == 2 and tensor.dtype in whole]


def sha256(path: str, files: Iterable[str] = ()) -> str:
    """Hash of the file behind a `file.py[:name]` and of those that it imports from its folder.

    Raises `PlanError` (exit 2) when there is none.
    """
    return sources.digest(_source(path), files)


def imported(path: str) -> tuple[str, ...]:
    """Return the files that the file behind a `file.py[:name]` has imported from its folder."""
    return sources.imported(_source(path))


def _source(path: str) -> Path:
    source = Path(path.partition(":")[0])
    if not source.is_file():
        raise PlanError(
            what="there is no such model file",
            where=str(source),
            why="the path names no file",
            fix=f"plan init {source.name if source.suffix == '.py' else 'model.py'}   (writes a template)",
        )
    return source


def load(path: str, sequence: int = 0) -> ModelFile:
    """Import `file.py[:name]`. With a name, `name()` is the model and `name_batch` and so on go before `batch`.

    `sequence` asks for samples of so many tokens. Where it is 0, `batch` gives its own: the default of its parameter
    `sequence`, if it has one.

    Raises `PlanError` (exit 2) for a missing file, a file that does not import, or missing functions.
    """
    file, _, name = path.partition(":")
    source = _source(path)
    spec = importlib.util.spec_from_file_location(f"model_file_{source.stem}", source)
    if spec is None or spec.loader is None:
        raise PlanError(
            what="the model file is not a Python file", where=file, why="its name must end in .py", fix="rename it"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(source.parent.resolve()))
    try:
        with as_script(file), explained(file, IMPORTING):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    check_default_device(file)

    def find(function: str) -> Any:
        wanted = name if name and function == "model" else f"{name}_{function}" if name else function
        return getattr(module, wanted, None if wanted == name else getattr(module, function, None))

    def optional(function: str) -> Any:
        return checked_function(path, function, find(function))

    for wanted, signature in (
        (("model",), f"{name or 'model'}() -> nn.Module"),
        (("batch", "data"), "batch(n) -> (inputs, targets), or data() -> a Dataset or DataLoader"),
    ):
        if not any(callable(find(function)) for function in wanted):
            raise PlanError(
                what=f"the model file has no {signature.partition('(')[0]}()",
                where=file,
                why=f"foreplan calls {signature}",
                fix=f"define {signature} in {file}; plan init shows a template",
            )
    own = inspect.signature(find("batch") or find("data")).parameters.get("sequence")
    length = sequence or (own.default if own and isinstance(own.default, int) else 0)

    def sized(function: str) -> Any:
        """A function of the file; of samples as long as is asked, where it can be told."""
        found = find(function)
        takes = found is not None and "sequence" in inspect.signature(found).parameters
        return functools.partial(found, sequence=length) if takes and length else found

    data = Given(path, "data", sized("data"), shuffle=True) if callable(find("data")) else None
    evaluate = Given(path, "evaluate", sized("evaluate"), shuffle=False, draw=sized("batch"))
    return ModelFile(
        path=path,
        model=find("model"),
        batch=sized("batch"),
        loss=checked_loss(path, optional("loss") or default_loss),
        optimizer=checked_optimizer(path, optional("optimizer") or default_optimizer),
        layers=optional("layers"),
        batch_size=_batch_size(file, find("batch_size"), data),
        splits=optional("splits"),
        weight=optional("weight"),
        scheduler=checked_scheduler(path, optional("scheduler")) if optional("scheduler") else None,
        data=data,
        evaluate=evaluate if callable(find("evaluate")) else None,
        clip=limit(file, "clip", find("clip")),
        metrics=find("metrics"),
        precision=checked_precision(file, find("precision")),
        compiled=yes_or_no(file, "compiled", find("compiled")),
        sequence=length,
        takes_sequence=own is not None,
    )


def _batch_size(path: str, own: Any, data: Given | None) -> int:
    """Return the samples of a step: as the file says, or its DataLoader. Raises `PlanError` when these differ."""
    said = None if own is None else whole_number(path, "batch_size", own)
    loaded = data.source.batch_size if data is not None else None
    if said is not None and loaded is not None and said != loaded:
        raise PlanError(
            what="the model file says two sizes of a step's batch",
            where=path,
            why=f"batch_size is {said}, and the DataLoader of data() has {loaded}",
            fix="leave one of them out: replicas and micro-batches are parts of that batch",
        )
    return said or loaded or DEFAULT_BATCH
