"""A model as it is evaluated: cut once more in evaluation mode, and dealt to the stages that train it.

A graph that was captured in training mode drops out and counts statistics for ever, and has taken the training side of
every `if self.training`. So a captured model is captured again, and cut at its modules' borders as before; each of the
new layers goes to the stage that holds its parameters. Modules in a list just change their mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from executor.agreement import close, room
from executor.batch import Drawn
from executor.capture import EXAMPLE
from executor.hollow import harmless, is_hollow
from executor.layers import CapturedLoss, LayeredModel, cut_graph, unchanged_buffers
from executor.model_file import ModelFile
from executor.modes import evaluating
from executor.outputs import Outputs, changed, read_by
from executor.precision import autocast
from executor.user_code import explained
from planner.basis.errors import PlanError
from planner.values.plan import Plan

SAMPLES, SEED = 3, 0


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model cut in evaluation mode. `outputs` tells where in its outputs are the tensors that its graph returns."""

    file: ModelFile
    layered: LayeredModel
    outputs: Outputs | None = None

    def judged(self, loss: Any, result: Any, part: Drawn, device: torch.device) -> tuple[float, dict[str, float]]:
        """Return the loss and the metrics of what the last layer returns for a micro-batch, and its targets.

        `loss` is the cut model's, on the device of `result`.
        """
        part = part.on(device)
        _, targets = self.layered.parted(part.inputs, part.targets)
        if isinstance(loss, CapturedLoss):
            found, *picked = loss.judged(result, targets)
            outputs = self.outputs.filled(tuple(picked)) if self.outputs is not None else None
        else:
            with explained(self.file.path, "loss(outputs, targets)"):
                found, outputs = loss(result, targets), result
        return float(found), metrics_of(self.file, outputs, part)

    def loss_of(self, loss: Any, result: Any, part: Drawn, device: torch.device) -> torch.Tensor:
        """Return the loss alone."""
        part = part.on(device)
        _, targets = self.layered.parted(part.inputs, part.targets)
        with explained(self.file.path, "loss(outputs, targets)"):
            found: torch.Tensor = loss(result, targets)
        return found


def cut_evaluated(file: ModelFile, layered: LayeredModel) -> Evaluated:
    """Cut a model that has been cut for training as it runs in evaluation mode. Its parameters are the same tensors.

    Raises `PlanError` when its forward cannot be followed.
    """
    if layered.surroundings is None:  # modules, which have a mode themselves
        return Evaluated(file=file, layered=layered)
    model, drawn = layered.model, file.drawn(EXAMPLE, SEED)
    with (
        evaluating(model),
        torch.random.fork_rng(devices=[]),
        unchanged_buffers(model),
        explained(file.path, "the model's forward in evaluation mode"),
    ):
        outputs = _looked_at(file, model, drawn) if file.metrics is not None else None
        return Evaluated(file=file, layered=cut_graph(file, model, drawn, outputs), outputs=outputs)


def _looked_at(file: ModelFile, model: nn.Module, drawn: Drawn) -> Outputs:
    """Return which tensors of the model's outputs metrics look at. Whatever has no data gets some: any will do."""
    args, keywords = drawn.arguments()
    make = harmless(torch.device("cpu"))
    with torch.no_grad(), autocast(file.precision, drawn.given):
        outputs = changed(model(*args, **keywords), lambda tensor: make(tensor) if is_hollow(tensor) else tensor)
        return read_by(outputs, lambda given: metrics_of(file, given, drawn))


def metrics_of(file: ModelFile, outputs: Any, part: Drawn) -> dict[str, float]:
    """Return what the model file's `metrics` says of a micro-batch; nothing where it has none.

    A batch that is one dict has its targets among its inputs: then these are what `metrics` gets. Raises `PlanError`
    when it fails or does not return numbers by name.
    """
    if file.metrics is None:
        return {}
    targets = part.given if part.targets is None else part.targets
    with explained(file.path, "metrics(outputs, targets)"):
        found = file.metrics(outputs, targets)
        try:
            return {str(name): float(value) for name, value in found.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise PlanError(
                what="metrics(outputs, targets) does not return numbers by name",
                where=file.path,
                why=str(error),
                fix='return a dict of means over the samples: {"accuracy": 0.5}',
            ) from error


def dealt(plan: Plan, layered: LayeredModel, evaluated: LayeredModel) -> list[range]:
    """Return the layers in evaluation mode that each stage of a plan runs: those whose parameters it trains.

    Names are mostly the same in both modes. A layer with another name goes to the first stage, not before the layer in
    front of it, that holds what it needs. Raises `PlanError` (exit 2) when there is none.
    """
    names = [layer.name for layer in layered.layers]
    ranges = plan.layer_ranges(names)
    stage_of = {names[i]: s for s, own in enumerate(ranges) for i in own}
    held = [{id(t) for i in own for t in _tensors(layered.layers[i].module)} for own in ranges]
    anywhere = set[int]().union(*held)
    at, last, homes = 0, len(ranges) - 1, list[int]()
    for layer in evaluated.layers:
        needs = {id(t) for t in _tensors(layer.module)} & anywhere
        first = last if layer is evaluated.layers[-1] else at  # the last stage has the loss
        able = [s for s in range(first, len(ranges)) if needs <= held[s]]
        if not able:
            raise PlanError(
                what="the model cannot be evaluated in the stages that train it",
                where=f"layer '{layer.name}' in evaluation mode",
                why=f"no stage of {plan} from stage {at} on holds all of the parameters that it reads: the model runs "
                "its modules in another order than in training mode",
                fix="run a plan of one stage (plan simulate --k 1), or train without: plan run --evaluate-every 0",
            )
        wanted = stage_of.get(layer.name, able[0])
        at = wanted if wanted in able else able[0]
        homes.append(at)
    bounds = [next((i for i, home in enumerate(homes) if home >= s), len(homes)) for s in range(len(ranges) + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _tensors(module: nn.Module) -> Sequence[torch.Tensor]:
    return (*module.parameters(), *module.buffers())


def agree_evaluated(file: ModelFile, layered: LayeredModel, samples: int = SAMPLES) -> None:
    """Check that a model cut in evaluation mode computes what the whole one does: loss and metrics of so many samples.

    Raises `PlanError` (exit 2) that says what differs.
    """
    evaluated, model = cut_evaluated(file, layered), layered.model
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    drawn = file.drawn(samples, SEED).on(where)
    inputs, _ = evaluated.layered.parted(drawn.inputs, drawn.targets)
    stage = evaluated.layered.stage(range(len(evaluated.layered.layers)))
    with evaluating(model), evaluating(stage), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        args, keywords = drawn.arguments()
        with explained(file.path, "the model's forward in evaluation mode"), autocast(file.precision, drawn.given):
            outputs = model(*args, **keywords)
            loss = float(file.loss(outputs, drawn.targets))
        expected = {"loss": loss} | metrics_of(file, outputs, drawn)
        torch.manual_seed(SEED)
        loss, metrics = evaluated.judged(evaluated.layered.loss, stage(*inputs), drawn, where)
    found = {"loss": loss} | metrics
    for name, value in expected.items():
        if not close(torch.tensor(found[name]), torch.tensor(value), torch.tensor(value), room(file)):
            raise PlanError(
                what="the layers do not compute in evaluation mode what the model computes",
                where=file.path,
                why=f"the {name} of a batch is {found[name]:.6g}, the model's {value:.6g}",
                fix="let layers(model) return every module in the order in which it is called, or leave it out",
            )
