"""Which labels count: those that are not ignored, without those at a sequence's ends that a causal model shifts away.

    labels            7  3  9 -100 4
    a causal model       3  9      4     predicts each from those before it, so nobody predicts the first

Which ends a loss leaves out is found from what it does, on labels of which few are left; nobody's class name says it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from executor.batch import Drawn, tensors
from executor.torch_adapter import pytree
from executor.user_code import IGNORED
from planner.basis.errors import RUN_FAILED, PlanError

LABELS = "labels"
"""The targets' name where they are among the inputs of a model that returns its own loss, as in transformers."""
ROUNDING = 1e-4
"""Relative differences of means of the same numbers that are rounding; with numbers of few digits more is."""

Ends = tuple[int, int]
"""How many labels at the beginning and at the end of every sequence count nowhere."""
NO_ENDS = (0, 0)
LossOf = Callable[[Drawn], torch.Tensor]


def labels_of(part: Drawn) -> torch.Tensor | None:
    """Return the integers of which a batch's loss is a mean; None where there are none, or none could be ignored.

    Of several tensors it is the one of which some are ignored here: all weigh the same where none is.
    """
    found = _could_be(part)
    some = _ignoring(found) if len(found) > 1 else found
    return next(iter(some or found), None)


def check_one(path: str, part: Drawn) -> None:
    """Raise `PlanError` (exit 6) where several targets ignore different samples: which of them weigh, nobody knows."""
    found = _could_be(part)
    some = _ignoring(found) if len(found) > 1 else []
    if any(one.shape != some[0].shape or not torch.equal(one == IGNORED, some[0] == IGNORED) for one in some[1:]):
        raise PlanError(
            what="several targets of a batch are ignored, each elsewhere",
            where=f"{path}, loss(outputs, targets)",
            why=f"{len(some)} tensors of targets have -100, so that nobody knows how much a micro-batch weighs",
            fix="define weight(inputs, targets) in the model file: over how much the loss of a micro-batch is a mean",
            code=RUN_FAILED,
        )


def _could_be(part: Drawn) -> list[torch.Tensor]:
    pool = part.given.get(LABELS) if part.targets is None and isinstance(part.given, dict) else part.targets
    whole = [t for t in tensors(pool) if not (t.is_complex() or t.is_floating_point() or t.dtype == torch.bool)]
    return [tensor for tensor in whole if torch.iinfo(tensor.dtype).min < 0]


def _ignoring(labels: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in labels if bool((tensor == IGNORED).any())]


def ignores(part: Drawn) -> bool:
    """Whether some of a batch's sequences of labels are ignored, so that it matters which of their ends count."""
    labels = labels_of(part)
    return labels is not None and labels.dim() > 1 and bool((labels == IGNORED).any())


def share(labels: torch.Tensor, ends: Ends = NO_ENDS) -> float:
    """Return the share of labels that count."""
    if labels.dim() > 1:
        labels = labels[:, ends[0] : labels.shape[1] - ends[1]]
    return float((labels != IGNORED).sum()) / max(1, labels.numel())


def ends_of(part: Drawn, loss_of: LossOf) -> Ends:
    """Return which ends of a batch's sequences of labels count nowhere, as `loss_of` the batch with other labels shows.

    A loss of none is no number, or that of other things; with one more column it is another one if that counts.
    """
    labels = labels_of(part)
    assert labels is not None, "who asks knows that there are some"
    whole = _filled(labels)

    def loss(first: int, last: int) -> torch.Tensor:
        left = torch.full_like(whole, IGNORED)
        left[:, first:last] = whole[:, first:last]
        return loss_of(_with(part, left))

    none, length = loss(0, 0), whole.shape[1]
    if _same(loss(0, length), none):
        return NO_ENDS  # they are not read here: a decoder's input, which all count
    before = next(n for n in range(length) if not _same(loss(0, n + 1), none))
    behind = next(n for n in range(length) if not _same(loss(length - n - 1, length), none))
    return before, behind


def check_mean(path: str, part: Drawn, loss_of: LossOf, ends: Ends, room: float = ROUNDING) -> None:
    """Check on one batch's outputs that its loss is a mean over the labels that count, each as much as any other.

    Raises `PlanError` (exit 6) when it is not: micro-batches would be weighed wrongly, and another model trained.
    """
    labels = labels_of(part)
    assert labels is not None, "who asks knows that there are some"
    whole = _filled(labels)
    row, column = (torch.arange(size, device=whole.device) for size in whole.shape[:2])
    some = column[None, :] % (2 + row[:, None] % 2) == 0  # more of one sample than of the next
    some = some.reshape(*some.shape, *[1] * (whole.dim() - 2)).expand_as(whole)
    parts = [torch.where(chosen, whole, IGNORED) for chosen in (some, ~some)]
    weights = [share(own, ends) for own in parts]
    if not all(weights):
        return
    together, *apart = [loss_of(_with(part, own)) for own in (whole, *parts)]
    found, losses = float(together), [float(loss) for loss in apart]
    room = max(room, 4 * torch.finfo(together.dtype).eps)
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    if abs(found - expected) > room * max(abs(found), abs(expected)):
        raise PlanError(
            what="the loss is not the mean over the targets that are not ignored",
            where=f"{path}, loss(outputs, targets)",
            why=f"it is {found:.6g} over all of them, and by halves it would be {expected:.6g}",
            fix="define weight(inputs, targets) in the model file: over how much the loss of a micro-batch is a mean",
            code=RUN_FAILED,
        )


def _filled(labels: torch.Tensor) -> torch.Tensor:
    """Labels of which none is ignored."""
    known = labels[labels != IGNORED]
    return torch.where(labels == IGNORED, known[0] if known.numel() else torch.zeros_like(labels[0, 0]), labels)


def _with(part: Drawn, labels: torch.Tensor) -> Drawn:
    """A batch with other labels."""
    if part.targets is None:
        return dataclasses.replace(part, given={**part.given, LABELS: labels})
    before = labels_of(part)
    return dataclasses.replace(part, targets=pytree.tree_map(lambda t: labels if t is before else t, part.targets))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isfinite(), other.isfinite())
