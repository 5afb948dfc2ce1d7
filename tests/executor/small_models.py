"""Model files for tests: small, with every way of having layers. Picked as small_models.py:NAME."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

batch_size = 16


def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(n, 12)
    return inputs, inputs[:, :4].argmax(dim=1)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 4)
    )


class Skips(nn.Module):
    """Written out by hand, with a skip over several layers: found by tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 8)
        self.third, self.fourth = nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = torch.tanh(self.first(x))
        late = torch.relu(self.second(early)) + early
        late = torch.sigmoid(self.third(late))
        return self.fourth(torch.cat((late, early), dim=1))


def skips() -> nn.Module:
    return Skips()


class Tied(nn.Module):
    """Encoder and decoder share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.out.weight = self.into.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.middle(self.into(x))))


def tied() -> nn.Module:
    return Tied()


def clipped() -> nn.Module:
    return model()


def clipped_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Moves by the gradient itself, so that clipping shows."""
    return torch.optim.SGD(parameters, lr=1.0)


def grouped() -> nn.Module:
    return model()


def grouped_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Without weight decay for biases and for the norm, and another learning rate for one layer's weight."""
    named = dict(named_parameters)
    plain = [p for name, p in named.items() if name.endswith("bias") or name.startswith("2.")]
    slow = [p for name, p in named.items() if name == "3.weight"]
    rest = [p for p in named.values() if not any(p is other for other in (*plain, *slow))]
    return torch.optim.SGD(
        [{"params": rest}, {"params": plain, "weight_decay": 0.0}, {"params": slow, "lr": 0.1}],
        lr=1.0,
        weight_decay=0.5,
    )


clipped_clip = clipped_tied_clip = 0.01


def clipped_tied() -> nn.Module:
    return Tied()


clipped_tied_optimizer = clipped_optimizer


bf16_precision = bf16_skips_precision = "bf16"


def bf16() -> nn.Module:
    return model()


def bf16_skips() -> nn.Module:
    return Skips()


class Block(nn.Module):
    """As in a transformer, without attention: kernels can fuse most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 48), nn.Linear(48, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def fused() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(12, 4))


fused_optimizer, fused_compiled = clipped_optimizer, True


class Amplified(nn.Module):
    """Passes its input on, and 1,024 times the gradient back: in float16 that overflows in the layers before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (1023 * x - (1023 * x).detach())


def fp16() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), Amplified(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


fp16_precision, fp16_clip = "fp16", 1.0


class Twice(nn.Module):
    """Calls one module several times: a stage shares it with another; the first activation changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.block, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.active = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for _ in range(3):
            x = self.active(self.block(x))
        return self.out(x)


def twice() -> nn.Module:
    return Twice()


class Kept(nn.Module):
    """Has statistics, a buffer that is not saved, one that nobody uses, a frozen parameter, and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.BatchNorm1d(12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.register_buffer("scale", torch.full((12,), 0.5), persistent=False)
        self.register_buffer("unread", torch.ones(3))
        self.unused = nn.Linear(2, 2)
        self.one.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(self.norm(x) * self.scale)))


def kept() -> nn.Module:
    return Kept()


class Warming(Skips):
    """Counts its forwards in two buffers, one written into and one replaced, and computes with the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("again", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        self.again = self.again + 2
        return super().forward(x * (self.seen / 10).clamp(max=1)) + self.again / 100


def warming() -> nn.Module:
    return Warming()


class Frozen(nn.Module):
    """A head on a backbone that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(12, 12).requires_grad_(False)
        self.backbone = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.backbone.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.backbone(torch.tanh(self.into(x)))))


def frozen() -> nn.Module:
    return Frozen()


