"""A plan: which layers form which stage, on which devices, under which schedule. A value that a person can edit.

It knows no costs. `planner.lowering` turns it into a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from planner.errors import ARTEFACT, PlanError


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run of consecutive layers, by name, and the devices that hold it: one per replica."""

    layers: tuple[str, ...]
    devices: tuple[str, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one step is trained.

    `microbatches` (M) counts the whole step: with R replicas each takes M / R of them. `batch` is samples per step,
    so a micro-batch has `batch / microbatches`. `threads` are each device's. With `recompute` a stage keeps only its
    inputs and outputs between forward and backward.

    `str(plan)` is safe as a file name:

    >>> stage = Stage(layers=("a",), devices=("d0",))
    >>> str(Plan(strategy="gpipe", schedule="gpipe", stages=(stage,), microbatches=32, batch=64, recompute=True))
    'gpipe-k1-m32-recompute'
    """

    strategy: str
    schedule: str
    stages: tuple[Stage, ...]
    microbatches: int
    batch: int
    recompute: bool = False
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.stages or any(not stage.layers or not stage.devices for stage in self.stages):
            raise ValueError("stages: every stage needs layers and devices")
        if len({len(stage.devices) for stage in self.stages}) != 1:
            raise ValueError("stages: every stage needs the same number of devices (replicas)")
        if len(set(self.devices)) != sum(len(stage.devices) for stage in self.stages):
            raise ValueError("stages: a device holds one stage")
        if self.microbatches < 1 or self.batch < 1 or self.threads < 1:
            raise ValueError("microbatches, batch and threads must be positive")
        if self.batch % self.microbatches:
            raise ValueError(f"microbatches: {self.microbatches} do not divide a batch of {self.batch}")
        if self.microbatches % self.replicas:
            raise ValueError(f"microbatches: {self.microbatches} cannot be dealt to {self.replicas} replicas")

    def __str__(self) -> str:
        name = f"{self.strategy}-k{len(self.devices)}-m{self.microbatches}"
        return f"{name}-recompute" if self.recompute else name

    @property
    def replicas(self) -> int:
        """Copies of the pipeline, each with its share of the micro-batches."""
        return len(self.stages[0].devices)

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices: replica by replica, stage by stage. Their order is the order of the program's rows."""
        return tuple(stage.devices[r] for r in range(self.replicas) for stage in self.stages)

    @property
    def samples(self) -> int:
        """Samples per micro-batch."""
        return self.batch // self.microbatches

    def stage_of(self, device: int) -> int:
        """Stage that the device with this row holds."""
        return device % len(self.stages)

    def layer_ranges(self, layers: Sequence[str]) -> tuple[range, ...]:
        """Return each stage's layers as indices into `layers`.

        Raises `PlanError` (exit 4) unless the stages are exactly those layers in that order.
        """
        mine = [name for stage in self.stages for name in stage.layers]
        if mine != list(layers):
            odd = next((m for m, n in zip(mine, layers, strict=False) if m != n), f"{len(mine)} layers")
            raise PlanError(
                what="the plan is for another model",
                where=f"plan {self}, layer '{odd}'",
                why=f"the profile's layers are {', '.join(layers)}",
                fix="plan simulate   (plans the model of the profile)",
                code=ARTEFACT,
            )
        ends = [sum(len(stage.layers) for stage in self.stages[: i + 1]) for i in range(len(self.stages))]
        return tuple(range(end - len(stage.layers), end) for stage, end in zip(self.stages, ends, strict=True))


def read(path: Path) -> Plan:
    """Read a plan from TOML. Raises `PlanError` (exit 4) that names the field."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Plan)
    except OSError as error:
        why, fix = error.strerror or str(error), "plan simulate   (writes the plans it compares)"
        raise PlanError(what="the plan cannot be read", where=str(path), why=why, fix=fix, code=ARTEFACT) from error
    except (msgspec.DecodeError, ValueError) as error:
        fix = "correct that field, or run plan simulate to write the plan again"
        raise PlanError(
            what="the plan is not valid", where=str(path), why=str(error), fix=fix, code=ARTEFACT
        ) from error


def to_toml(plan: Plan) -> str:
    """Return the plan as TOML, the form `read` takes."""
    return msgspec.toml.encode(plan).decode()
