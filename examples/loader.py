"""Training on a dataset: scikit-learn's 1,797 handwritten digits, shifted at random, from a DataLoader.

plan profile examples/loader.py, then plan run best --epochs 5
"""

import random

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, random_split

WIDTH = 64


class Digits(Dataset):
    """All images with values in 0..1, and their classes; with `shifted`, moved by up to one pixel every time."""

    def __init__(self, *, shifted: bool) -> None:
        found = load_digits()
        self.images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
        self.classes = torch.tensor(found.target)
        self.shifted = shifted

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shift = (random.randint(-1, 1), random.randint(-1, 1)) if self.shifted else (0, 0)
        return self.images[index].roll(shift, dims=(1, 2)), self.classes[index]


def data() -> DataLoader:
    """Nine tenths of the images, in another order in every epoch, made ready by a process while a step computes."""
    images, _ = random_split(Digits(shifted=True), [0.9, 0.1])
    return DataLoader(images, batch_size=64, shuffle=True, num_workers=1)


def evaluate() -> DataLoader:
    """The last tenth: what is drawn in data() and here is drawn alike, so that no image is in both."""
    _, images = random_split(Digits(shifted=False), [0.9, 0.1])
    return DataLoader(images, batch_size=64)


def metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """The share of images whose class is found."""
    return {"accuracy": (outputs.argmax(1) == targets).float().mean()}


def model() -> nn.Module:
    """Convolutions on 8 x 8 pixels, then a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        nn.GroupNorm(8, WIDTH),
        nn.ReLU(),
        nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
        nn.GroupNorm(8, WIDTH),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * WIDTH, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def optimizer(parameters):
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
