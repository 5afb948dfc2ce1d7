"""Models for the proof of gradients, small and with what is hard about each. Picked as proof_models.py:NAME."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

WIDTH, TOKENS, VOCABULARY, DEPTH = 16, 6, 24, 4
batch_size = 16


class Block(nn.Module):
    """A transformer's block with causal attention, which drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mixed(self.before(x)).chunk(3, dim=-1)
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        scores = (q @ k.transpose(1, 2) / math.sqrt(WIDTH)).masked_fill(~seen, -torch.inf)
        x = x + self.drop(self.out(torch.softmax(scores, dim=-1) @ v))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.between(x)))))


class Gpt(nn.Module):
    """Tokens in, the next ones' logits out; `tied` shares the embedding with the head."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(TOKENS))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt() -> nn.Module:
    return Gpt()


def tied() -> nn.Module:
    return Gpt(tied=True)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (n, TOKENS + 1))
    return tokens[:, :-1], tokens[:, 1:]


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Linear in the gradients, so that weights may be compared as closely as they are."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def normed() -> nn.Module:
    """Batch norms, whose statistics follow from all micro-batches in order, and dropout."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))


def normed_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 4, 8)
    return inputs, inputs[:, :, 0].argmax(dim=1)


def _example() -> ModuleType:
    """The U-Net of the examples, narrow."""
    path = Path(__file__).resolve().parents[2] / "examples" / "unet.py"
    spec = importlib.util.spec_from_file_location("unet_example", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    found.WIDTH = 4
    return found


def unet() -> nn.Module:
    built: nn.Module = _example().UNet()
    return built


def unet_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(n, 1, 8, 8)
    return images + 0.3 * torch.randn_like(images), images


def unet_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(outputs, targets)


def normed_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets)


gpt_bf16, tied_bf16, normed_bf16, unet_bf16 = gpt, tied, normed, unet
gpt_bf16_precision = tied_bf16_precision = normed_bf16_precision = unet_bf16_precision = "bf16"
normed_bf16_batch, unet_bf16_batch = normed_batch, unet_batch
normed_bf16_loss, unet_bf16_loss = normed_loss, unet_loss
