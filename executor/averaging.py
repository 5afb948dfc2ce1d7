"""How the losses of micro-batches add up to that of their batch, so that M changes nothing about what is trained.

A loss is a mean: over samples, or over what of the targets counts (words that are not ignored, weighted samples). A
micro-batch's loss then counts with its weight over the whole batch's, all replicas' together. `weight(inputs, targets)`
in the model file says how much a batch weighs; without it, integer targets of -100 do not count, as torch's losses
ignore them. Whether that is so is checked before a profile is measured, and in a run where the first of them comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from executor.batch import Drawn, tensors
from executor.labels import NO_ENDS, Ends, LossOf, check_mean, check_one, ends_of, ignores, labels_of, share
from executor.labels import ROUNDING as OF_LABELS
from executor.layers import unchanged_buffers
from executor.model_file import ModelFile
from executor.modes import evaluating
from executor.precision import DTYPES, autocast
from executor.user_code import explained
from planner.basis.errors import PlanError

SEED, SAMPLES = 0, 4
ROUNDING = 1e-3
"""Relative differences of losses that are rounding; with numbers of few digits more is."""


class Averaging:
    """What the micro-batches of one replica count, on the rank that has their losses.

    `group` joins the ranks that do, of all `microbatches` of a step. In every step they add up their weights while the
    first micro-batch is on its way to its loss; only targets that cannot be ignored weigh the same everywhere.
    """

    def __init__(
        self, file: ModelFile, group: dist.ProcessGroup | None, microbatches: int, device: torch.device
    ) -> None:
        self.file, self.group, self.microbatches, self.device = file, group, microbatches, device
        self.ends: Ends | None = None
        self.parts: Mapping[int, Drawn] = {}
        self.weights: dict[int, float] | None = None
        self.total: torch.Tensor | None = None
        self.adding: dist.Work | None = None

    def begin(self, parts: Mapping[int, Drawn]) -> None:
        """Begin a step with these micro-batches: weigh them, as far as is possible without the outputs for one."""
        self.parts, self.weights = parts, None
        for part in parts.values() if self.file.weight is None else ():
            check_one(self.file.path, part)
        if not any(map(self._asks, parts.values())):
            self._weigh()

    def shared(self, microbatch: int, loss_of: LossOf, loss: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """Return the `loss` of one of the step's micro-batches as its part of the whole batch's.

        All parts add up to the batch's loss. None where nothing of the micro-batch counts: its loss
        is a mean of nothing. `loss_of` gives what its loss would be with other targets.
        """
        if self.weights is None:
            self._learn(self.parts[microbatch], loss_of)
            self._weigh()
        assert self.weights is not None, "they have been weighed"
        weight = self.weights[microbatch]
        if self.adding is not None:
            self.adding.wait()
            self.adding = None
        if not weight:
            return None
        if self.total is not None:
            found = loss()
            return found * (weight / self.total).to(found.dtype)
        return loss() * (weight / sum(self.weights.values()) if self.group is None else 1 / self.microbatches)

    def weight(self, part: Drawn, loss_of: LossOf) -> float:
        """Return how much a batch weighs, of which `loss_of` gives what its loss would be with other targets."""
        if self.file.weight is None:
            check_one(self.file.path, part)
        if self._asks(part):
            self._learn(part, loss_of)
        return weight_of(self.file, part, self.ends or NO_ENDS)

    def _asks(self, part: Drawn) -> bool:
        """Whether one has to know which ends of its sequences of labels count, and nobody does yet."""
        return self.ends is None and self.file.weight is None and ignores(part)

    def _learn(self, part: Drawn, loss_of: LossOf) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        lowest = DTYPES.get(self.file.precision, torch.float32)
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            self.ends = ends_of(part, loss_of)
            check_mean(self.file.path, part, loss_of, self.ends, max(OF_LABELS, 4 * torch.finfo(lowest).eps))

    def _weigh(self) -> None:
        self.weights = {m: weight_of(self.file, part, self.ends or NO_ENDS) for m, part in self.parts.items()}
        any_part = next(iter(self.parts.values()))
        if self.group is not None and (self.file.weight is not None or labels_of(any_part) is not None):
            self.total = torch.tensor(sum(self.weights.values()), dtype=torch.float64, device=self.device)
            self.adding = dist.all_reduce(self.total, group=self.group, async_op=True)


def weight_of(file: ModelFile, part: Drawn, ends: Ends = NO_ENDS) -> float:
    """Return how much a micro-batch counts: as the model file says, else the share of its labels that count.

    Of sequences of labels those at the `ends` do not.
    """
    if file.weight is not None:
        with explained(file.path, "weight(inputs, targets)"):
            weight = float(file.weight(part.given, part.targets))
        if not 0 <= weight < math.inf:
            raise PlanError(
                what="weight(inputs, targets) does not return a weight",
                where=file.path,
                why=f"it returns {weight:g} for {part.samples} samples",
                fix="return over how much the loss is a mean: a number that is not negative, 0 where nothing counts",
            )
        return weight
    labels = labels_of(part)
    return float(part.samples) if labels is None else part.samples * share(labels, ends)


ENDS = 6
"""Forwards of a batch that finding the ends takes, of which nothing counts, about: none, all, and each end twice."""


def forwards(file: ModelFile, samples: int = SAMPLES) -> int:
    """Return of how many samples in all `check` runs the forward, about."""
    asks = file.weight is None and ignores(file.drawn(samples, SEED))
    return samples * (2 + ENDS * asks)


def check(file: ModelFile, model: torch.nn.Module, samples: int = SAMPLES) -> None:
    """Check that the loss of a batch of so many samples, two at least, is the mean of its halves', by weight.

    Raises `PlanError` (exit 2) when it is not: a loss that is a sum, or that ignores targets, would train another model
    with every M.
    """
    whole = file.drawn(samples, SEED)
    halves = whole.split(2)
    quiet = evaluating(model)  # what a batch's statistics or dropout change is not the loss's doing
    with quiet, torch.no_grad(), torch.random.fork_rng(devices=[]), explained(file.path, "loss(outputs, targets)"):
        torch.manual_seed(SEED + 1)  # another seed than that of the comparison below
        loss, *losses = [_loss(file, model, part) for part in (whole, *halves)]
        if file.weight is None:
            check_one(file.path, whole)
        asks = file.weight is None and ignores(whole)
        ends = ends_of(whole, lambda part: _loss(file, model, part)) if asks else NO_ENDS
    found, parts = float(loss), [float(part) for part in losses]
    room = max(ROUNDING, 4 * torch.finfo(DTYPES.get(file.precision, loss.dtype)).eps)
    weights = [weight_of(file, half, ends) for half in halves]
    expected = sum(w * p for w, p in zip(weights, parts, strict=True) if w) / (sum(weights) or 1.0)
    if abs(found - expected) > room * max(abs(found), abs(expected), 1e-6):
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            again = float(_loss(file, model, whole))
        if abs(found - again) > ROUNDING * abs(found):
            return  # it draws (the noise of a variational autoencoder), so one loss cannot be held against another
        summed = abs(found - sum(parts)) <= room * abs(found)
        raise PlanError(
            what="the loss of a batch is not the mean of its micro-batches' losses",
            where=f"{file.path}, loss(outputs, targets)",
            why=f"{samples} samples have {found:.6g}, their halves {', '.join(f'{p:.6g}' for p in parts)}"
            + (": it is a sum" if summed else ""),
            fix="return a mean, and say with weight(inputs, targets) over how much: what is not ignored, or its weight",
        )


def _loss(file: ModelFile, model: torch.nn.Module, drawn: Drawn) -> torch.Tensor:
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    drawn = drawn.clone().on(where)
    args, keywords = drawn.arguments()
    with unchanged_buffers(model), autocast(file.precision, drawn.given):
        return file.loss(model(*args, **keywords), drawn.targets)


def zero(result: Any) -> torch.Tensor:
    """Return a loss of zero that has a gradient of zero, for a micro-batch of which nothing counts."""
    parts = [tensor.nan_to_num().sum() * 0.0 for tensor in tensors(result) if tensor.requires_grad]
    return sum(parts[1:], start=parts[0])
