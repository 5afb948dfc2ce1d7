"""GPT-2 of transformers, small, on Python's own library: bytes of its source files, 64 at a time.

As people train it: AdamW without decay of biases and norms, a rate that warms up and falls, gradients clipped.
"""

import sysconfig
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset, default_collate, random_split

LENGTH, TRAINED, HELD = 64, 1024, 128
batch_size = 16
clip = 1.0


def model():
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=LENGTH,
        n_embd=96,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _windows():
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: (TRAINED + HELD) * LENGTH]
    windows = TensorDataset(torch.tensor(list(text)).view(-1, LENGTH))
    return random_split(windows, [TRAINED, HELD], torch.Generator().manual_seed(0))


def _labelled(items):
    (tokens,) = default_collate(items)
    return {"input_ids": tokens, "labels": tokens}


def data():
    return DataLoader(_windows()[0], batch_size=batch_size, shuffle=True, collate_fn=_labelled)


def evaluate():
    return DataLoader(_windows()[1], batch_size=batch_size, collate_fn=_labelled)


def optimizer(named_parameters):
    decayed, plain = [], []
    for _, parameter in named_parameters:
        (decayed if parameter.dim() > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def scheduler(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=TRAINED // batch_size)
