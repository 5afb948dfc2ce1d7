"""Trained weights on disk: whole, or not at all; as torch, safetensors and Hugging Face's libraries read them."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from executor import hollow
from executor.model_file import ModelFile
from planner.basis.errors import RUN_FAILED, PlanError

FILE, SAFETENSORS, PRETRAINED = "weights.pt", "weights.safetensors", "pretrained"
_DESCRIPTION = "saved_as.json"
_LOG = logging.getLogger("foreplan")


class SavedAs(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's weights must be known to be: names that are one tensor, and whether it has `save_pretrained`."""

    shared: tuple[tuple[str, ...], ...] = ()
    pretrained: bool = False

    def write(self, folder: Path) -> None:
        """Leave it to whoever gathers the ranks' weights."""
        (folder / _DESCRIPTION).write_bytes(msgspec.json.encode(self))


def await_all(folder: Path, ranks: int, kind: str) -> None:
    """Wait until every rank has written its file of a kind into a folder: its weights, or that it has compiled.

    A large stage takes longer than ranks wait for each other's messages. Who launched them ends all when one fails.
    """
    while not all((folder / f"rank{rank}.{kind}").exists() for rank in range(ranks)):
        time.sleep(0.02)


def gather(folder: Path, ranks: int, holders: tuple[int, ...], file: ModelFile) -> None:
    """Make one of the weights that every rank has written into a folder, in all forms that the model has.

    `weights.pt` is the plain model's state dict; `weights.safetensors` has every tensor once, as
    `safetensors.torch.load_model` reads it; `pretrained` is what the model's own `save_pretrained` writes. `holders`
    are ranks that have all stages between them. Raises `PlanError` (exit 6) where the first cannot be written; what is
    wrong with another is logged.
    """
    weights: dict[str, Any] = {}
    for rank in holders:
        weights |= torch.load(folder / f"rank{rank}.pt", mmap=True, weights_only=False)  # of our own ranks
    kind = msgspec.json.decode((folder / _DESCRIPTION).read_bytes(), type=SavedAs)
    for first, *others in kind.shared:
        weights |= dict.fromkeys(others, weights[first])
    save(weights, folder / FILE)
    for rank in range(ranks):
        (folder / f"rank{rank}.pt").unlink()
    (folder / _DESCRIPTION).unlink()
    attempts: list[tuple[str, Callable[[], None]]] = [
        (SAFETENSORS, lambda: _save_safetensors(weights, kind, folder / SAFETENSORS))
    ]
    if kind.pretrained:
        attempts.append((PRETRAINED, lambda: _save_pretrained(weights, file, folder / PRETRAINED)))
    for name, attempt in attempts:
        try:
            attempt()
        except Exception as error:
            _LOG.warning("the weights are in %s, and not in %s as well: %s", FILE, name, error)


def save(weights: Mapping[str, Any], path: Path) -> None:
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


def _save_safetensors(weights: Mapping[str, Any], kind: SavedAs, path: Path) -> None:
    """Write every tensor once, the other names of shared ones as metadata: what `safetensors.torch.save_model` does."""
    from safetensors.torch import save_file

    other = {name: first for first, *others in kind.shared for name in others}
    strange = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{strange[0]} is no tensor")
    own = {name: tensor.contiguous() for name, tensor in weights.items() if name not in other}
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(own, part, metadata={"format": "pt", **other})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _save_pretrained(weights: Mapping[str, Any], file: ModelFile, path: Path) -> None:
    """Let the user's model write itself: made without storage, with the trained weights in the place of its own."""
    model: Any = hollow.build(file, seed=0)
    model.load_state_dict(weights, strict=True, assign=True)
    if callable(getattr(model, "tie_weights", None)):
        model.tie_weights()
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(str(part))
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
