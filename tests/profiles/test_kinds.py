"""One layer of each kind stands for all: the same bytes as when every layer is measured, and nothing else's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from executor import devices
from executor.layers import LayeredModel, cut
from executor.model_file import ModelFile
from executor.user_code import default_loss, default_optimizer
from profiles.chain import Chain
from profiles.kinds import every, find
from profiles.sizes import measure_sizes, measure_static

WIDTH, WORDS, TOKENS = 8, 12, 5


class Block(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ahead = torch.ones(x.shape[1], x.shape[1]).tril()
        return x + self.scale * self.down(torch.relu(self.up(ahead @ self.norm(x))))


class Words(nn.Module):
    """Embeds, blocks, and a head that shares the embedding's weights; also with a value that the last block reads."""

    def __init__(self, scales: tuple[float, ...], skip: bool = False, once: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        own = Block(scales[0])
        self.blocks = nn.ModuleList(own if once else Block(scale) for scale in scales)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.skip = skip

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = first = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x + first if self.skip else x)


class Skips(nn.Module):
    """Layers in a row, with a value of the fourth that the end reads, too."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        far = x
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            far = x if i == 3 else far
        return x + far


class Hidden(nn.Module):
    """How often it does what it does is an attribute with an underscore."""

    def __init__(self, often: int) -> None:
        super().__init__()
        self.linear, self._often = nn.Linear(WIDTH, WIDTH), often

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self._often):
            x = torch.tanh(x)
        return self.linear(x)


def hooked() -> nn.Module:
    """One of many equal layers has a hook that changes what it returns."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(7)]
    layers[3].register_forward_hook(lambda module, inputs, output: torch.exp(torch.tanh(output)))
    return nn.Sequential(*layers)


def words(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(WORDS, (n, TOKENS)), torch.randint(WORDS, (n, TOKENS))


def vectors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, WIDTH), torch.randn(n, WIDTH)


def file_of(make: Callable[[], nn.Module]) -> ModelFile:
    return ModelFile(
        path="by hand",
        model=make,
        batch=words if isinstance(make(), Words) else vectors,
        loss=default_loss,
        optimizer=default_optimizer,
        layers=None,
        batch_size=8,
    )


def layered_of(file: ModelFile) -> LayeredModel:
    return cut(file, file.build(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "blocks in a row": (lambda: Words((1.0,) * 5), (0, 1, 2, 2, 2, 3, 4)),
    "a block of another setting": (lambda: Words((1.0, 1.0, 1.0, 2.0, 1.0)), (0, 1, 2, 3, 4, 5, 6)),
    "a skip over all blocks": (lambda: Words((1.0,) * 6, skip=True), (0, 1, 2, 2, 2, 3, 4, 5)),
    "two rows with another block between them": (
        lambda: Words((1.0,) * 6 + (2.0,) + (1.0,) * 6),
        (0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8),
    ),
    "a value that is read far behind": (lambda: Skips(9), (0, 1, 1, 2, 3, 3, 3, 4, 5)),
    "a hidden setting": (lambda: nn.Sequential(*(Hidden(n) for n in (1, 1, 1, 3, 1, 1, 1))), (0, 1, 2, 3, 4, 5, 6)),
    "a hook": (hooked, (0, 1, 2, 3, 4, 5, 6)),
    "modules in a row": (lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))), (0, 1, 1, 1, 2)),
    "modules in turn": (
        lambda: nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU()))),
        (0, 1, 2, 1, 2, 1, 2, 3),
    ),
    "one module, many times": (lambda: Words((1.0,) * 5, once=True), (0, 1, 2, 2, 2, 3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_kinds(name: str) -> None:
    """The first and the last of a row have other neighbours; what is shared stays shared."""
    make, standing = MODELS[name]
    file = file_of(make)
    layered = layered_of(file)
    kinds = find(layered, layered.parted(*file.draw(2, seed=0))[0])
    assert kinds.standing == standing
    assert kinds.folded is (len(set(standing)) < len(standing))
    assert [layer.name for layer in kinds.short.layers] == [
        layered.layers[standing.index(part)].name for part in range(len(set(standing)))
    ]


@pytest.mark.parametrize("name", MODELS)
def test_one_of_each_kind_has_the_bytes_of_all(name: str) -> None:
    """Counted on the short model and on the whole: the same, layer by layer and value by value."""
    file = file_of(MODELS[name][0])
    layered = layered_of(file)
    inputs, _ = layered.parted(*file.draw(2, seed=0))
    kinds = find(layered, inputs)
    short, whole = (Chain(file, model, torch.device("cpu")) for model in (kinds.short, layered))
    few, values = measure_sizes(short, devices.Cpu(), 4)
    many, all_values = measure_sizes(whole, devices.Cpu(), 4)
    assert [few[part] for part in (*kinds.standing, len(kinds.short.layers))] == many
    assert kinds.values(layered, {4: values}) == every(layered).values(layered, {4: all_values})
    static, all_static = measure_static(short, devices.Cpu()), measure_static(whole, devices.Cpu())
    assert [static[part] for part in kinds.standing] == all_static


def test_blocks_with_other_neighbours_take_the_same_time() -> None:
    file = file_of(lambda: Words((1.0,) * 5))
    layered = layered_of(file)
    assert find(layered, layered.parted(*file.draw(2, seed=0))[0]).alike == ((1, 2, 3),)