class Fields(nn.Module):
    """Takes its inputs by name, an optional one among them, and returns its own loss beside a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(12, 12), nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> SimpleNamespace:
        x = self.table(tokens)
        at = torch.arange(tokens.shape[1], device=x.device)
        causal = (at[:, None] >= at[None, :]).to(x.dtype)
        causal = causal / causal.sum(-1, keepdim=True)
        for block in self.blocks:
            x = x + torch.relu(block(causal @ x if mask is None else causal @ (x * mask[..., None])))
        loss = None if labels is None else nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss, logits=x, cache=list(self.blocks))


def fields() -> nn.Module:
    return Fields()


def fields_batch(n: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 12, (n, 5))
    return {"tokens": tokens, "mask": torch.ones(n, 5), "labels": tokens.roll(-1, 1)}


class Shifting(Fields):
    """Predicts every label from the tokens before it, as a causal language model does: nobody predicts the first."""

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> SimpleNamespace:
        found = super().forward(tokens)
        logits, wanted = found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, wanted), logits=found.logits)


def shifting() -> nn.Module:
    return Shifting()


class Ragged(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of which all labels count in the first step, and later fewer and fewer, of some none."""

    def __len__(self) -> int:
        return 3 * batch_size

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 12, (5,), generator=torch.Generator().manual_seed(i))
        ignored = torch.arange(5) < (0 if i < batch_size else i * i // 5 % 6)
        return {"tokens": tokens, "labels": tokens.masked_fill(ignored, -100)}


def shifting_batch(n: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 12, (n, 5))
    return {"tokens": tokens, "labels": tokens.clone()}


def shifting_data() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(Ragged(), batch_size=batch_size)


def shifting_evaluate() -> torch.utils.data.Dataset[Any]:
    return torch.utils.data.Subset(Ragged(), range(9, 40))


shifting_optimizer = clipped_optimizer


class Padded(nn.Module):
    """Sends beside what has a gradient what can have none: which tokens are padding, and how many are not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(12, 12), nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        place = (~padding).cumsum(1)
        x = self.table(tokens)
        for block in self.blocks:
            x = x + torch.relu(block(x)).masked_fill(padding[..., None], 0.0) * (place % 2)[..., None]
        return x


def padded() -> nn.Module:
    return Padded()


def padded_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 12, (n, 5))
    return tokens, tokens.roll(-1, 1)


class Moody(nn.Module):
    """Is another model in every mode: drops out, keeps statistics, one of them frozen, and scales what it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.middle = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.frozen, self.drop, self.out = nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4)
        self.frozen.eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        x = torch.relu(self.norm(self.into(x)))
        if self.training:
            x = x * torch.rand_like(x)
        hidden = self.frozen(self.middle(x))
        return SimpleNamespace(hidden=hidden, logits=self.out(self.drop(torch.relu(hidden))))


def moody() -> nn.Module:
    return Moody()


def moody_metrics(outputs: SimpleNamespace, targets: torch.Tensor) -> dict[str, float]:
    right = outputs.logits.argmax(-1) == targets
    return {"accuracy": right.double().mean().item(), "size": float(outputs.hidden.abs().mean().numpy())}


def moody_evaluate() -> torch.utils.data.Dataset[Any]:
    return torch.utils.data.TensorDataset(*batch(41))


class Turning(nn.Module):
    """Runs its modules in another order while it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (self.one, self.two) if self.training else (self.two, self.one)
        return self.out(torch.relu(second(torch.relu(first(x)))))


def turning() -> nn.Module:
    return Turning()


class Helped(Turning):
    """Has a second head while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(x))
        helped = self.helper(x) if self.training else 0.0
        return self.out(torch.relu(self.two(x))) + helped


def helped() -> nn.Module:
    return Helped()


def steady() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))


def steady_evaluate() -> torch.utils.data.DataLoader[Any]:
    """In worker processes, in another order every time."""
    return torch.utils.data.DataLoader(moody_evaluate(), batch_size=7, shuffle=True, num_workers=1)


def ignored() -> nn.Module:
    return model()


def ignored_evaluate() -> torch.utils.data.Dataset[Any]:
    return torch.utils.data.TensorDataset(*ignoring_batch(38))


def partly_evaluate() -> int:
    return 9


def ignoring() -> nn.Module:
    return model()


def ignoring_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some targets are ignored, of the first micro-batches all."""
    inputs, targets = batch(n)
    targets[: n // 4] = -100
    targets[n // 2 :: 3] = -100
    return inputs, targets


def weighted() -> nn.Module:
    return model()


def weighted_batch(n: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = batch(n)
    return inputs, (targets, torch.rand(n))


def weighted_loss(outputs: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    classes, weights = targets
    each = nn.functional.cross_entropy(outputs, classes, reduction="none")
    return (each * weights).sum() / weights.sum()


def weighted_weight(inputs: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(targets[1].sum())


def summed() -> nn.Module:
    return model()


def summed_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


class Dynamic(nn.Module):
    """Cannot be traced: its forward looks at values. Its file says what the layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
            if x.sum() > 1e9:
                x = -x
        return x


def untraceable() -> nn.Module:
    return Dynamic()


class Partly(nn.Module):
    """Only the module in its middle looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 12), Dynamic(), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.middle(torch.relu(self.into(x))))


def partly() -> nn.Module:
    return Partly()


def forgets() -> nn.Module:
    return Dynamic()


def forgets_layers(model: Dynamic) -> list[nn.Module]:
    return [model.parts[0], model.parts[2]]


def reorders() -> nn.Module:
    return Dynamic()


def reorders_layers(model: Dynamic) -> list[nn.Module]:
    return [model.parts[1], model.parts[0], model.parts[2]]


def adds() -> nn.Module:
    return Dynamic()


def adds_layers(model: Dynamic) -> list[nn.Module]:
    return [*model.parts[:2], nn.Linear(12, 12)]


def listed() -> nn.Module:
    return Dynamic()


def listed_layers(model: Dynamic) -> list[nn.Module]:
    return list(model.parts)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def failing() -> nn.Module:
    return Failing()


class Bomb(nn.Module):
    """Raises in the fourth training step of the rank that holds it, where the environment says so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 12 and "FOREPLAN_TEST_BOMB" in os.environ:
            raise ArithmeticError("the bomb went off")
        return self.linear(x)


