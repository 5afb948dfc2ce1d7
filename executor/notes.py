"""What a run has to say to a person while it trains: a line per note, in its folder."""

from __future__ import annotations

from pathlib import Path

from executor.steps import append


def note(folder: Path, text: str) -> None:
    """Leave a note for whoever follows the run."""
    append(_file(folder), (" ".join(text.split()) + "\n").encode())


def noted(folder: Path, skip: int = 0) -> list[str]:
    """Return what has been noted so far, without the first `skip`."""
    file = _file(folder)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line.rstrip("\n") for line in lines[skip:] if line.endswith("\n")]


def _file(folder: Path) -> Path:
    return folder / "notes"
