"""What is to be profiled: a model file's model, cut and checked, in memory or too large for it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from executor import averaging, devices
from executor.agreement import BACKWARD, SLOW_S, Allowance, agree
from executor.batch import tensors
from executor.evaluated import SAMPLES as EVALUATED
from executor.evaluated import agree_evaluated
from executor.hollow import build, built_within, held_bytes, hollow
from executor.layers import LayeredModel, cut, unchanged_buffers
from executor.model_file import ModelFile
from executor.precision import autocast
from planner.basis.errors import DEVICE, PlanError
from planner.basis.units import size
from planner.costs.host_room import fitting
from profiles.dataless import without_data
from profiles.kinds import Kinds, every, find

STATES = 6
"""Times the parameters' bytes that profiling a model in memory takes: themselves, gradients, and two moments for the
layers and for the unsplit model."""
ALONE = 4
"""Times a layer's bytes that it takes alone: itself, its gradients, and two moments."""
SHARE = 0.8
"""Of the free memory, for that; the rest is for activations."""
CHECKS_S, CHECKS = 30.0, 0.5
"""Seconds for comparing the cut model with the whole one, or where that is more, the share of a budget."""
QUICK_S = 1.0
"""Seconds per sample under which a model is run to find its kinds of layers; others are looked at without data."""


_REFUSING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that has been cut; `resident` if its parameters are in memory, and it was compared with its cut.

    `sample_s` are the seconds of forward and backward per sample, roughly, as that comparison took; 0 without.
    `build_s` is what a process takes to get as far. `unchecked` says in words what was not compared, for want of time,
    and `late_s` by how much comparing took longer than it may beside a budget.
    """

    file: ModelFile
    layered: LayeredModel
    resident: bool
    sample_s: float
    build_s: float
    unchecked: tuple[str, ...] = ()
    late_s: float = 0.0

    def kinds(self, *, fold: bool) -> Kinds:
        """Return its kinds of layers; unless they are to be folded, each layer is one."""
        if not fold:
            return every(self.layered)
        inputs, _ = self.layered.parted(*self.file.draw(2, seed=0))
        found = without_data(self.layered, inputs, self._found) if self.sample_s > QUICK_S else None
        return found or self._found(inputs)

    def _found(self, inputs: tuple[torch.Tensor, ...]) -> Kinds:
        return find(self.layered, inputs)


def prepare(file: ModelFile, kind: str, *, one_by_one: bool | None = None, budget_s: float = float("inf")) -> Subject:
    """Build the model, cut it, and compare it with its cut, if it fits into memory: as far as there is time.

    Comparing takes `CHECKS_S`, or half of a longer budget, and one forward of one sample whatever it takes.
    `one_by_one` says whether it is to be treated as if it did not; None decides. Raises `PlanError` when it fails.
    """
    begun = time.monotonic()
    model = build(file, seed=0) if one_by_one else file.build(0) if one_by_one is False else _fitting(file, kind)
    layered = cut(file, model)
    build_s, sample_s = time.monotonic() - begun, 0.0
    resident = not hollow(model)
    if not resident:
        check_layers(layered, kind)
    allowance = Allowance(max(CHECKS_S, CHECKS * budget_s))
    if resident:
        sample_s = agree(file, layered, allowance)
        _compare_losses(file, layered, sample_s, allowance)
    return Subject(
        file=file,
        layered=layered,
        resident=resident,
        sample_s=sample_s,
        build_s=build_s,
        unchecked=tuple(allowance.left_out),
        late_s=max(0.0, allowance.spent - CHECKS_S),
    )


def _compare_losses(file: ModelFile, layered: LayeredModel, sample_s: float, allowance: Allowance) -> None:
    """Check how losses of micro-batches add up, and the model as it is evaluated."""
    slow, forward_s = sample_s > SLOW_S, sample_s / (1.0 + BACKWARD)
    samples = 2 if slow else averaging.SAMPLES
    said = "whether the loss of a batch is the mean of its micro-batches' was not checked"
    if allowance.allows(averaging.forwards(file, samples) * forward_s, otherwise=said):
        averaging.check(file, layered.model, samples)
    if file.evaluate is not None:
        samples = 1 if slow else EVALUATED
        said = "the model cut in evaluation mode was not compared with the whole one"
        if allowance.allows(2 * samples * forward_s, otherwise=said):
            agree_evaluated(file, layered, samples)


def check_batch(file: ModelFile) -> None:
    """Refuse a batch of which inputs and targets alone are more than this host has memory, or than the data has.

    Raises `PlanError`, exit 5 or 2.
    """
    epoch = file.data.source.samples if file.data is not None else None
    if epoch is not None and epoch < file.batch_size:
        assert file.data is not None
        raise file.data.source.too_short(epoch, file.batch_size)
    samples, memory = 2, devices.memory_bytes("cpu")
    drawn = file.drawn(samples, seed=0)
    taken = sum(t.nbytes for t in tensors((drawn.given, drawn.targets))) / samples * file.batch_size
    if taken > memory:
        raise PlanError(
            what="a step's batch is too large for this host's memory",
            where=f"{file.path}, batch_size",
            why=f"{file.batch_size:,} samples take {size(taken)} of inputs and targets alone, and the host has "
            f"{size(memory)}",
            fix=f"batch_size = {fitting(memory * file.batch_size / taken)}",
            code=DEVICE,
        )


def check_layers(layered: LayeredModel, kind: str) -> None:
    """Raise `PlanError` (exit 5) where a layer is too much that is to be alone in memory, with gradients and state.

    These are counted as two moments of an optimizer, as Adam has.
    """
    largest = max(layered.layers, key=lambda layer: held_bytes(layer.module))
    needed, free = ALONE * held_bytes(largest.module), min(devices.free_bytes("cpu"), devices.free_bytes(kind))
    if needed > free:
        raise PlanError(
            what="the model is too large for this host's memory",
            where=f"layer '{largest.name}'",
            why=f"one layer at a time is held, and this one takes {size(needed)} with gradients and two moments; "
            f"{size(free)} are free",
            fix="cut it into smaller layers (layers(model) in the model file), or profile where there is more memory",
            code=DEVICE,
        )


def _fitting(file: ModelFile, kind: str) -> nn.Module:
    """The model, without storage where profiling it whole would need more memory than there is."""
    return built_within(file, 0, SHARE * min(devices.free_bytes("cpu"), devices.free_bytes(kind)) / STATES)


def crowds(subject: Subject, processes: int) -> bool:
    """Whether so many processes can hold the model and its gradients at once."""
    return processes * 3 * held_bytes(subject.layered.model) <= SHARE * devices.free_bytes("cpu")


def needs_two(file: ModelFile, model: nn.Module) -> bool:
    """Whether a model that runs with two samples does not with one: batch norm has no variance of a single number.

    That is asked of the model itself: a captured graph has the operation, and not the question before it.
    """
    if file.batch_size < 2 or not any(isinstance(module, _REFUSING) for module in model.modules()):
        return False
    drawn = file.drawn(1, seed=0)
    args, keywords = drawn.arguments()
    try:
        quiet = torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged_buffers(model)
        with quiet[0], quiet[1], quiet[2], autocast(file.precision, drawn.given):
            model(*args, **keywords)
    except Exception as error:
        return "more than 1 value per channel" in str(error)
    return False


def dtype_of(model: torch.nn.Module) -> str:
    """The dtype of most of a model's parameters."""
    counts: dict[torch.dtype, int] = {torch.get_default_dtype(): 0}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")
