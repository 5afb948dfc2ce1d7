"""An update on the host is the device's: here, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from executor.host_update import HostUpdate


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_same_digits(kind: type[torch.optim.Optimizer]) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2))

    plain, ours = model(), model()
    host = HostUpdate(dict(ours.named_parameters()))
    with torch.no_grad():  # values that come behind, as a stage's that shares parameters with another one
        for one in (plain, ours):
            one[0].weight.mul_(2.0)
    optimizers = kind(plain.parameters(), lr=0.1), kind(host.masters.values(), lr=0.1)
    for step in range(3):
        for one in (plain, ours):
            one(torch.full((2, 5), 1.0 + step)).sum().backward()
        if step:  # what has no gradient is left alone
            plain[2].weight.grad = ours[2].weight.grad = None
        optimizers[0].step()
        host.step(optimizers[1])
        plain.zero_grad()
        ours.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert not {id(p) for p in ours.parameters()} & {id(p) for p in optimizers[1].state}
