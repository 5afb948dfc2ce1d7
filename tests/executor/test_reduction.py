"""Buckets of gradients in one process: what is kept where, and what has no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from executor.reduction import Buckets


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
    buckets = Buckets(parameters, alone, bucket_bytes)
    sum(p.sum() * (i + 1) for i, p in enumerate(parameters)).backward()
    buckets.reduce()
    assert [flat.numel() for flat in buckets.flats] == [sizes[0] + len(parameters), *sizes[1:]]
    assert buckets.flats[0][0] == 3.0
    assert all(torch.equal(p.grad, torch.full_like(p, i + 1)) for i, p in enumerate(parameters) if p.grad is not None)


def test_gradients_are_parts_of_their_bucket(alone: dist.ProcessGroup) -> None:
    """Later backwards add to it without a copy; a bucket has one dtype."""
    parameters = trained(torch.float32, torch.bfloat16)
    buckets = Buckets(parameters, alone, 0)
    for _ in range(2):
        sum(p.float().sum() for p in parameters).backward()
        buckets.reduce()
    assert [flat.dtype for flat in buckets.flats] == [torch.bfloat16, torch.float32]
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in parameters if p.grad is not None)
    buckets.clear()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_what_a_step_does_not_use_has_no_gradient_in_it(alone: dist.ProcessGroup) -> None:
    """As in one process: zeros would let an optimizer with momentum or decay go on updating it."""
    always, late, never = trained(torch.float32, torch.float32, torch.float32)
    buckets = Buckets((always, late, never), alone, 0)
    optimizer = torch.optim.SGD([always, late, never], lr=0.1, weight_decay=0.5)
    expected = 1.0
    for uses in (False, True, False, False, True):
        before = None if always.grad is None else always.grad.data_ptr()
        (always.sum() + late.sum() if uses else always.sum()).backward()
        buckets.reduce()
        assert always.grad is not None
        assert before in (None, always.grad.data_ptr())
        assert torch.equal(always.grad, torch.ones(10))
        assert (late.grad is not None) == uses
        assert never.grad is None
        optimizer.step()
        expected -= 0.1 * (1 + 0.5 * expected) if uses else 0.0
        assert late[0].item() == pytest.approx(expected)
        buckets.clear()
    assert [flat.numel() for flat in buckets.flats] == [10 + 3, 10]
    assert torch.equal(never, torch.ones(10))


def test_a_step_that_uses_nothing(alone: dist.ProcessGroup) -> None:
    (one,) = trained(torch.float32)
    buckets = Buckets([one], alone, 0)
    buckets.reduce()
    buckets.clear()
    assert one.grad is None
    one.sum().backward()
    buckets.reduce()
    assert torch.equal(one.grad, torch.ones(10))  # type: ignore[arg-type]
