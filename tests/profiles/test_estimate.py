"""Estimates against what can be counted by hand, against the profiler's own bytes, and through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from executor import devices
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.user_code import default_loss, default_optimizer
from planner.basis.errors import PlanError
from planner.cli.main import invoke
from planner.values.profile import Profile, Split, decode
from profiles import estimate as estimates
from profiles import hardware
from profiles.chain import Chain
from profiles.estimate import count, estimate, profile_of
from profiles.hardware import Curve, Operation
from profiles.sizes import measure_sizes, measure_static
from profiles.splits import splits_of
from tests.factory import profile as by_hand

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT / "tests" / "executor" / "small_models.py"


def silent(what: str, done: int, of: int) -> None:
    pass


def file_of(model: nn.Module, *shape: int, optimizer: Any = default_optimizer) -> ModelFile:
    return ModelFile(
        path="by hand",
        model=lambda: model,
        batch=lambda n: (torch.randn(n, *shape), torch.randn(n, *shape)),
        loss=default_loss,
        optimizer=optimizer,
        layers=None,
        batch_size=8,
    )


def test_flop_of_a_linear() -> None:
    """2 n in out forward, and as many for each of the two gradients."""
    (first, middle, _, _) = count(file_of(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), 8), [4]).work[4]
    product = 2 * 4 * 8 * 8
    flop = {kind: sum(o.flop for o in getattr(middle, kind)) for kind in ("forward", "backward", "backward_input")}
    assert flop == {"forward": product, "backward": 2 * product, "backward_input": product}
    assert sum(o.flop for o in first.backward_input) == 0, "the model's input needs no gradient"
    assert {o.kind for o in middle.forward} == {"matmul"}
    (addmm,) = middle.forward
    assert addmm.bytes == 4 * (4 * 8 + 8 * 8 + 8 + 4 * 8), "input, weight, bias and output, each once"
    assert middle.recompute == (), "a linear saves its input before it computes"


def test_causal_attention_counts_half() -> None:
    class Attention(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.causal = causal

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=self.causal)

    for causal, share in ((False, 1.0), (True, 0.5)):
        layers = nn.Sequential(nn.Linear(16, 16), Attention(causal))
        work = count(file_of(layers, 4, 32, 16), [2]).work[2][1]
        assert sum(o.flop for o in work.forward) == 4 * 2 * 4 * 32 * 32 * 16 * share
        assert sum(o.flop for o in work.backward) == 10 * 2 * 4 * 32 * 32 * 16 * share


@pytest.mark.parametrize("path", [f"{MODELS}", f"{MODELS}:skips", f"{MODELS}:tied"])
def test_bytes_are_those_that_the_profiler_measures(path: str) -> None:
    file = load(path)
    chain = Chain(file, cut(file, file.build(seed=0)), torch.device("cpu"))
    measured, values = measure_sizes(chain, devices.Cpu(), 4)
    static = measure_static(chain, devices.Cpu())
    estimated = count(file, [4])
    for mine, theirs in zip(estimated.sizes[4], measured, strict=True):
        for field in ("saved_bytes", "output_bytes", "output_saved", "samples"):
            assert getattr(mine, field) == getattr(theirs, field), field
    for mine, theirs in zip(estimated.static, static, strict=False):
        for field in ("parameter_bytes", "buffer_bytes", "gradient_bytes", "optimizer_bytes"):
            assert getattr(mine, field) == getattr(theirs, field), field
    assert {v.name: v.bytes_at[0][1] for v in estimated.values}.items() <= {k: v[0] for k, v in values.items()}.items()
    assert all(v.gradient == values[v.name][1] for v in estimated.values)


def test_a_block_s_bytes_are_those_of_the_allocator() -> None:
    file = load(str(ROOT / "examples" / "gpt.py"))
    chain = Chain(file, cut(file, file.build(seed=0)), torch.device("cpu"))
    measured, _ = measure_sizes(chain, devices.Cpu(), 8)
    block, theirs = count(file, [8]).sizes[8][1], measured[1]
    assert block.saved_bytes == theirs.saved_bytes
    assert block.forward_peak_bytes == pytest.approx(theirs.forward_peak_bytes, rel=0.05)
    assert block.backward_peak_bytes == pytest.approx(theirs.backward_peak_bytes, rel=0.25)


def test_times_follow_from_the_data_sheet() -> None:
    curve = Curve(points=((1.0, 0.5),), source="")
    efficiency = hardware.Efficiency(matmul=curve, convolution=curve, attention=curve, memory=curve, random=curve)
    _, a100 = hardware.get("a100-80")
    seconds = a100.seconds(Operation("matmul", "bfloat16", 156e12, 1.0), efficiency)
    assert seconds == pytest.approx(1.0 + hardware.LAUNCH_S)
    seconds = a100.seconds(Operation("memory", "bfloat16", 0.0, 2039e9 / 2), efficiency)
    assert seconds == pytest.approx(1.0 + hardware.LAUNCH_S)
    _, p40 = hardware.get("P40")
    assert p40.peak(Operation("matmul", "bfloat16", 1.0, 1.0)) == 12e12, "no units for it: the float32 rate"


def test_every_device_and_curve_names_its_source() -> None:
    table = hardware.table()
    assert all(gpu.source and "float32" in gpu.flops for gpu in table.gpu.values())
    for kind in table.efficiency.__struct_fields__:
        curve = getattr(table.efficiency, kind)
        assert curve.source
        assert all(0 < curve.scale * share <= 1 for _, share in curve.points)
    assert all(name in table.gpu for name in hardware.ALIASES.values())


def test_a_profile_in_another_dtype_keeps_a_float32_copy() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    numbers = 8 * 8 + 8
    half = estimated_of(model, "fp16").layers[0]
    full = estimated_of(model, None).layers[0]
    assert (half.parameter_bytes, half.gradient_bytes) == (2 * numbers, 2 * numbers)
    assert half.optimizer_bytes == 12 * numbers + 2 * 4, "a copy, two moments, and a step count per parameter"
    assert (full.parameter_bytes, full.optimizer_bytes) == (4 * numbers, 8 * numbers + 2 * 4)
    brain = estimated_of(model, "bf16").layers[0]
    assert brain.gradient_bytes == 4 * numbers, "float32 beside bfloat16 weights, as Megatron and DeepSpeed keep them"
    assert (brain.parameter_bytes, brain.optimizer_bytes) == (2 * numbers, half.optimizer_bytes)
    assert 2 * half.sizes[0].output_bytes == full.sizes[0].output_bytes
    assert next(model.parameters()).dtype == torch.float32, "the caller's model is left alone"


def estimated_of(model: nn.Module, dtype: str | None) -> Profile:
    return profile_of(
        model, lambda n: (torch.randn(n, 8), torch.randn(n, 8)), hardware="a100", dtype=dtype, sizes=(1, 2, 4)
    )


def test_factored_optimizer_state_is_scaled_to_the_parameter() -> None:
    file = file_of(nn.Sequential(nn.Linear(64, 32, bias=False)), 64, optimizer=torch.optim.Adafactor)
    file = ModelFile(**{**vars(file), "batch": lambda n: (torch.randn(n, 64), torch.randn(n, 32))})
    (layer, _) = count(file, [1, 2]).static
    assert layer.optimizer_bytes == 4 * (64 + 32 + 1), "a row and a column of moments, and the step"


def test_identical_layers_are_counted_once() -> None:
    """A model of many layers on torch's meta device has the profile of each of them."""
    with torch.device("meta"):
        many = nn.Sequential(nn.Linear(8, 64), *(nn.Linear(64, 64) for _ in range(200)), nn.Linear(64, 8))
        few = nn.Sequential(nn.Linear(8, 64), *(nn.Linear(64, 64) for _ in range(5)), nn.Linear(64, 8))
    long, short = estimated_of(many, "bf16"), estimated_of(few, "bf16")
    assert [layer.name for layer in long.layers] == [str(i) for i in range(202)]
    assert [layer.sizes for layer in long.layers[:4]] == [layer.sizes for layer in short.layers[:4]]
    assert {layer.times for layer in long.layers[2:-2]} == {short.layers[2].times}
    assert (long.layers[-1].sizes, long.loss.sizes) == (short.layers[-1].sizes, short.loss.sizes)
    assert [(v.source, v.targets) for v in long.values] == [(i - 1, (i,)) for i in range(202)]


