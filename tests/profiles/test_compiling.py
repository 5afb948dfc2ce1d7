"""Compiled layers in profiles: what they keep is counted as their code keeps it; a change of the setting is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from executor.allocator import AllocationRecorder
from executor.compiling import COMPILERS, check_compiler
from executor.devices import open_device
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.user_code import default_loss, default_optimizer
from planner.basis.errors import PlanError
from profiles.chain import Chain
from profiles.measure import key_of
from profiles.sizes import measure_sizes

MODELS = str(Path(__file__).parent.parent / "executor" / "small_models.py")
WIDTH, SAMPLES = 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.exp(torch.sin(torch.cos(self.up(x)))))


def chain_of(*, compiled: bool) -> Chain:
    file = ModelFile(
        path="by hand",
        model=lambda: nn.Sequential(Block(), nn.Linear(WIDTH, WIDTH)),
        batch=lambda n: (torch.randn(n, WIDTH), torch.randn(n, WIDTH)),
        loss=default_loss,
        optimizer=default_optimizer,
        layers=None,
        batch_size=SAMPLES,
        compiled=compiled,
    )
    return Chain(file, cut(file, file.build(0)), torch.device("cpu"))


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
def test_what_fused_code_keeps_is_what_the_allocator_has_seen() -> None:
    backend = open_device("cpu")
    eager, chain = chain_of(compiled=False), chain_of(compiled=True)
    plain, _ = measure_sizes(eager, backend, SAMPLES)
    chain.compile([SAMPLES], [torch.get_num_threads()])
    sizes, values = measure_sizes(chain, backend, SAMPLES)
    wide = SAMPLES * 4 * WIDTH * 4
    assert plain[0].saved_bytes == 3 * wide  # what cosine and sine have read, and what the exponential has made
    inputs, targets = chain.draw(SAMPLES)
    with AllocationRecorder(backend) as recorder:
        done = chain.forward(inputs, targets, lambda part, kind: recorder.marked(f"{kind}.{part}"))
        del done
    _, kept = recorder.span("forward.0")
    assert sizes[0].saved_bytes == kept - sizes[0].output_bytes
    assert sizes[0].saved_bytes < plain[0].saved_bytes
    assert [own.flop for own in sizes] == [own.flop for own in plain]
    assert [own.output_bytes for own in sizes] == [own.output_bytes for own in plain]
    assert values["v0"] == (SAMPLES * WIDTH * 4, True)


def test_a_profile_is_stale_when_layers_are_compiled() -> None:
    key = key_of(MODELS, "cpu", 0, (), "float32", "")
    assert msgspec.structs.replace(key, compiled=True).differences(key) == ["compiled: True -> False"]
    assert "compiled" in msgspec.structs.replace(key, compiled=True).numbers
    assert load(f"{MODELS}:fused").compiled
    assert not load(MODELS).compiled


def test_a_machine_without_a_compiler_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PlanError, match=r"no C\+\+ compiler") as caught:
        check_compiler("model.py", "cpu")
    assert "no-such-compiler" in caught.value.why
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PlanError, match=r"no C\+\+ compiler"):
        check_compiler("model.py", "cpu")


def test_compiled_is_true_or_false(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("def model(): ...\ndef batch(n): ...\ncompiled = 'yes'\n")
    with pytest.raises(PlanError, match="compiled is neither True nor False"):
        load(str(file))