class Turned(nn.Module):
    """Its output is a transposed view: not contiguous, like the gradient that comes back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 3, 4).transpose(1, 2)


class Summed(nn.Module):
    """Its input's gradient is an expanded view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=2)


def turned() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), Turned(), Summed(), nn.Linear(4, 4))


class Unseeded(nn.Linear):
    """Draws its weights from a generator that nobody seeds."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.frombuffer(bytearray(os.urandom(48)), dtype=torch.uint8).reshape(4, 12) / 255)
            self.bias.zero_()


def unseeded_weights() -> nn.Module:
    return Unseeded(12, 4)


class Sometimes(nn.Module):
    """Has a parameter that nobody uses, and one that only micro-batches use whose samples come early in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.early = nn.Parameter(torch.ones(12)), nn.Parameter(torch.ones(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.early if x.mean() > 0 else x


def sometimes() -> nn.Module:
    return nn.Sequential(Sometimes(), nn.Linear(12, 4))


def sometimes_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.rand(n, 12)
    inputs[n // 2 :] *= -1
    return inputs, inputs[:, :4].argmax(dim=1)


class Experts(nn.Module):
    """Each sample goes to one of them, so in some steps nothing comes to some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        goes, found = routes(x), torch.zeros_like(hidden)
        for i, expert in enumerate(self.each):
            chosen = (goes == i).nonzero().flatten()
            if len(chosen):
                found = found.index_add(0, chosen, expert(hidden[chosen]))
        return found


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.experts, self.out = nn.Linear(12, 8), Experts(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.into(x))
        result: torch.Tensor = self.out(hidden + torch.tanh(self.experts(hidden, x)))
        return result


def routes(x: torch.Tensor) -> torch.Tensor:
    """Which expert a sample goes to; hardly any to the last ones."""
    return (x[:, 0].abs() * 2.5).long().clamp(max=5)


def routed() -> nn.Module:
    return Routed()


def routed_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Also moves what has a gradient of zero, and leaves alone what has none."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def unseeded() -> nn.Module:
    return model()


def unseeded_batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from a generator that nobody seeds: every process sees other samples."""
    inputs = torch.frombuffer(bytearray(os.urandom(n * 12)), dtype=torch.uint8).reshape(n, 12) / 255
    return inputs, inputs[:, :4].argmax(dim=1)


def bomb() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), Bomb())


def diverging() -> nn.Module:
    return model()


def diverging_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Is no number where the environment says so."""
    factor = float("nan") if "FOREPLAN_TEST_NAN" in os.environ else 1.0
    return nn.functional.cross_entropy(outputs, targets) * factor


def scheduled() -> nn.Module:
    """Its learning rate is another one at every step of the run."""
    return model()


def scheduled_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)


def halving() -> nn.Module:
    """Its learning rate does not ask how long the run is; the first layers are frozen, so a stage has none."""
    found = model()
    found[0].requires_grad_(False)
    found[2].requires_grad_(False)
    return found


def halving_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 7))


def plateau() -> nn.Module:
    """Has a scheduler that goes by a validation loss, and nothing to validate with."""
    return model()


def plateau_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def unscheduled() -> nn.Module:
    """Forgets to return its scheduler."""
    return model()


def unscheduled_scheduler(optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 10)


class Odd(nn.Module):
    """Saves more than tensors; has buffers that are None, or are there only when it has run, and a tied bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.two.bias = self.one.bias
        self.register_buffer("missing", None)
        self.register_buffer("table", None)
        self.register_buffer("unsaved", torch.ones(12), persistent=False)
        self.revision = 3

    def get_extra_state(self) -> dict[str, int]:
        return {"revision": self.revision}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.revision = state["revision"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.full((12,), 2.0)
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(12))
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x) * self.late)) * self.table * self.unsaved))


def odd() -> nn.Module:
    return Odd()


def asleep() -> nn.Module:
    """Nothing in its first half is trained."""
    frozen = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).requires_grad_(False)
    return nn.Sequential(*frozen, nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def bare() -> nn.Module:
    """Nothing in its second half has parameters."""
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Tanh(), nn.Flatten(), nn.Dropout(0.0))


class Lengths(nn.Module):
    """Python's `len` says how many samples there are, in the model and in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + torch.arange(len(x), dtype=x.dtype)[:, None] / len(x)
        result: torch.Tensor = self.last(x)
        return result


def lengths() -> nn.Module:
    return Lengths()


def lengths_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.logsumexp(1) - outputs[:, 0]).sum() / len(targets)


class Fixed(Lengths):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.first(x) / int(x.shape[0]))
        return result


def fixed() -> nn.Module:
    return Fixed()
