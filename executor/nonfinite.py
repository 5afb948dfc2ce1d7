"""Which layer was the first to make something that is no number, found by doing the step again and looking.

Looking at every layer's output costs time, so no run does it. A step is the same when it is done again from the last
checkpoint: the launcher lets the ranks repeat it, with `watch` in that step, and asks for the `first`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import torch

from executor.batch import tensors
from executor.layer import Layer
from executor.rank import Rank
from executor.stage import Stage


class Found(msgspec.Struct, frozen=True, order=True):
    """The first output of a rank that is no number: of which micro-batch and layer (by its number), and why."""

    microbatch: int
    number: int
    layer: str
    why: str


def watch(me: Rank, folder: Path, rank: int) -> None:
    """Look at what the layers of a rank make from now on, and write the first that is no number to a folder."""
    current = [0]
    seen: list[Found] = []

    def looking(number: int, layer: Layer) -> Layer:
        def run(*given: Any) -> Any:
            fine = finite(given)
            made = layer.run(*given)
            if not finite(made):
                if not finite(list(layer.module.parameters())):
                    why = "its weights are no numbers any more since the update before"
                elif not fine:
                    why = "what goes into it is no number"
                else:
                    why = "what goes into it and its weights are finite"
                seen.append(Found(current[0], number, layer.name, why))
                (folder / f"nonfinite{rank}.json").write_bytes(msgspec.json.encode(min(seen)))
            return made

        return dataclasses.replace(layer, compiled=run)

    def begins(stage: Stage) -> None:
        forward = stage.forward

        def noted(microbatch: int, *args: Any, **keywords: Any) -> None:
            current[0] = microbatch
            forward(microbatch, *args, **keywords)

        stage.forward = noted  # type: ignore[method-assign]

    for stage in me.stages.values():
        begins(stage)
        number = stage.module.first
        stage.module.layers = tuple(looking(number + i, layer) for i, layer in enumerate(stage.module.layers))


def first(folder: Path) -> Found | None:
    """Return the first of what all ranks have found: of the earliest micro-batch the earliest layer."""
    found = [msgspec.json.decode(path.read_bytes(), type=Found) for path in folder.glob("nonfinite*.json")]
    return min(found, default=None)


def finite(values: Any) -> bool:
    """Whether all numbers in a structure of tensors are finite."""
    return all(bool(torch.isfinite(one).all()) for one in tensors(values) if one.is_floating_point())
