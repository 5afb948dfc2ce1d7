"""Buffers that layers change while they train (batch norm's statistics): one is changed inside one layer alone.

Gradients of a shared parameter are added up, but statistics follow one after the other: of two stages that change them
each would have its own. So calls of a module that counts statistics, and what lies between, are not cut apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import fx, nn

from executor.torch_adapter import mutated


def together(changed: Iterable[Iterable[Hashable]]) -> set[int]:
    """Return the places in a row before which it cannot be cut: what is `changed` on both sides, by some name of it.

    >>> together([["mean"], [], ["mean", "other"], ["other"], []])
    {1, 2, 3}
    """
    first: dict[Hashable, int] = {}
    found: set[int] = set()
    for place, names in enumerate(changed):
        for name in names:
            found.update(range(first.setdefault(name, place) + 1, place + 1))
    return found


def changed_by(module: nn.Module) -> Sequence[torch.Tensor]:
    """Return the statistics that a module's forward changes."""
    counting = (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._NormBase))
    return [b for part in counting if part.training and part.track_running_stats for b in part.buffers(recurse=False)]


def written(node: fx.Node) -> list[fx.Node]:
    """Return what a node writes into. Batch norm's schema keeps silent about its running statistics."""
    if node.op != "call_function":
        return []
    if node.target is torch.ops.aten.batch_norm.default:
        statistics, training = node.args[3:5], node.args[5]
        return [own for own in statistics if isinstance(own, fx.Node)] if training else []
    target = mutated(node)
    return [] if target is None else [target]
