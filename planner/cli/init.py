"""`plan init`: a commented model file to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from planner.basis import files
from planner.basis.errors import PlanError
from planner.cli import output
from planner.cli.options import JsonOption


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("model.py"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a commented model file to start from."""
    if path.exists() and not force:
        raise PlanError(
            what="the file exists already",
            where=str(path),
            why="plan init does not overwrite",
            fix=f"plan init {path} --force, or another name",
        )
    template = (resources.files("planner") / "cli" / "template.py.txt").read_bytes()
    files.write(path, template)
    if json:
        output.document("init", {"path": str(path)})
        return
    output.results.print(f"wrote {path}: a small model that works as it is, to be replaced by yours")
    output.results.print(f"next: plan profile {path}")
