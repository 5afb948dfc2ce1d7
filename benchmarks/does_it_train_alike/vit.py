"""A vision transformer of transformers, small, on the handwritten digits of scikit-learn, in mixed precision."""

import torch
import transformers
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset

batch_size = 16
clip = 1.0
precision = "bf16"
HELD = 357


def model():
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


class Digits(Dataset):
    def __init__(self, *, held):
        images, digits = load_digits(return_X_y=True)
        part = slice(-HELD, None) if held else slice(None, -HELD)
        self.images = torch.tensor(images[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.digits = torch.tensor(digits[part])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}, self.digits[index]


def data():
    return DataLoader(Digits(held=False), batch_size=batch_size, shuffle=True, drop_last=True)


def evaluate():
    return DataLoader(Digits(held=True), batch_size=batch_size)


def loss(outputs, digits):
    return torch.nn.functional.cross_entropy(outputs.logits, digits)


def metrics(outputs, digits):
    return {"right": (outputs.logits.argmax(-1) == digits).float().mean()}


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)


def scheduler(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=(1797 - HELD) // batch_size)
