"""Mixed precision in profiles: what passes has the dtypes that really pass, and a change of it is seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from executor import agreement
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.user_code import default_loss, default_optimizer
from planner.basis.errors import PlanError
from profiles.chain import Chain
from profiles.estimate import estimate
from profiles.measure import key_of
from profiles.sizes import measure_sizes
from tests.profiles.test_estimate import silent

MODELS = str(Path(__file__).parent.parent / "executor" / "small_models.py")


def made(model: nn.Module, precision: str) -> ModelFile:
    return ModelFile(
        path="by hand",
        model=lambda: model,
        batch=lambda n: (torch.randn(n, 16), torch.randn(n, 16)),
        loss=default_loss,
        optimizer=default_optimizer,
        layers=None,
        batch_size=8,
        precision=precision,
    )


def bytes_of(precision: str) -> tuple[int, int]:
    """Bytes that a linear in the middle sends on, and keeps for its backward."""
    from executor.devices import open_device

    file = made(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), precision)
    chain = Chain(file, cut(file, file.build(0)), torch.device("cpu"))
    sizes, values = measure_sizes(chain, open_device("cpu"), 4)
    assert values["v0"] == (sizes[0].output_bytes, True)
    return sizes[1].output_bytes, sizes[1].saved_bytes


def test_what_passes_is_half_as_large() -> None:
    """And each micro-batch keeps a copy of the weight in fewer bits until its backward: 16 x 16 numbers of 2 bytes."""
    assert bytes_of("") == (4 * 16 * 4, 0)
    sent, kept = bytes_of("bf16")
    assert sent == 4 * 16 * 2
    assert kept == 16 * 16 * 2


def test_an_estimate_knows_it_too() -> None:
    plain, lower = (
        estimate(f"{MODELS}:{name}", hardware="h100", sizes=[4], progress=silent) for name in ("skips", "bf16_skips")
    )
    assert (lower.key.dtype, lower.key.precision, lower.key.computing) == ("float32", "bf16", "bfloat16")
    assert [2 * v.bytes_at[0][1] for v in lower.values if v.source >= 0] == [
        v.bytes_at[0][1] for v in plain.values if v.source >= 0
    ]
    assert [layer.optimizer_bytes for layer in lower.layers] == [layer.optimizer_bytes for layer in plain.layers]
    asked = estimate(f"{MODELS}:bf16_skips", hardware="h100", sizes=[4], dtype="fp16", progress=silent)
    assert (asked.key.dtype, asked.key.precision) == ("float16", ""), "another one was asked for"


def test_a_profile_of_another_precision_is_stale() -> None:
    file = f"{MODELS}:bf16"
    one, other = (key_of(file, "cpu", 0, (), "float32", precision) for precision in ("", "bf16"))
    assert one.differences(other) == ["precision:  -> bf16"]
    assert msgspec.json.decode(msgspec.json.encode(other), type=type(other)) == other


@pytest.mark.parametrize("name", ["skips", "tied", "twice", "fields", "kept", "partly"])
def test_a_model_cut_in_fewer_bits_computes_what_it_computes_whole(name: str) -> None:
    file = dataclasses.replace(load(f"{MODELS}:{name}"), precision="bf16")
    agreement.agree(file, cut(file, file.build(0)))


@pytest.mark.parametrize("name", ["forgets", "reorders"])
def test_wrong_layers_are_found_in_fewer_bits(name: str) -> None:
    file = dataclasses.replace(load(f"{MODELS}:{name}"), precision="bf16")
    with pytest.raises(PlanError, match="do not compute what the model computes"):
        agreement.agree(file, cut(file, file.build(0)))


def test_precisions_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    text = "import torch\n\ndef model(): return torch.nn.Linear(2, 2).half()\n\ndef batch(n): return None\n\n"
    path.write_text(text + "precision = 'half'")
    with pytest.raises(PlanError, match="precision is none that is known"):
        load(str(path))
    path.write_text(text + "precision = 'fp16'")
    with pytest.raises(PlanError, match="a model in float16 cannot be trained"):
        load(str(path)).build(0)
