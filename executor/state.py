"""What a rank has to remember so that another can go on where it stopped, and how that one takes it up.

By name in the whole model, so that stages may lie otherwise then: weights and buffers, the optimizer's state and its
groups. By stage: schedulers, which are the same everywhere. By rank, for the same plan alone: what Python and numpy
draw from, and the statistics of a replica that is not the first. What torch draws in layers needs nothing
(`executor.noise`).
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata

from executor import checkpoint_files
from executor.checkpoints import Sound
from executor.rank import Rank
from executor.rates import Rates
from executor.stage import Stage
from planner.basis.errors import ARTEFACT, USAGE, PlanError

Groups = list[dict[str, Any]]


def tensors_of(me: Rank, rank: int) -> dict[str, Any]:
    """Return a rank's part of the model and of its optimizer: of the stages whose first holder it is, and its pieces.

    Pieces of what other ranks of a stage share are one-dimensional, and named by where they begin.
    """
    model = dict[str, torch.Tensor](me.unheld)
    state, pieces = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for stage in me.stages.values():
        first = me.plan.holders[stage.index][0] == rank
        if first:
            model |= _saved(stage)
        for name, entry in _states(stage).items():
            begin, shape = stage.begins.get(name), stage.updated[name].shape
            for key, value in entry.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if begin is not None and value.shape == shape:
                    pieces.setdefault(name, {})[key] = {str(begin): value}
                elif begin == 0 or (begin is None and first):
                    state.setdefault(name, {})[key] = value
    return {"model": model, "optimizer": {"state": state, "pieces": pieces}}


def rest_of(me: Rank, rates: Rates, rank: int) -> dict[str, Any]:
    """Return what else a rank has to remember."""
    groups, other = dict[int, Groups](), dict[str, dict[str, Any]]()
    for stage in me.stages.values():
        if stage.optimizer is not None:
            names = {id(parameter): name for name, parameter in stage.updated.items()}
            groups[stage.index] = [
                {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
                for group in stage.optimizer.param_groups
            ]
        for name, entry in _states(stage).items():
            other[name] = {key: value for key, value in entry.items() if not isinstance(value, torch.Tensor)}
    return {
        "groups": groups,
        "other": {name: entry for name, entry in other.items() if entry},
        "schedulers": {i: one.state_dict() for i, one in rates.schedulers.items() if i in groups},
        "scaling": None if me.scaling is None else (me.scaling.scale, me.scaling.updates),
        "extra": {name: state() for name, state in me.extra.items()},
        "buffers": {i: dict(stage.module.named_buffers()) for i, stage in me.stages.items()},
        "random": _random(me.backend.device),
    }


def check(me: Rank, rates: Rates, rank: int, where: str) -> None:
    """Raise `PlanError` where a run cannot be taken up again: something has to be remembered that is no plain value."""
    for name, value in rest_of(me, rates, rank).items():
        data = io.BytesIO()
        try:
            torch.save(value, data)
            torch.load(io.BytesIO(data.getvalue()), weights_only=True)
        except Exception as error:
            raise PlanError(
                what=f"the run cannot have checkpoints: the state of its {name} is more than numbers and tensors",
                where=where,
                why=str(error).strip().splitlines()[0],
                fix="keep plain values in it, or run without --checkpoint-every",
                code=USAGE,
            ) from error


def restore(me: Rank, rates: Rates, rank: int, found: Sound, steps: int) -> None:
    """Let a rank go on behind a checkpoint, in a run of so many steps.

    Raises `PlanError` (exit 4) where it is of another model.
    """
    manifest = found.manifest
    try:
        index = checkpoint_files.index_of(found.path)
        rests = [torch.load(path, weights_only=True) for path in sorted(found.path.glob("rank*.pt"), key=_number)]
    except Exception as error:
        raise _another(found.path, str(error).strip().splitlines()[0]) from error
    _restore_model({name: tensor.detach() for name, tensor in me.unheld.items()}, found.path, index)
    with me.whole(), torch.no_grad():
        for stage in me.stages.values():
            _restore_model(_saved(stage), found.path, index)
            stage.take_over()
    own = {i: stage for i, stage in me.stages.items() if stage.optimizer is not None}
    replayed = bool(rates.schedulers) and steps != manifest.steps  # made for another number of steps: see below
    for stage in own.values():
        _restore_groups(stage, rests if not replayed else [])
        _restore_optimizer(stage, found.path, index, rests)
    schedulers = {i: state for rest in rests for i, state in rest["schedulers"].items()}
    for i, scheduler in rates.schedulers.items():
        if replayed:  # as a run of this many steps would have come here
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of rates without updates
                for _ in range(manifest.step):
                    rates.step(i)
        elif schedulers:
            scheduler.load_state_dict(schedulers.get(i, next(iter(schedulers.values()))))
    if me.scaling is not None and rests[0]["scaling"] is not None:
        for mine, value in zip((me.scaling.scale, me.scaling.updates), rests[0]["scaling"], strict=True):
            mine.copy_(value)
    extra = {name: state for rest in reversed(rests) for name, state in rest["extra"].items()}
    for name, get in me.extra.items():
        module = getattr(get, "__self__", None)  # none where no stage of the rank holds it
        if module is not None and name in extra:
            module.set_extra_state(extra[name])
    me.course.done = manifest.step
    me.feed.start(manifest.step)
    if manifest.plan == me.plan:
        for i, buffers in rests[rank]["buffers"].items():
            present = dict(me.stages[i].module.named_buffers())
            for name, value in buffers.items():
                present[name].copy_(value)
        _set_random(rests[rank]["random"], me.backend.device)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the whole model's state dict of a checkpoint, for `model.load_state_dict`; no process group is needed."""
    index = checkpoint_files.index_of(path)
    model: dict[str, torch.Tensor] = {}
    for name, (kind, *names) in (index.planner_data or {}).items():
        if kind == "model":
            known: Any = index.state_dict_metadata[name]
            model[names[0]] = torch.empty(known.size, dtype=known.properties.dtype)
    checkpoint_files.read(path, {"model": model})
    for rest in sorted(path.glob("rank*.pt"), key=_number, reverse=True):
        model |= torch.load(rest, weights_only=True)["extra"]
    return model


