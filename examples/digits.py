"""An image classifier: a convolutional network on scikit-learn's 1,797 handwritten digits (8 x 8 pixels).

plan profile examples/digits.py
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

WIDTH = 64
batch_size = 256
TRAINING = 1500


def block(width: int) -> nn.Module:
    """A convolution that keeps the size of the image."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU())


def model() -> nn.Module:
    """Convolutions on 8 x 8, then on 4 x 4 pixels, then a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        block(WIDTH),
        block(WIDTH),
        nn.Conv2d(WIDTH, 2 * WIDTH, 2, stride=2),
        block(2 * WIDTH),
        block(2 * WIDTH),
        block(2 * WIDTH),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images with values in 0..1, and their classes."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n random images of the first 1,500, and their classes."""
    images, classes = digits()
    chosen = torch.randint(0, TRAINING, (n,))
    return images[chosen], classes[chosen]


def evaluate() -> torch.utils.data.Dataset:
    """The images that are never trained on."""
    images, classes = digits()
    return torch.utils.data.TensorDataset(images[TRAINING:], classes[TRAINING:])


def metrics(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """The share of images whose class is found."""
    return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the ten classes, in nats."""
    return nn.functional.cross_entropy(outputs, targets)


def optimizer(parameters):
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
