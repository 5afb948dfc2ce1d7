"""Trained weights on disk: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from planner.basis.errors import RUN_FAILED, PlanError


def save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a state dict under another name, and give it its own when it is all there.

    Raises `PlanError` (exit 6) where there is no room for it; what was at `path` before is still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(dict(weights), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise PlanError(
            what="the trained weights cannot be written",
            where=str(path),
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix="free some space, or run plan in another folder; the steps measured so far are kept",
            code=RUN_FAILED,
        ) from error
    finally:
        part.unlink(missing_ok=True)
