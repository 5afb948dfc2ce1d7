"""When a run evaluates its model, and who is told what was found: the learning rate, and a file that others follow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from executor.evaluation import Evaluator
from executor.rates import Rates
from executor.steps import Extent, append
from planner.values.evaluation import Evaluation


class Evaluations:
    """The evaluations of a run: `every` so many steps, or at the end of each epoch where it is 0; and at its end.

    Every rank has one; those with a `folder` write what was found into it.
    """

    def __init__(
        self, evaluator: Evaluator, rates: Rates, extent: Extent, *, every: int = 0, folder: Path | None = None
    ) -> None:
        self.evaluator, self.rates, self.folder = evaluator, rates, folder
        self.steps, self.every = extent.steps, every or extent.epoch

    def due(self, done: int) -> bool:
        """Whether the model is evaluated behind so many steps."""
        return done == self.steps or bool(self.every and done % self.every == 0)

    def behind(self, done: int) -> None:
        """Evaluate the model as it is after so many steps, and tell it."""
        found = self.evaluator.run(done)
        self.rates.judge(found.loss)
        if self.folder is not None:
            append(_file(self.folder), msgspec.json.encode(found) + b"\n")


def evaluated(folder: Path, skip: int = 0) -> list[Evaluation]:
    """Return what a run has found so far, without the first `skip`."""
    file = _file(folder)
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [msgspec.json.decode(line, type=Evaluation) for line in lines[skip:] if line.endswith(b"\n")]


def shorten(folder: Path, steps: int) -> None:
    """Forget what was found behind more than so many steps."""
    begin_with(folder, [found for found in evaluated(folder) if found.step <= steps])


def begin_with(folder: Path, found: Iterable[Evaluation]) -> None:
    """Write what was found before, in an earlier run, in the place of all that there is."""
    _file(folder).write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in found))


def _file(folder: Path) -> Path:
    return folder / "evaluations.jsonl"
