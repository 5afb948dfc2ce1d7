"""A U-Net that removes noise from handwritten digits: its skip connections jump over layers.

plan profile examples/unet.py
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

WIDTH = 32
batch_size = 64


class Convolutions(nn.Module):
    """Two convolutions that keep the size of the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


class UNet(nn.Module):
    """8 x 8 pixels down to 2 x 2 and up again; each way up sees what the way down saw at its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = Convolutions(1, WIDTH), Convolutions(WIDTH, 2 * WIDTH)
        self.shrink1, self.shrink2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.bottom = Convolutions(2 * WIDTH, 4 * WIDTH)
        self.grow2, self.grow1 = nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)
        self.up2, self.up1 = Convolutions(6 * WIDTH, 2 * WIDTH), Convolutions(3 * WIDTH, WIDTH)
        self.out = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        fine = self.down1(noisy)
        coarse = self.down2(self.shrink1(fine))
        bottom = self.bottom(self.shrink2(coarse))
        up = self.up2(torch.cat((self.grow2(bottom), coarse), dim=1))
        return self.out(self.up1(torch.cat((self.grow1(up), fine), dim=1)))


def model() -> nn.Module:
    """The model, with random weights."""
    return UNet()


@functools.cache
def digits() -> torch.Tensor:
    """All images with values in 0..1."""
    return torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n random images with noise, and without."""
    images = digits()[torch.randint(0, len(digits()), (n,))]
    return images + 0.3 * torch.randn_like(images), images


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared difference per pixel."""
    return nn.functional.mse_loss(outputs, targets)


def optimizer(parameters):
    """AdamW with torch's own settings."""
    return torch.optim.AdamW(parameters, lr=1e-3)
