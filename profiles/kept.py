"""What was found of this machine, kept for its user: measured once, reused by every profile.

A file per machine, kind of device and version of torch, in `$FOREPLAN_CACHE`, else `$XDG_CACHE_HOME/foreplan`, else
`~/.cache/foreplan`. Who writes last wins, and nobody reads half a file; what cannot be read is measured again, and
where nothing can be written nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from executor import devices
from planner.basis.errors import PlanError
from planner.basis.files import write

T = TypeVar("T")

VERSION = 1
"""Of what is kept: another one when something else is measured, or in another way."""
OF_KIND = {"cuda": 2}
"""The same where only one kind of device is measured in another way."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine is known by. No host name: machines of the same kind are alike."""

    kind: str
    device: str
    count: int
    cores: int
    torch: str
    version: int = VERSION


class _File(msgspec.Struct, frozen=True, kw_only=True):
    key: Key
    found: msgspec.Raw


def key_of(kind: str) -> Key:
    """Return what this machine's devices of one kind are known by, now."""
    return Key(
        kind=kind,
        device=devices.describe(kind),
        count=torch.cuda.device_count() if kind == "cuda" else 0,
        cores=devices.cores(),
        torch=str(torch.__version__),
        version=OF_KIND.get(kind, VERSION),
    )


def folder() -> Path:
    """Where it is kept."""
    own = os.environ.get("FOREPLAN_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foreplan"


def path_of(key: Key) -> Path:
    """Return the file that keeps what has this key."""
    digest = hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:12]
    return folder() / f"machine-{key.kind}-{digest}.json"


def read(key: Key, kind: type[T]) -> T | None:
    """Return what is kept under a key; None where there is nothing, or nothing that can be read."""
    try:
        file = msgspec.json.decode(path_of(key).read_bytes(), type=_File)
        return msgspec.json.decode(file.found, type=kind) if file.key == key else None
    except (OSError, RuntimeError, ValueError, msgspec.DecodeError):  # RuntimeError: a user without a home
        return None


def save(key: Key, found: object) -> None:
    """Keep something under a key, if its folder can be written."""
    try:
        write(path_of(key), msgspec.json.encode(_File(key=key, found=msgspec.Raw(msgspec.json.encode(found)))))
    except (PlanError, RuntimeError):
        return
