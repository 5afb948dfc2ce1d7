"""Sequence lengths, as a person meets them: profiles of several, a search over them, and plans that are of one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import msgspec
import pytest

from executor.model_file import load
from planner.basis.errors import ARTEFACT, USAGE, PlanError
from planner.cli.main import invoke
from planner.store import Store
from planner.values.profile import Profile
from tests import factory
from tests.test_cli import failing
from tests.test_cli_search import data, here, text  # noqa: F401

QUICK = ("--strategy", "gpipe", "--strategy", "data-parallel", "--saving", "none")
ROOT = Path(__file__).parent.parent
GPT = str(ROOT / "examples" / "gpt.py")


def of_length(tokens: int, seconds: float) -> Profile:
    """Four layers, each so many seconds forward and as many backward per sample; on 8 devices made by hand."""
    costs = factory.profile([seconds] * 4, message_bytes=10, machine=factory.devices(8))
    key = msgspec.structs.replace(costs.key, sequence=tokens, torch=importlib.metadata.version("torch"))
    return msgspec.structs.replace(costs, key=key, batch=8, model_path="model.py")


def two_lengths() -> None:
    """Twice the tokens take four times as long: short sequences are the better by 2, whatever the plan."""
    for tokens, seconds in ((64, 1e-3), (128, 4e-3)):
        Store().save_profile(of_length(tokens, seconds))


def test_every_length_has_a_profile_of_its_own() -> None:
    two_lengths()
    names = sorted(path.stem for path in Path(".plan/profiles").glob("*.json"))
    assert names == ["model-s128-by-hand", "model-s64-by-hand"]


def test_a_search_over_lengths_compares_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    two_lengths()
    out = text(capsys, "search", *QUICK, "--sequence", "64", "--sequence", "128")
    assert "8 samples of 64 or 128 tokens per step" in out
    assert "tokens/s" in out
    assert "samples/s" not in out
    found = data(capsys, "search", *QUICK, "--sequence", "64", "--sequence", "128")
    assert found["tokens_per_sample"] == [64, 128]
    assert found["best"].endswith("-s64")
    alone = [data(capsys, "search", *QUICK, "--sequence", tokens) for tokens in ("64", "128")]
    assert found["candidates"] == sum(one["candidates"] for one in alone)
    tokens_s = [max(plan["throughput_tokens_per_s"] for plan in one["plans"]) for one in (found, *alone)]
    assert tokens_s[0] == pytest.approx(tokens_s[1])
    assert tokens_s[1] == pytest.approx(2 * tokens_s[2], rel=0.01)
    assert not any("-s64" in plan["plan"] for plan in alone[0]["plans"]), "one length needs no name"


def test_a_plan_of_a_length_is_looked_at_with_its_own_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """The last profile is of 128 tokens; a plan of 64 takes a quarter of the time, not what that profile says."""
    two_lengths()
    data(capsys, "search", *QUICK, "--sequence", "64", "--sequence", "128")
    plan = next(Path(".plan/plans").glob("data-parallel-k8*-s64.toml")).stem
    file = f".plan/plans/{plan}.toml"
    assert "sequence = 64" in Path(file).read_text()
    assert "of 64 tokens" in text(capsys, "show", plan)
    assert any("samples of 64 tokens" in line for line in data(capsys, "explain", plan)["sentences"])
    for reference in (plan, file):
        found = data(capsys, "simulate", reference)
        assert found["profile"] == "model-s64-by-hand"
        assert found["plans"][0]["step_s"] == pytest.approx(4 * 2 * 1e-3, rel=0.01)
    refused = failing(capsys, ARTEFACT, "simulate", file, "--profile", "model-s128-by-hand")
    assert "that profile is of 128 tokens" in refused["why"]


def test_a_length_without_a_profile_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    two_lengths()
    for command in (("search",), ("simulate", "--k", "2", "--m", "8")):
        error = failing(capsys, ARTEFACT, *command, "--sequence", "256")
        assert error["fix"] == "plan profile model.py --sequence 256"
        assert "there are profiles of 64, 128" in error["why"]
    stale = of_length(256, 1e-3)
    other = msgspec.structs.replace(stale.key, torch="1.0")
    Store().save_profile(msgspec.structs.replace(stale, key=other))
    error = failing(capsys, ARTEFACT, "search", "--profile", "model-s64-by-hand", "--sequence", "256")
    assert "it is stale: torch: 1.0 -> 2" in error["why"]


def test_a_shipped_profile_has_the_one_length_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--profile", "gnmt", "--k", "2", "--m", "2", "--batch", "64")
    assert data(capsys, "simulate", *named, "--sequence", "48")["plans"]
    assert "leave --sequence out" in failing(capsys, USAGE, "simulate", *named, "--sequence", "96")["fix"]
    assert "no sequences" in failing(capsys, USAGE, "search", "--profile", "vgg16", "--sequence", "96")["why"]


def test_a_model_file_makes_samples_of_the_length_asked_for() -> None:
    inputs, targets = load(GPT, 128).draw(2, seed=0)
    assert (inputs[0].shape, targets.shape) == ((2, 128), (2, 128))
    assert load(GPT).tokens() == 64, "the default of batch's own parameter"


def test_a_length_that_a_model_file_does_not_make_is_refused(tmp_path: Path) -> None:
    """`batch` without a length: of integers of the shape (samples, tokens) the length is known all the same."""
    file = tmp_path / "fixed.py"
    file.write_text(
        "import torch\nmodel = lambda: torch.nn.Embedding(9, 4)\n"
        "batch = lambda n: (torch.zeros(n, 32, dtype=torch.long), torch.zeros(n, 32, 4))\n"
    )
    assert load(str(file)).tokens() == 32
    load(str(file), 32).draw(2, seed=0)
    with pytest.raises(PlanError, match="its samples have 32 tokens, and it takes no other length"):
        load(str(file), 64).draw(2, seed=0)
    file.write_text("import torch\nmodel = lambda: torch.nn.Linear(4, 4)\nbatch = lambda n: (torch.zeros(n, 4),) * 2\n")
    assert load(str(file)).tokens() == 0
    with pytest.raises(PlanError, match="its inputs are no sequences of tokens"):
        load(str(file), 64).draw(2, seed=0)


def test_estimates_of_several_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    """An estimate is of the length asked for: attention's FLOP grow with the square of it, so no line is parallel."""
    lengths = ("--sequence", "64", "--sequence", "256")
    found = data(capsys, "profile", GPT, "--estimate", "h100", "--sizes", "1,2,4", *lengths)["profiles"]
    assert [one["tokens_per_sample"] for one in found] == [64, 256]
    block = [next(layer for layer in one["layers"] if layer["name"].startswith("blocks.1")) for one in found]
    assert block[1]["forward_flop"] > 4 * block[0]["forward_flop"]
    assert invoke(["search", *lengths, "--k", "1", "--batch", "4"]) == 0
