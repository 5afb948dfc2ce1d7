"""Llama in plain torch: 7B as published (arXiv 2302.13971), or `small` with the same layers; and transformers' own."""

import os

import torch
from torch import nn

SAMPLES, TOKENS = int(os.environ.get("LLAMA_BATCH", "4")), int(os.environ.get("LLAMA_TOKENS", "128"))
DTYPE = getattr(torch, os.environ.get("LLAMA_DTYPE", "float32"))
WORDS = 32000

batch_size = SAMPLES


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        frequencies = 10000.0 ** -(torch.arange(0, width // heads, 2) / (width // heads))
        angles = torch.outer(torch.arange(TOKENS), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate pairs of numbers by their position's angles."""
        left, right = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-right, left), dim=-1) * self.sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend to what came before."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP, each beside a residual."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.before, self.attention = nn.RMSNorm(width, eps=1e-6), Attention(width, heads)
        self.between = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add both."""
        x = x + self.attention(self.before(x))
        inside = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(inside)) * self.up(inside))


class Llama(nn.Module):
    """Words, blocks, words."""

    def __init__(self, width: int, heads: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the scores of the next words."""
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model() -> nn.Module:
    """7B: 6,738,415,616 parameters."""
    return Llama(4096, 32, 11008, 32).to(DTYPE)


def small() -> nn.Module:
    """8 blocks of a sixteenth of the width."""
    return Llama(256, 4, 688, 8).to(DTYPE)


def transformers() -> nn.Module:
    """7B, as transformers has it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(DTYPE)
    try:
        return LlamaForCausalLM(LlamaConfig(use_cache=False))
    finally:
        torch.set_default_dtype(torch.float32)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and the words behind them."""
    words = torch.randint(WORDS, (n, TOKENS + 1))
    return words[:, :-1], words[:, 1:]
