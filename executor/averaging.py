"""How the losses of micro-batches add up to that of their batch, so that M changes nothing about what is trained.

A loss is a mean: over samples, or over what of the targets counts (words that are not ignored, weighted samples). A
micro-batch's loss then counts with its weight over the whole batch's, all replicas' together. `weight(inputs, targets)`
in the model file says how much a batch weighs; without it, integer targets of -100 do not count, as torch's losses
ignore them. Whether that is so is checked before a profile is measured.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from executor.batch import Drawn, tensors
from executor.model_file import ModelFile
from executor.modes import evaluating
from executor.precision import DTYPES, autocast
from executor.user_code import IGNORED, explained
from planner.basis.errors import RUN_FAILED, PlanError

SEED, SAMPLES = 0, 4
LABELS = "labels"
"""The targets' name where they are among the inputs of a model that returns its own loss, as in transformers."""
ROUNDING = 1e-3
"""Relative differences of losses that are rounding; with numbers of few digits more is."""


class Averaging:
    """What the micro-batches of one replica count, on the rank that has their losses.

    `group` joins the ranks that do, of several replicas; they agree in their first step on whether weights differ.
    """

    def __init__(self, file: ModelFile, group: dist.ProcessGroup | None, replicas: int, device: torch.device) -> None:
        self.file, self.group, self.replicas, self.device = file, group, replicas, device
        self.even: bool | None = None

    def factors(self, parts: list[Drawn]) -> list[float]:
        """Return what every micro-batch's loss is multiplied by; the mean over replicas of all of them is 1.

        Raises `PlanError` (exit 6) when weights differ that were all alike in the first step.
        """
        weights = [weight_of(self.file, part) for part in parts]
        alike = all(weight == parts[0].samples for weight in weights) and self.file.weight is None
        if self.even is None or self.group is None:  # who is alone asks nobody, and so in every step
            self.even = not self._any(not alike)
        if self.even:
            if not alike:
                raise PlanError(
                    what="targets are ignored that were not in the first step",
                    where=f"{self.file.path}, batch(n)",
                    why="replicas agree in their first step on whether their micro-batches count alike",
                    fix="define weight(inputs, targets) in the model file: how much a micro-batch counts",
                    code=RUN_FAILED,
                )
            return [1 / len(parts)] * len(parts)
        total = torch.tensor([sum(weights)], dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        whole = float(total) or 1.0
        return [self.replicas * weight / whole for weight in weights]

    def _any(self, found: bool) -> bool:
        if self.group is None:
            return found
        flag = torch.tensor([found], dtype=torch.uint8, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def weight_of(file: ModelFile, part: Drawn) -> float:
    """Return how much a micro-batch counts: as the model file says, else the share of its targets that count."""
    if file.weight is not None:
        with explained(file.path, "weight(inputs, targets)"):
            return float(file.weight(part.given, part.targets))
    targets = part.given.get(LABELS) if part.targets is None and isinstance(part.given, dict) else part.targets
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        return float(part.samples)
    return part.samples * float((targets != IGNORED).sum()) / max(1, targets.numel())


def check(file: ModelFile, model: torch.nn.Module, samples: int = SAMPLES) -> None:
    """Check that the loss of a batch of so many samples, two at least, is the mean of its halves', by weight.

    Raises `PlanError` (exit 2) when it is not: a loss that is a sum, or that ignores targets, would train another model
    with every M.
    """
    whole = file.drawn(samples, SEED)
    halves = whole.split(2)
    quiet = evaluating(model)  # what a batch's statistics or dropout change is not the loss's doing
    with quiet, torch.no_grad(), torch.random.fork_rng(devices=[]), explained(file.path, "loss(outputs, targets)"):
        loss, again, *losses = [_loss(file, model, part) for part in (whole, whole, *halves)]
    if abs(float(loss) - float(again)) > ROUNDING * abs(float(loss)):
        return  # it draws (the noise of a variational autoencoder), so one loss cannot be held against another
    found, parts = float(loss), [float(part) for part in losses]
    room = max(ROUNDING, 4 * torch.finfo(DTYPES.get(file.precision, loss.dtype)).eps)
    weights = [weight_of(file, half) for half in halves]
    expected = sum(w * p for w, p in zip(weights, parts, strict=True) if w) / (sum(weights) or 1.0)
    if abs(found - expected) > room * max(abs(found), abs(expected), 1e-6):
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
    with autocast(file.precision, drawn.given):
        return file.loss(model(*args, **keywords), drawn.targets)


def zero(result: Any) -> torch.Tensor:
    """Return a loss of zero that has a gradient of zero, for a micro-batch of which nothing counts."""
    parts = [tensor.nan_to_num().sum() * 0.0 for tensor in tensors(result) if tensor.requires_grad]
    return sum(parts[1:], start=parts[0])
