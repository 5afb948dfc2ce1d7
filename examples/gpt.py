"""A small GPT that learns to continue Python: next-character loss on the sources of Python's own standard library.

plan profile examples/gpt.py
plan profile examples/gpt.py --sequence 128 --sequence 512
"""

import functools
import pathlib
import statistics as _any_standard_library_module

import torch
from torch import nn

CONTEXT = 512  # characters at most
WIDTH = 128
HEADS = 4
BLOCKS = 8
VOCABULARY = 128  # ASCII; everything else becomes a space

batch_size = 64


class Embedding(nn.Module):
    """Characters and their positions as vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.token(characters) + self.position.weight[: characters.shape[1]]


class Block(nn.Module):
    """Attention to earlier characters, then a feed-forward layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, length, width = x.shape
        heads = self.queries_keys_values(self.norm1(x)).view(samples, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(samples, length, width))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """Embedding, blocks, and a head that gives the next character's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(characters))))


def model() -> nn.Module:
    """The model, with random weights."""
    return GPT()


@functools.cache
def text() -> torch.Tensor:
    """All top-level modules of the standard library, one after another."""
    folder = pathlib.Path(_any_standard_library_module.__file__).parent
    source = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    characters = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    return torch.where(characters < VOCABULARY, characters, ord(" "))


def batch(n: int, sequence: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """n random pieces of the text of so many characters, and the same one character later."""
    starts = torch.randint(0, len(text()) - sequence - 1, (n, 1))
    pieces = text()[starts + torch.arange(sequence + 1)].long()
    return pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next character, in nats."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def optimizer(parameters):
    """AdamW, as GPTs are trained."""
    return torch.optim.AdamW(parameters, lr=3e-3)
