"""GPTs as Megatron-LM trained them in 2022 and 2023, for estimates: attention in separate kernels, with dropout.

Tensors are (sequence, samples, hidden) inside, as in Megatron. Its fused kernels are written as one operation of
torch where there is one: scaling and mask go into the product of queries and keys, so scores are read and written by
the softmax and the dropout only. Bias, GELU and bias-dropout-add are fused there and are not here: about 5 % of a
block's forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 51200
DROPOUT = 0.1


class Embedding(nn.Module):
    """Words and positions, with dropout: (samples, sequence) to (sequence, samples, hidden)."""

    def __init__(self, hidden: int, seq: int, vocabulary: int) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(vocabulary, hidden), nn.Embedding(seq, hidden)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        both = self.word(words) + self.position.weight[: words.shape[1]]
        return self.dropout(both.transpose(0, 1).contiguous())


class Block(nn.Module):
    """A transformer block (arXiv 1909.08053, figure 2)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.queries_keys_values = nn.Linear(hidden, 3 * hidden)
        self.projection = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.attention_dropout, self.dropout = nn.Dropout(DROPOUT), nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.projection(self.attention(self.queries_keys_values(self.norm1(x)))))
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm2(x)))))

    def attention(self, projected: torch.Tensor) -> torch.Tensor:
        seq, samples, width = projected.shape
        size = width // 3 // self.heads
        query, key, value = projected.view(seq, samples * self.heads, 3 * size).split(size, dim=2)
        mask = projected.new_zeros(1).expand(samples * self.heads, seq, seq)
        scores = torch.baddbmm(mask, query.transpose(0, 1), key.permute(1, 2, 0), alpha=size**-0.5)
        weights = self.attention_dropout(torch.softmax(scores, dim=-1))
        return torch.bmm(weights, value.transpose(0, 1)).transpose(0, 1).reshape(seq, samples, width // 3)


class Head(nn.Module):
    """The last normalisation and the logits: (samples, sequence, vocabulary)."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(x)).transpose(0, 1)


def gpt(hidden: int, heads: int, layers: int, seq: int, vocabulary: int = VOCABULARY) -> nn.Sequential:
    """A GPT without data, whatever its size: embedding, blocks, head (layers "0" to "layers + 1")."""
    with torch.device("meta"):
        return nn.Sequential(
            Embedding(hidden, seq, vocabulary),
            *(Block(hidden, heads) for _ in range(layers)),
            Head(hidden, vocabulary),
        )


def batch(seq: int, vocabulary: int = VOCABULARY) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """The `batch(n)` of such a model: words and their successors, without data."""

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.empty(n, seq, dtype=torch.long, device="meta")
        return words, words

    return draw


def splits(model: nn.Module) -> dict[str, str]:
    """Blocks divide over devices as Megatron's do."""
    return {name: "block" for name, layer in model.named_children() if isinstance(layer, Block)}


class _Resized(torch.autograd.Function):
    """Stands for a collective that changes how many tokens a device has: it moves nothing that is counted here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.tokens = x.shape[0]
        return x.new_empty((tokens, *x.shape[1:]))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_empty((ctx.tokens, *gradient.shape[1:])), None


class ShardedBlock(Block):
    """What one of `tensor` devices computes of a block (arXiv 1909.08053, figure 3), without the collectives.

    `sequence` tokens stand between the blocks: all of them, or with sequence parallelism (arXiv 2205.05198, figure 5)
    one device's share, so that normalisation, dropout and residual are divided as well.
    """

    def __init__(self, hidden: int, heads: int, tensor: int, seq: int, sequence: int) -> None:
        nn.Module.__init__(self)
        self.heads, self.seq, self.sequence = heads // tensor, seq, sequence
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.queries_keys_values = nn.Linear(hidden, 3 * hidden // tensor)
        self.projection = nn.Linear(hidden // tensor, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden // tensor), nn.Linear(4 * hidden // tensor, hidden)
        self.attention_dropout, self.dropout = nn.Dropout(DROPOUT), nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = self.projection(self.attention(self.queries_keys_values(self.whole(self.norm1(x)))))
        x = x + self.dropout(self.own(attended))
        expanded = nn.functional.gelu(self.up(self.whole(self.norm2(x))))
        return x + self.dropout(self.own(self.down(expanded)))

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.sequence == self.seq else _Resized.apply(x, self.seq)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.sequence == self.seq else _Resized.apply(x, self.sequence)


class ShardedCore(Block):
    """The attention core of one device alone: what selective recomputation repeats."""

    def __init__(self, hidden: int, heads: int, tensor: int) -> None:
        nn.Module.__init__(self)
        self.heads = heads // tensor
        self.attention_dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


def sharded(hidden: int, heads: int, tensor: int, seq: int, *, sequence_parallel: bool) -> nn.Sequential:
    """What one device of `tensor` computes of a GPT of one block: embedding, block, head.

    Embedding and head are divided by words. Without data, as `gpt`.
    """
    tokens = seq // tensor if sequence_parallel else seq
    with torch.device("meta"):
        return nn.Sequential(
            ShardedEmbedding(hidden, seq, tokens),
            ShardedBlock(hidden, heads, tensor, seq, tokens),
            ShardedHead(hidden, seq, tokens, VOCABULARY // tensor),
        )


class ShardedEmbedding(Embedding):
    """An embedding of which a device goes on with its own share of the tokens."""

    def __init__(self, hidden: int, seq: int, tokens: int) -> None:
        super().__init__(hidden, seq, VOCABULARY)
        self.tokens = tokens

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return super().forward(words[:, : self.tokens])


class ShardedHead(Head):
    """A head whose logits are divided by words."""

    def __init__(self, hidden: int, seq: int, tokens: int, words: int) -> None:
        super().__init__(hidden, words)
        self.seq, self.tokens = seq, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.logits(x if self.tokens == self.seq else _Resized.apply(x, self.seq)).transpose(0, 1)


def core(hidden: int, heads: int, tensor: int, seq: int) -> nn.Sequential:
    """The attention core of one device, as the third of four layers; the others are small."""
    with torch.device("meta"):
        return nn.Sequential(
            Embedding(8, seq, 8),
            nn.Linear(8, 3 * hidden // tensor),
            ShardedCore(hidden, heads, tensor),
            Head(hidden // tensor, 8),
        )