def test_layers_that_differ_in_a_setting_are_not_folded() -> None:
    drops, pools = (nn.Dropout(p) for p in (0.1, 0.1, 0.1, 0.1, 0.5)), (nn.MaxPool1d(2) for _ in range(5))
    model = nn.Sequential(nn.Linear(64, 64), *drops, *pools)
    file = ModelFile(**{**vars(file_of(model, 64)), "batch": lambda n: (torch.randn(n, 4, 64), torch.randn(n, 4, 2))})
    outputs = [s.output_bytes for s in count(file, [2]).sizes[2]]
    assert outputs == [*[2 * 4 * 64 * 4] * 6, *(2 * 4 * 64 * 4 // 2**i for i in range(1, 6)), 4]


def test_dropout_keeps_a_mask_of_one_byte() -> None:
    (_, dropout, _, _) = count(file_of(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)), 8), [4]).sizes[
        4
    ]
    assert dropout.saved_bytes == 4 * 8


class Curious(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if x.sum() > 1e9 else x)


def test_a_model_that_looks_at_values_is_counted_on_real_batches(capsys: pytest.CaptureFixture[str]) -> None:
    found = count(file_of(nn.Sequential(Curious(8, 8), nn.Linear(8, 8)), 8))
    assert list(found.sizes) == [1, 2, 4]
    assert sum(o.flop for o in found.work[4][0].forward) == 2 * 4 * 8 * 8
    assert list(count(load(f"{MODELS}:listed")).sizes) == [1, 2, 4, 8, 16], "only between the layers: without data"
    capsys.readouterr()
    with pytest.raises(PlanError, match="the model's forward fails"):
        estimate(f"{MODELS}:failing", hardware="h100", progress=silent)
    assert capsys.readouterr().err == "", "torch's own account of the failed operation is not shown"


