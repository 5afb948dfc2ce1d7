"""What a rank's LOAD takes its replica's share of a step's batch from."""

from __future__ import annotations

from typing import Protocol

from executor.batch import Drawn
from executor.model_file import ModelFile


class Feed(Protocol):
    """One replica's shares of the batches of all steps, one after another; every rank of the replica sees the same."""

    @property
    def steps(self) -> int | None:
        """How many steps an epoch has; None where there are no epochs."""

    def set_epoch(self, epoch: int) -> None:
        """Go on with the first step of an epoch."""

    def take(self) -> Drawn:
        """Return the share of the next step; behind the last of an epoch comes the first of the next one."""

    def close(self) -> None:
        """Let go of what makes batches ready. Nothing can be taken any more."""


class Draws:
    """Shares drawn by `batch(n)`: as many as are asked for, each from a seed of its own.

    There are no epochs: whatever `set_epoch` is told, the next share is drawn from the next seed.
    """

    steps: int | None = None

    def __init__(self, file: ModelFile, samples: int, *, replicas: int = 1, replica: int = 0, seed: int = 0) -> None:
        self.file, self.samples, self.replicas, self.replica, self.seed = file, samples, replicas, replica, seed
        self.step = 0

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: no sample is ever drawn again."""

    def take(self) -> Drawn:
        """Draw the share of the next step."""
        seed = (1 + self.seed + self.step) * self.replicas + self.replica  # the weights' seed is `self.seed` itself
        drawn = self.file.drawn(self.samples, seed)
        self.step += 1
        return drawn

    def close(self) -> None:
        """There is nothing to let go of."""


def open_feed(file: ModelFile, samples: int, *, replicas: int = 1, replica: int = 0, seed: int = 0) -> Feed:
    """Return what one of so many replicas takes its shares of so many samples from."""
    return Draws(file, samples, replicas=replicas, replica=replica, seed=seed)
