"""AmoebaNet-D(L, D) for 224 x 224 images: L normal cells and D filters, as GPipe's authors count them.

The cells are those of Real et al. (arXiv 1802.01548, figure 5) with the concatenation of the authors' TensorFlow code;
with it the parameters are those that GPipe reports (82 million for L = 18, D = 208). A cell reads the two before it, so
what passes between layers are two tensors, and layers differ: early ones move bytes, late ones multiply.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CLASSES = 1000

# Pairs of (which of the states so far, operation); the sums of both become the next state.
NORMAL = (
    ((1, "conv1"), (1, "pool3")),
    ((1, "skip"), (0, "conv7")),
    ((0, "conv1"), (0, "conv7")),
    ((2, "pool3"), (2, "skip")),
    ((1, "pool3"), (5, "conv1")),
)
NORMAL_OUT = (0, 3, 4, 6)
REDUCTION = (
    ((0, "pool2"), (0, "pool3")),
    ((2, "skip"), (1, "conv3")),
    ((2, "conv7"), (2, "pool3")),
    ((3, "skip"), (1, "pool2")),
    ((2, "pool3"), (3, "conv1")),
)
REDUCTION_OUT = (4, 5, 6)


def convolution(channels: int, out: int, size: tuple[int, int] = (1, 1), stride: tuple[int, int] = (1, 1)) -> nn.Module:
    padding = (size[0] // 2, size[1] // 2)
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, out, size, stride, padding, bias=False), nn.BatchNorm2d(out))


def operation(kind: str, c: int, stride: int) -> nn.Module:
    """One edge of a cell. Wide convolutions pass a bottleneck of a quarter of the channels."""
    if kind == "skip":
        return nn.Identity() if stride == 1 else Halved(c, c)
    if kind == "conv1":
        return convolution(c, c, stride=(stride, stride))
    if kind == "conv3":
        return nn.Sequential(
            convolution(c, c // 4), convolution(c // 4, c // 4, (3, 3), (stride, stride)), convolution(c // 4, c)
        )
    if kind == "conv7":
        return nn.Sequential(
            convolution(c, c // 4),
            convolution(c // 4, c // 4, (1, 7), (1, stride)),
            convolution(c // 4, c // 4, (7, 1), (stride, 1)),
            convolution(c // 4, c),
        )
    if kind == "pool2":
        return nn.MaxPool2d(2, stride)
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


class Halved(nn.Module):
    """Half the resolution, by two convolutions that see every other pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(channels, out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(channels, out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))


class Cell(nn.Module):
    """A cell: `last` is what the layer before made, `before` what the one before that made."""

    def __init__(self, before: int, last: int, channels: int, *, reduces: bool, halve: bool) -> None:
        super().__init__()
        self.first = convolution(last, channels)
        self.second: nn.Module = nn.Identity()
        if halve:
            self.second = Halved(before, channels)
        elif before != channels:
            self.second = convolution(before, channels)
        self.pairs, self.out = (REDUCTION, REDUCTION_OUT) if reduces else (NORMAL, NORMAL_OUT)
        self.operations = nn.ModuleList(
            operation(kind, channels, 2 if reduces and state < 2 else 1) for pair in self.pairs for state, kind in pair
        )

    def forward(self, last: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        states = [self.first(last), self.second(before)]
        for i, ((one, _), (other, _)) in enumerate(self.pairs):
            states.append(self.operations[2 * i](states[one]) + self.operations[2 * i + 1](states[other]))
        return torch.cat([states[i] for i in self.out], dim=1)


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, channels, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(torch.relu(images)))


class Classifier(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean(dim=(2, 3)))


class AmoebaNet(nn.Module):
    """L + 6 layers: a stem of three, three groups of L / 3 normal cells with reductions between, a classifier."""

    def __init__(self, layers: int, filters: int) -> None:
        super().__init__()
        channels = filters // 4
        self.stem = Stem(channels)
        before = last = channels
        halve = False
        cells = []
        for reduces in (True, True, *_group(layers), True, *_group(layers), True, *_group(layers)):
            channels *= 2 if reduces else 1
            cells.append(Cell(before, last, channels, reduces=reduces, halve=halve))
            before, last = last, channels * len(cells[-1].out)
            halve = reduces
        self.cells = nn.ModuleList(cells)
        self.classifier = Classifier(last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        last = before = self.stem(images)
        for cell in self.cells:
            last, before = cell(last, before), last
        return self.classifier(last)


def _group(layers: int) -> tuple[bool, ...]:
    return (False,) * (layers // 3)


def amoebanet(layers: int, filters: int) -> AmoebaNet:
    """A network without data."""
    with torch.device("meta"):
        return AmoebaNet(layers, filters)


def batch(side: int = 224) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """The `batch(n)` of such a model, without data."""

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(n, 3, side, side, device="meta"), torch.empty(n, dtype=torch.long, device="meta")

    return draw