def test_a_model_that_needs_data_and_is_too_large_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "REAL_BYTES", 100)
    with pytest.raises(PlanError, match="cannot be counted without data") as caught:
        count(file_of(nn.Sequential(Curious(8, 8), nn.Linear(8, 8)), 8))
    assert "DataDependentOutputException" in caught.value.why


def test_unknown_hardware_names_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        estimate(str(MODELS), hardware="h10", progress=silent)
    assert caught.value.code == 2
    assert "did you mean 'h100'?" in caught.value.why


SPLIT_MODEL = """
import torch
from torch import nn

batch_size = 8

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

def model():
    return nn.Sequential(nn.Linear(16, 16), Mlp(), nn.Linear(16, 16), nn.Linear(16, 16))

def batch(n):
    return torch.randn(n, 16), torch.randn(n, 16)

def splits(model):
    return SPLITS
"""


def split_file(folder: Path, splits: object) -> str:
    path = folder / "model.py"
    path.write_text(SPLIT_MODEL.replace("SPLITS", repr(splits)))
    return str(path)


def test_splits_of_a_model_file(tmp_path: Path) -> None:
    path = split_file(tmp_path, {"0": {"forward": 1, "backward": 1, "whole": 0.5}, "1": "block", "2": "column"})
    first, block, column, none = (layer.split for layer in estimate(path, hardware="a100", progress=silent).layers)
    assert first == Split(forward=1, backward=1, whole=0.5)
    assert column == Split(forward=0, backward=1)
    assert none is None
    assert block is not None
    assert (block.forward, block.backward) == (2, 2)
    whole, divided = 16 + 2, 64 + 64
    assert block.whole == pytest.approx(whole / (whole + divided)), "the norm's output, mean and deviation"
    file = load(path)
    chain = Chain(file, cut(file, file.build(seed=0)), torch.device("cpu"))
    assert splits_of(chain, 2) == {0: first, 1: block, 2: column}, "the measuring profiler reads the same"


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"9": "row"}, "unknown layer '9'"),
        ({"0": "colum"}, "unknown split 'colum'"),
        ({"0": {"forward": 1}}, "the split cannot be read"),
        ({"0": {"forward": 1, "backward": 1, "all": 1}}, "the split cannot be read"),
        ({"0": {"forward": 1, "backward": 1, "whole": 2.0}}, "the split cannot be read"),
    ],
)
def test_wrong_splits_are_refused(tmp_path: Path, splits: object, says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        estimate(split_file(tmp_path, splits), hardware="a100", progress=silent)
    assert caught.value.code == 2


def test_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = split_file(tmp_path, {})
    assert invoke(["profile", path, "--estimate", "a100", "--dtype", "bf16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)["data"]
    assert document["estimated"] is True
    assert (document["device"], document["dtype"]) == ("a100-80 (estimated)", "bfloat16")
    stored = decode(Path(document["path"]).read_bytes(), document["path"])
    assert stored.estimated
    assert len(stored.machine.devices) == 8
    assert invoke(["simulate", "--k", "2", "--m", "4"]) == 0
    assert capsys.readouterr().out.startswith("estimated: model.py")
    assert invoke(["simulate", "--k", "2", "--m", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["estimated"] is True
    assert invoke(["run", "best"]) == 4
    assert "an estimated profile cannot be run" in capsys.readouterr().err
    assert invoke(["profile", path, "--estimate", "h1oo"]) == 2
    assert "unknown hardware 'h1oo'" in capsys.readouterr().err
    assert invoke(["profile", path, "--estimate", "a100", "--dtype", "int8"]) == 2
    assert invoke(["profile", path, "--dtype", "bf16"]) == 2
    Path(path).write_text(Path(path).read_text() + "\n")
    capsys.readouterr()
    assert invoke(["simulate", "--k", "2", "--m", "4"]) == 4
    assert "--estimate a100-80" in capsys.readouterr().err


def test_profiles_without_the_new_fields_are_measured_ones() -> None:
    import msgspec

    old = msgspec.json.decode(msgspec.json.encode(by_hand([1.0, 1.0])))
    del old["estimated"], old["layers"][0]["split"]
    found = decode(msgspec.json.encode(old), "old")
    assert not found.estimated
    assert found.layers[0].split is None
