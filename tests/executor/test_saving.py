"""Trained weights in every form that a model has, each loaded by those who read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from executor import saving
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.saving import SavedAs

MODELS = "tests/executor/small_models.py"


class Own(nn.Module):
    """Writes itself, as Hugging Face's models do, and ties its weights when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12, bias=False)
        self.register_buffer("unsaved", torch.ones(12), persistent=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        self.out.weight = self.words.weight

    def save_pretrained(self, folder: str) -> None:
        assert self.out.weight is self.words.weight
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text(json.dumps({"type": "own"}))
        torch.save(self.state_dict(), Path(folder) / "model.bin")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.words(x)) * self.unsaved)


def file_of(name: str) -> ModelFile:
    if name != "own":
        return load(f"{MODELS}:{name}")

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randint(0, 12, (n,)), torch.randint(0, 12, (n,))

    return dataclasses.replace(load(MODELS), model=Own, batch=batch)


def trained(file: ModelFile, folder: Path) -> tuple[nn.Module, SavedAs]:
    """A model with other weights than its initial ones, and its parts as two ranks write them."""
    model = file.build(1)
    layered = cut(file, model)
    kind = SavedAs(shared=layered.shared_names(), pretrained=hasattr(model, "save_pretrained"))
    state = {name: value for name, value in model.state_dict().items() if name in layered.saved}
    for rank in range(2):  # what both hold, both write: from memory of their own
        part = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in list(state.items())[rank:]}
        torch.save(part, folder / f"rank{rank}.pt")
    kind.write(folder)
    return model, kind


@pytest.mark.parametrize("name", ["model", "tied", "twice", "kept", "odd", "own"])
def test_every_form_is_read_into_the_plain_model(name: str, tmp_path: Path, caplog) -> None:
    file = file_of(name) if name != "model" else load(MODELS)
    model, _ = trained(file, tmp_path)
    state = {n: v for n, v in model.state_dict().items() if n != "late"}
    saving.gather(tmp_path, 2, (0, 1), file)
    plain = file.build(2)
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    again = file.build(3)
    found = [plain]
    if name == "odd":
        assert "_extra_state is no tensor" in caplog.text
        assert not (tmp_path / "weights.safetensors").exists()
    else:
        load_model(again, tmp_path / "weights.safetensors", strict=True)
        found.append(again)
        assert not [record.message for record in caplog.records if record.name == "foreplan"]
    for one in found:
        for key, value in one.state_dict().items():
            assert torch.equal(value, state[key]) if isinstance(value, torch.Tensor) else value == state[key]
    written = {"weights.pt", *(["weights.safetensors"] if name != "odd" else []), *(["pretrained"] * (name == "own"))}
    assert {path.name for path in tmp_path.iterdir()} == written, "and nothing else is left"


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    file = file_of("tied")
    trained(file, tmp_path)
    saving.gather(tmp_path, 2, (0, 1), file)
    assert len(load_file(tmp_path / "weights.safetensors")) == len(file.build(0).state_dict()) - 1
    found = torch.load(tmp_path / "weights.pt")
    assert found["into.weight"].data_ptr() == found["out.weight"].data_ptr()


def test_a_model_writes_itself_with_its_trained_weights(tmp_path: Path) -> None:
    file = file_of("own")
    model, _ = trained(file, tmp_path)
    saving.gather(tmp_path, 2, (0, 1), file)
    found = torch.load(tmp_path / "pretrained" / "model.bin")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.items())


def test_what_cannot_be_written_besides_is_said_and_the_weights_are_there(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: nn.Module, folder: str) -> None:
        raise ValueError("the configuration is not valid")

    monkeypatch.setattr(Own, "save_pretrained", refuses)
    file = file_of("own")
    trained(file, tmp_path)
    saving.gather(tmp_path, 2, (0, 1), file)
    assert "not in pretrained as well: the configuration is not valid" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pt", "weights.safetensors"}
