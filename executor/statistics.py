"""Buffers that layers change while they train (batch norm's statistics), where several stages would change them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from executor.layers import LayeredModel
from executor.torch_adapter import mutated
from planner.basis.errors import USAGE, PlanError
from planner.values.plan import Plan


def check_whole(path: str, layered: LayeredModel, plan: Plan) -> None:
    """Raise `PlanError` (exit 2) where a module that counts statistics is called in several stages.

    Its parameters' gradients are added up, but statistics follow one after the other: each stage would have its own.
    """
    names = {id(tensor): name for name, tensor in layered.model.named_buffers()}
    stages: dict[int, set[int]] = {}
    for stage, own in enumerate(plan.layer_ranges([layer.name for layer in layered.layers])):
        for i in own:
            for buffer in changed_by(layered.layers[i].module):
                stages.setdefault(id(buffer), set()).add(stage)
    apart = sorted(names.get(buffer, "a buffer") for buffer, held in stages.items() if len(held) > 1)
    if apart:
        raise PlanError(
            what="several stages would count the same statistics, each its own",
            where=f"{path}, plan {plan}",
            why=f"a module is called several times, and {apart[0]} is changed in more than one stage",
            fix="run a plan that has all its calls in one stage: plan simulate --k 1, or data-parallel",
            code=USAGE,
        )


def changed_by(module: nn.Module) -> Sequence[torch.Tensor]:
    """Return the buffers that a module's forward changes."""
    found: list[torch.Tensor] = []
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            written = [target for node in part.graph.nodes for target in _written(node)]
            found += [part.get_buffer(str(target.target)) for target in written if target.op == "get_attr"]
        elif isinstance(part, nn.modules.batchnorm._NormBase) and part.training and part.track_running_stats:
            found += part.buffers(recurse=False)
    return found


def _written(node: fx.Node) -> list[fx.Node]:
    """Return what a node writes into. Batch norm's schema keeps silent about its running statistics."""
    if node.op != "call_function":
        return []
    if node.target is torch.ops.aten.batch_norm.default:
        statistics, training = node.args[3:5], node.args[5]
        return [own for own in statistics if isinstance(own, fx.Node)] if training else []
    target = mutated(node)
    return [] if target is None else [target]
