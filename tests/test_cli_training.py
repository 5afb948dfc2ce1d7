"""What `plan run` says while it trains, without a process: the line, and how often it comes."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from executor.steps import Extent
from planner.basis.errors import USAGE
from planner.cli import output, training
from planner.cli.main import invoke
from planner.cli.training import Progress
from planner.simulate.predict import simulate
from planner.values.outcome import Outcome
from planner.values.plan import Plan, Stage
from planner.values.step import Step
from tests import factory


@pytest.fixture
def predicted() -> Outcome:
    """Of a plan with 8 samples per step, 4.5 s long or so."""
    profile = factory.profile([1.0] * 4, machine=factory.devices(8), message_bytes=10)
    stages = (Stage(layers=tuple(layer.name for layer in profile.layers), devices=("d0",)),)
    plan = Plan(strategy="single", schedule="1f1b", stages=stages, microbatches=2, batch=8)
    return simulate(profile, plan, profile.machine)


def steps_of(count: int) -> list[Step]:
    return [Step(begin=2.0 * i, end=2.0 * i + 2, loss=1 / (i + 1), rate=0.1) for i in range(count)]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stderr, which is no terminal."""
    found = io.StringIO()
    monkeypatch.setattr(output, "progress", Console(file=found))
    return found


def test_the_line(predicted: Outcome, shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "EVERY_S", 0.0)
    progress = Progress(predicted)
    progress(Extent(steps=100), steps_of(4))
    speed = f"predicted {8 / predicted.step_s:.3g} samples/s"
    assert shown.getvalue() == f"step 4 of 100, loss 0.25, 4 samples/s ({speed}), 3 min 12 s left\n"


def test_the_norm_is_shown_where_gradients_are_clipped(predicted: Outcome, shown: io.StringIO) -> None:
    progress = Progress(predicted)
    progress(Extent(steps=9), [step._replace(norm=1.25) for step in steps_of(1)])
    assert progress.line(Extent(steps=9)).startswith("step 1 of 9, loss 1, gradient norm 1.25, 4 samples/s")


def test_epochs_and_tokens(predicted: Outcome, shown: io.StringIO) -> None:
    plan = msgspec.structs.replace(predicted.plan, sequence=512)
    progress = Progress(msgspec.structs.replace(predicted, plan=plan))
    progress(Extent(steps=10, epoch=5), steps_of(5))
    assert progress.line(Extent(steps=10, epoch=5)).startswith("step 5 of 10 (epoch 1 of 2), loss 0.2, 2050 tokens/s")
    progress(Extent(steps=10, epoch=5), steps_of(1))
    assert "step 6 of 10 (epoch 2 of 2)" in progress.line(Extent(steps=10, epoch=5))


def test_without_a_terminal_a_line_comes_now_and_then(predicted: Outcome, shown: io.StringIO) -> None:
    progress = Progress(predicted)
    for _ in range(9):
        progress(Extent(steps=10), steps_of(1))
    assert shown.getvalue() == ""
    progress(Extent(steps=10), steps_of(1))
    assert shown.getvalue().startswith("step 10 of 10, ")
    assert shown.getvalue().endswith(", 0 s left\n")


def test_in_a_terminal_one_line_changes(predicted: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    found = io.StringIO()
    monkeypatch.setattr(output, "progress", Console(file=found, force_terminal=True, width=30))
    progress = Progress(predicted)
    for _ in range(2):
        progress(Extent(steps=2), steps_of(1))
    first, last = found.getvalue().split("\r")
    assert first == "\x1b[2Kstep 1 of 2, loss 1, 4 sample"
    assert last == "\x1b[2Kstep 2 of 2, loss 1, 4 sample\n"


def test_a_terminal_that_is_gone_stops_nothing(predicted: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(output, "progress", Console(file=Gone()))
    Progress(predicted)(Extent(steps=1), steps_of(1))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--steps", "3", "--epochs", "1"), "steps or epochs"),
        (("--epochs", "0"), "--epochs must be positive"),
    ],
)
def test_how_long_is_said_once(
    arguments: tuple[str, ...],
    what: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke(["run", "best", *arguments]) == USAGE
    assert what in capsys.readouterr().err
