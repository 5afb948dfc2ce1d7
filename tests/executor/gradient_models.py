"""Model files whose gradients are the user's own: autograd Functions and hooks. Picked as gradient_models.py:NAME."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

batch_size = 16


class Reverse(torch.autograd.Function):
    """What is trained against: a gradient reversal."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * gradient, None


reverse = Reverse.apply  # as most people write it


class Scale(torch.autograd.Function):
    """In the new style, of a parameter and a size, with a result that is no tensor; its backward is nobody's else."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, samples: int) -> tuple[torch.Tensor, int]:
        return x * weight, samples * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        return 2 * gradient * weight, 3 * (gradient * x).sum(0), None


class Through(torch.autograd.Function):
    """Takes a function, in which parameters may hide."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, function: Any) -> torch.Tensor:
        return function(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 0.5 * gradient, None


class Inplace(torch.autograd.Function):
    """Writes into what it takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * gradient


def head(out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, out))


class Adversary(nn.Module):
    """Learns labels, and unlearns domains (Ganin and Lempitsky, 2015); hooks change what the features learn."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.label, self.domain = head(4), head(2)
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, _ = Scale.apply(torch.relu(self.features(x)), self.weight, x.shape[0])
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient * 0.5)
            found.register_hook(lambda gradient: gradient + 0.01)
        return self.label(found), self.domain(reverse(found, 0.3))


def adversary() -> nn.Module:
    return Adversary()


def batch(n: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(n, 8)
    return inputs, (inputs[:, :4].argmax(1), inputs[:, :2].argmax(1))


def loss(outputs: tuple[torch.Tensor, torch.Tensor], targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    parts = zip(outputs, targets, strict=True)
    return torch.stack([nn.functional.cross_entropy(one, other) for one, other in parts]).sum()


class Odd(nn.Module):
    """A linear layer whose gradient is changed in some `way`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, nn.Linear(16, 16)
        if way == "module hooks":
            self.register_forward_hook(lambda module, taken, result: result + 1)
            self.register_full_backward_hook(lambda module, of_inputs, of_outputs: (of_inputs[0] * 0.25,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.inner(x)
        if self.way == "hook of a value" and made.requires_grad:
            factor = made.sigmoid().detach()
            made.register_hook(lambda gradient: gradient * factor)
        if self.way == "hook of nodes" and made.requires_grad:
            made.grad_fn.register_hook(
                lambda of_inputs, of_outputs: tuple(None if g is None else 2 * g for g in of_inputs)
            )
        if self.way == "function":
            made = Through.apply(made, torch.tanh)
        if self.way == "in place":
            made = Inplace.apply(made)
        return made


class Chain(nn.Module):
    """Four layers of which the third has odd gradients."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.into, self.middle, self.odd = nn.Linear(8, 16), nn.Linear(16, 16), Odd(way)
        self.label, self.domain = nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.odd(torch.relu(self.middle(torch.relu(self.into(x)))))
        return self.label(found), self.domain(found)


def module_hooks() -> nn.Module:
    return Chain("module hooks")


def hook_of_a_value() -> nn.Module:
    return Chain("hook of a value")


def function() -> nn.Module:
    return Chain("function")


def in_place() -> nn.Module:
    return Chain("in place")


class Warming(Chain):
    """Reverses more from step to step, which its loss does not show."""

    def __init__(self) -> None:
        super().__init__("")
        self.scale = 0.0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.scale += 0.1
        found = self.odd(torch.relu(self.middle(reverse(torch.relu(self.into(x)), self.scale))))
        return self.label(found), self.domain(found)


def warming() -> nn.Module:
    return Warming()
