"""Buckets of gradients in one process: what is kept where, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from executor.reduction import Buckets
from planner.basis.errors import PlanError


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def trained(*dtypes: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(10, dtype=dtype)) for dtype in dtypes]


@pytest.mark.parametrize(("bucket_bytes", "sizes"), [(0, [30]), (1, [10, 10, 10]), (41, [20, 10]), (80, [20, 10])])
def test_buckets_fill_from_the_last_parameter(alone: dist.ProcessGroup, bucket_bytes: int, sizes: list[int]) -> None:
    parameters = trained(*[torch.float32] * 3)
    buckets = Buckets(parameters, alone, bucket_bytes, "here")
    sum(p.sum() * (i + 1) for i, p in enumerate(parameters)).backward()
    buckets.reduce()
    assert [flat.numel() for flat in buckets.flats] == sizes
    assert buckets.flats[0][0] == 3.0
    assert buckets.flats[-1][-1] == 1.0


def test_gradients_are_parts_of_their_bucket(alone: dist.ProcessGroup) -> None:
    """Later backwards add to it without a copy; a bucket has one dtype."""
    parameters = trained(torch.float32, torch.bfloat16)
    buckets = Buckets(parameters, alone, 0, "here")
    for _ in range(2):
        sum(p.float().sum() for p in parameters).backward()
        buckets.reduce()
    assert [flat.dtype for flat in buckets.flats] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in parameters if p.grad is not None)
    buckets.clear()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_a_parameter_that_some_steps_use_is_refused_by_name(alone: dist.ProcessGroup) -> None:
    first, second = trained(torch.float32, torch.float32)
    names = {id(first): "early.weight", id(second): "late.weight"}
    buckets = Buckets((first, second), alone, 0, "stage 0", names)
    first.sum().backward()
    buckets.reduce()
    assert second.grad is None
    second.sum().backward()
    with pytest.raises(PlanError, match=r"late\.weight had no gradient in the first step"):
        buckets.reduce()


def test_a_parameter_that_is_not_used_any_more_is_refused_by_name(alone: dist.ProcessGroup) -> None:
    """Zeros in its bucket would let an optimizer with momentum or decay go on updating it."""
    first, second = trained(torch.float32, torch.float32)
    buckets = Buckets((first, second), alone, 0, "stage 0", {id(second): "late.weight"})
    for _ in range(2):
        (first.sum() + 0.0 * second.sum()).backward()
        buckets.reduce()
        buckets.clear()
    first.sum().backward()
    with pytest.raises(PlanError, match=r"late\.weight had a gradient in the first step and has none now"):
        buckets.reduce()
