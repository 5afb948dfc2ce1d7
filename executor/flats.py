"""Parameters laid out one behind the other and cut into equal shards; and the collectives over such flat tensors.

    parameters   a a a a a a | b b b | c c c c c          shards of three ranks, the last one filled up
    shards       0 0 0 0 0 1   1 1 1   1 2 2 2 2 -
    pieces       rank 1 has the last of a, all of b, the first of c

NCCL does both halves of an all-reduce in place. gloo has neither: its reduce-scatter is an all-reduce of a copy, its
gather needs a copy (torch 2.11 to 2.15), so there each shard is reduced to its owner, and sent by it to all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn


class Flat:
    """The layout of parameters of one dtype, of which the ranks of a group hold a shard each."""

    def __init__(self, named: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        self.named, self.group = dict(named), group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        first = next(iter(self.named.values()))
        self.like = torch.empty(1, dtype=first.dtype, device=first.device)
        """Stands for a parameter that is not there."""
        self.shapes = [p.shape for p in self.named.values()]
        sizes = [p.numel() for p in self.named.values()]
        self.starts = list(itertools.accumulate(sizes, initial=0))
        self.size = -(-self.starts[-1] // self.ranks)
        """Numbers of a shard."""

    def zeros(self) -> torch.Tensor:
        """Return a tensor with room for all parameters."""
        return torch.zeros(self.ranks * self.size, dtype=self.like.dtype, device=self.like.device)

    def empty(self) -> torch.Tensor:
        """Return a tensor with room for all parameters, with anything in it."""
        return torch.empty(self.ranks * self.size, dtype=self.like.dtype, device=self.like.device)

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of such a tensor."""
        return whole[self.rank * self.size : (self.rank + 1) * self.size]

    def views(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's part of such a tensor, in the parameter's shape."""
        places = zip(itertools.pairwise(self.starts), self.shapes, strict=True)
        return [whole[a:b].view(shape) for (a, b), shape in places]

    def pieces(self, shard: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what this rank's shard has of each parameter, of those of which it has anything."""
        first = self.rank * self.size
        found = {}
        for name, (a, b) in zip(self.named, itertools.pairwise(self.starts), strict=True):
            begin, end = max(a, first), min(b, first + self.size)
            if begin < end:
                found[name] = shard[begin - first : end - first]
        return found

    def begins(self) -> dict[str, int]:
        """Return behind how many of a parameter's numbers this rank's piece of it begins."""
        first = self.rank * self.size
        return {name: max(0, first - a) for name, a in zip(self.named, self.starts, strict=False)}

    def reduce_scatter(self, whole: torch.Tensor) -> None:
        """Add up a tensor over the ranks in place; each has the sum of its own shard then, and rubbish elsewhere."""
        reduce_scatter(whole, self.group)

    def gather(self, whole: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[dist.Work]:
        """Begin to fill a tensor, in which this rank's shard is there, with the shards of all; return what to await.

        Over another `group` of the same ranks, where there is one: what is done in a group is done by all in one order.
        """
        return gather(whole, group or self.group)


def reduce_scatter(whole: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Add up a tensor of as many equal shards as a group has ranks, in place: each rank has the sum of its own then."""
    parts = whole.chunk(dist.get_world_size(group))
    if dist.get_backend(group) == "nccl":
        dist.reduce_scatter_tensor(parts[dist.get_rank(group)], whole, group=group)
        return
    works = [dist.reduce(part, group_dst=r, group=group, async_op=True) for r, part in enumerate(parts)]
    for work in works:
        work.wait()


def gather(whole: torch.Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to fill such a tensor, of which this rank's shard is there, with the others'; return what to await."""
    parts = whole.chunk(dist.get_world_size(group))
    if dist.get_backend(group) == "nccl":
        return [dist.all_gather_into_tensor(whole, parts[dist.get_rank(group)], group=group, async_op=True)]
    return [dist.broadcast(part, group_src=r, group=group, async_op=True) for r, part in enumerate(parts)]


def by_kind(named: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> list[Flat]:
    """Lay out parameters, those of one dtype together, trained ones apart from frozen ones."""
    found: dict[tuple[torch.dtype, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        found.setdefault((parameter.dtype, parameter.requires_grad), {})[name] = parameter
    return [Flat(own, group) for own in found.values()]
