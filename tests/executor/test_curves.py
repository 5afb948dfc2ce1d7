"""What a run tells those who watch it: its steps, once each, in order; TensorBoard's writer is one that remembers."""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from executor.following import following
from executor.steps import Extent, announce, append, encode, file_of
from executor.tensorboard import POINTS, Curves
from planner.basis.errors import PlanError
from planner.values.evaluation import Evaluation
from planner.values.step import Step


class Remembering:
    """A SummaryWriter without files."""

    full = False

    def __init__(self, folder: str) -> None:
        self.folder, self.points, self.closed = folder, {}, False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.points.setdefault(name, []).append((step, value))

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Remembering  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Remembering, "full", False)
    return Remembering


def steps_of(count: int, first: int = 0, rate: float = 0.1) -> list[Step]:
    return [Step(begin=i, end=i + 0.5, loss=float(i), rate=rate) for i in range(first, first + count)]


def test_every_step_is_a_point(remembering: type[Remembering]) -> None:
    curves = Curves(Path("there"), batch=8)
    curves(Extent(steps=5), steps_of(2))
    curves(Extent(steps=5), [])
    curves(Extent(steps=5), [], [Evaluation(step=2, loss=0.5, metrics={"accuracy": 0.75}, samples=8, seconds=0.1)])
    curves(Extent(steps=5), steps_of(3, first=2))
    curves.close()
    assert curves.writer.folder == "there"
    assert curves.writer.closed
    assert curves.writer.points == {
        "loss": [(i + 1, float(i)) for i in range(5)],
        "learning_rate": [(i + 1, 0.1) for i in range(5)],
        "samples_per_s": [(i + 1, 16.0) for i in range(5)],
        "validation/loss": [(2, 0.5)],
        "validation/accuracy": [(2, 0.75)],
    }


def test_many_steps_at_once_are_means(remembering: type[Remembering]) -> None:
    curves = Curves(Path("there"), batch=8)
    curves(Extent(steps=1000), steps_of(3 * POINTS, rate=math.nan))
    assert curves.writer.points["loss"] == [(3 * i + 3, 3.0 * i + 1) for i in range(POINTS)]
    assert {value for _, value in curves.writer.points["samples_per_s"]} == {16.0}
    assert "learning_rate" not in curves.writer.points


def test_norms_of_gradients_are_a_curve_where_they_are_clipped(remembering: type[Remembering]) -> None:
    curves = Curves(Path("there"), batch=8)
    steps = [step._replace(norm=norm) for step, norm in zip(steps_of(3), (0.5, math.inf, 2.0), strict=True)]
    curves(Extent(steps=3), steps)
    assert curves.writer.points["gradient_norm"] == [(1, 0.5), (2, math.inf), (3, 2.0)]


def test_a_full_disk_ends_the_curves_only(remembering: type[Remembering], monkeypatch: pytest.MonkeyPatch) -> None:
    curves = Curves(Path("there"), batch=8)
    curves(Extent(steps=5), steps_of(2))
    monkeypatch.setattr(Remembering, "full", True)
    curves(Extent(steps=5), steps_of(2))
    curves.close()
    assert "space" in curves.lost


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PlanError, match="needs the package") as raised:
        Curves(Path("there"), batch=8)
    assert "pip install" in raised.value.fix


def test_torchs_own_writer(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the optional package is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves(tmp_path, batch=8)
    curves(Extent(steps=5), steps_of(5))
    curves.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(i + 1, float(i)) for i in range(5)]


def test_watches_are_told_every_step_once(tmp_path: Path) -> None:
    """Also the last ones, which were written just before the run ended, and nothing before training begins."""
    told: list[tuple[int, Sequence[Any]]] = []
    judged: list[Evaluation] = []

    def watch(extent: Extent, steps: Sequence[Any], evaluations: Sequence[Evaluation]) -> None:
        told.append((extent.steps, steps))
        judged.extend(evaluations)

    found = [Evaluation(step=step, loss=1 / step, samples=8, seconds=0.1) for step in (2, 3, 4)]
    append(tmp_path / "evaluations.jsonl", b"".join(msgspec.json.encode(e) + b"\n" for e in found) + b"half")
    with following(tmp_path, 2, [watch]):
        append(file_of(tmp_path, 0), encode(steps_of(3, rate=math.nan)))
        announce(tmp_path, Extent(steps=7))
        append(file_of(tmp_path, 1), encode([step._replace(loss=0.0) for step in steps_of(4)]))
    append(file_of(tmp_path, 0), encode(steps_of(4, first=3)))
    assert {steps for steps, _ in told} == {7}
    assert [step for _, some in told for step in some] == steps_of(3)
    assert judged == found[:2], "of steps that all ranks have finished"
