"""Models without storage: the same modules as with storage, whatever their constructors do with parameters."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from executor import hollow
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.surroundings import on
from planner.basis.errors import PlanError

MODELS = "tests/executor/small_models.py"


class Varied(nn.Module):
    """A constructor with everything that people do with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16, padding_idx=0)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
        )
        self.memory = nn.LSTM(16, 16, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 50)
        self.out.weight = self.words.weight
        alone = nn.Parameter(torch.ones(16))
        self.first, self.second = alone, alone
        self.copied = nn.Parameter(self.out.bias.data.clone())
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.listed = nn.ParameterList(torch.ones(16) for _ in range(2))
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)]
        self.register_buffer("table", torch.arange(16.0).repeat(7, 1))
        self.register_parameter("missing", None)
        nn.init.trunc_normal_(self.words.weight, std=0.02)
        nn.init.orthogonal_(self.normed.parametrizations.weight.original1)
        self.out.bias.data[0] = self.table[0, 1]
        self.frozen.keep = "mine"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.memory(self.blocks(self.words(x)))
        y = self.normed(y) * self.table + self.first * self.rates[1] + self.frozen + self.listed[0]
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return self.out(y) + self.copied


def file_of(model: Callable[[], nn.Module]) -> ModelFile:
    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 50, (n, 7)), torch.randint(0, 50, (n, 7))

    return dataclasses.replace(load(MODELS), model=model, batch=batch, layers=None)


def described(model: nn.Module) -> list[tuple[object, ...]]:
    parts = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [(n, type(t) is nn.Buffer, tuple(t.shape), t.dtype, t.stride(), t.device, t.requires_grad) for n, t in parts]


@pytest.mark.parametrize(
    "model", [Varied, lambda: Varied().to("cpu").half(), lambda: Varied().requires_grad_(False).double()]
)
def test_a_model_without_storage_has_the_same_parameters_and_shares_the_same(model) -> None:
    real, empty = file_of(model).build(0), hollow.build(file_of(model), 0)
    assert described(empty) == described(real)
    assert all(hollow.is_hollow(p) and isinstance(p, nn.Parameter) for p in empty.parameters())
    assert not any(map(hollow.is_hollow, empty.buffers()))
    shared = [[n for n, p in m.named_parameters(remove_duplicate=False) if p is m.first] for m in (real, empty)]
    assert shared[0] == shared[1] == ["first", "second"]
    assert empty.out.weight is empty.words.weight
    assert empty.rates == real.rates
    assert hollow.held_bytes(empty) == hollow.held_bytes(real)
    assert type(nn.Linear(2, 2).weight) is nn.Parameter, "what is made later is real"


def test_it_is_captured_and_cut_as_with_storage() -> None:
    file = file_of(Varied)
    real, empty = cut(file, file.build(0)), cut(file, hollow.build(file, 0))
    for one, other in zip(real.layers, empty.layers, strict=True):
        assert dataclasses.replace(one, module=one) == dataclasses.replace(other, module=one)
        assert isinstance(one.module, fx.GraphModule)
        assert isinstance(other.module, fx.GraphModule)
        assert one.module.code == other.module.code
    assert list(real.saved_names().values()) == list(empty.saved_names().values())
    assert real.tied() == empty.tied()


def test_filled_with_a_models_weights_it_computes_the_same() -> None:
    file = file_of(Varied)
    real, empty = file.build(0).eval(), hollow.build(file, 0).eval()
    values = {id(t): real.get_parameter(n) for n, t in empty.named_parameters(remove_duplicate=False)}
    hollow.fill([empty], lambda tensor: values[id(tensor)].detach().clone())
    (x,), _ = file.draw(3, seed=0)
    assert torch.equal(empty(x), real(x))
    assert empty.out.weight is empty.words.weight
    assert empty.second is empty.first
    assert empty.frozen.keep == "mine"
    assert not empty.frozen.requires_grad
    assert type(empty.first) is nn.Parameter
    assert vars(empty.first) == {}


def test_a_layer_has_storage_for_a_while() -> None:
    file = file_of(Varied)
    layered = cut(file, hollow.build(file, 0))
    first = layered.layers[0]
    with hollow.stored([first.module], hollow.harmless(torch.device("cpu"))):
        made = first.module(file.draw(2, seed=0)[0][0])
        assert made.isfinite().all()
        assert made.abs().max() > 1e-3
        assert not hollow.hollow(first.module)
    assert hollow.hollow(first.module)


def test_a_parameter_is_let_go_of_when_it_is_registered() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(3):
                self.register_parameter(f"p{i}", nn.Parameter(torch.ones(10)))
                real = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.shape == (10,)]
                assert not real, "nobody holds the one with storage"

    hollow.build(file_of(Counting), 0)


def test_an_uninitialised_parameter_is_refused_in_words() -> None:
    with pytest.raises(PlanError, match="parameters that have no shape yet") as caught:
        hollow.build(file_of(lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))), 0)
    assert caught.value.why.startswith("0.weight")


def test_a_model_without_storage_that_is_where_it_is_to_be_is_left_there() -> None:
    """Tensors without data cannot be replaced: a frozen table of positions is run without, to know its shape."""
    model = hollow.build(load(f"{MODELS}:tied"), seed=0)
    assert on(model, torch.device("cpu")) is model
    assert hollow.hollow(model)