def _saved(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: getattr(*place).detach() for name, place in stage.saved.items()}


def _states(stage: Stage) -> dict[str, dict[str, Any]]:
    """What the optimizer remembers of each parameter, by its name."""
    if stage.optimizer is None:
        return {}
    state = stage.optimizer.state
    return {name: state[parameter] for name, parameter in stage.updated.items() if state.get(parameter)}


def _restore_model(part: Mapping[str, torch.Tensor], path: Path, index: Metadata) -> None:
    """Fill tensors of the model, by name. Raises `PlanError` (exit 4) where the checkpoint has not these."""
    for name, tensor in part.items():
        known = index.state_dict_metadata.get(f"model.{name}")
        if getattr(known, "size", None) != tensor.shape:
            has = tuple(getattr(known, "size", ()))
            raise _another(path, f"{name} is {has if known else 'not in it'}, here {tuple(tensor.shape)}")
    checkpoint_files.read(path, {"model": part})


def _restore_groups(stage: Stage, rests: Sequence[Mapping[str, Any]]) -> None:
    """Give the groups of a stage's optimizer the options that those of its parameters had."""
    optimizer = stage.optimizer
    assert optimizer is not None
    saved = [groups for rest in rests for groups in rest["groups"].values()]
    by_name = {name: group for groups in saved for group in groups for name in group["params"]}
    names = {id(parameter): name for name, parameter in stage.updated.items()}
    alike = next((groups for groups in saved if len(groups) == len(optimizer.param_groups)), None)
    for i, group in enumerate(optimizer.param_groups):
        own = next((by_name[names[id(p)]] for p in group["params"] if names[id(p)] in by_name), None)
        own = own or (alike[i] if alike is not None else {})
        group.update({key: value for key, value in own.items() if key != "params"})


def _restore_optimizer(stage: Stage, path: Path, index: Metadata, rests: Sequence[Mapping[str, Any]]) -> None:
    """Give a stage's optimizer what is remembered of its parameters, or of the pieces that are this rank's now."""
    optimizer = stage.optimizer
    assert optimizer is not None
    updated, begins = stage.updated, stage.begins
    on_host = {
        id(p): not (group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    places: dict[tuple[str, ...], Any] = {
        place: index.state_dict_metadata[name]
        for name, place in (index.planner_data or {}).items()
        if place[0] == "optimizer" and place[2] in updated and id(updated[place[2]]) in on_host
    }
    read: dict[str, Any] = {}
    tensors: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for (_, kind, name, key, *begin), known in places.items():
        parameter, first = updated[name], int(begin[0]) if begin else 0
        mine = begins.get(name, 0)
        if begin and (first + known.size[0] <= mine or mine + parameter.numel() <= first):
            continue  # another rank's
        # As Optimizer.load_state_dict has it: the number of steps is on the host unless it is asked for.
        host = key == "step" and on_host[id(parameter)]
        made = torch.empty(known.size, dtype=known.properties.dtype, device="cpu" if host else parameter.device)
        tensors.setdefault(name, {}).setdefault(key, {})[first] = made
        under = read.setdefault(kind, {}).setdefault(name, {})
        if begin:
            under.setdefault(key, {})[begin[0]] = made
        else:
            under[key] = made
    if read:
        checkpoint_files.read(path, {"optimizer": read})
    others = {name: entry for rest in rests for name, entry in rest["other"].items()}
    for name, parameter in updated.items():
        entry = dict(others.get(name, {}))
        for key, found in tensors.get(name, {}).items():
            entry[key] = part(found, parameter, begins.get(name, 0), stage.named[name])
        if entry:
            optimizer.state[parameter] = entry


def part(found: Mapping[int, torch.Tensor], parameter: torch.Tensor, begin: int, whole: torch.Tensor) -> torch.Tensor:
    """Put together a parameter's tensor, or that of a piece of it, of tensors that begin where they do in the whole."""
    first = found.get(0)
    if first is not None and len(found) == 1 and (first.shape == parameter.shape or first.numel() != whole.numel()):
        return first  # as it was; or none of its numbers is one of the parameter's
    made = next(iter(found.values())).new_empty(parameter.numel())
    for start, tensor in found.items():
        a, b = max(start, begin), min(start + tensor.numel(), begin + parameter.numel())
        if a < b:
            made[a - begin : b - begin] = tensor.reshape(-1)[a - start : b - start]
    return made.view(parameter.shape)


def _random(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = numpy.random.get_state()
    found = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, list(map(int, keys)), *rest)}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("rank"))


def _another(path: Path, why: str) -> PlanError:
    return PlanError(
        what="the checkpoint is of another model",
        where=str(path),
        why=why,
        fix="go on with the model that was trained, or begin again without --resume",
        code=ARTEFACT,
    )
