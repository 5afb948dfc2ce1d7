"""Where output goes: the result to stdout, progress and errors to stderr; with --json one document on stdout."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console

from planner.basis.errors import INTERRUPTED, NOTHING_FITS, OK, PlanError

SCHEMA = "foreplan.cli/1"

# A pipe or a file has no width: what goes there is not cut to 80 columns.
results = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 120)
progress = Console(stderr=True, highlight=False)


def document(command: str, data: dict[str, Any]) -> None:
    """Print the one JSON document of a command that went well."""
    _print({"schema": SCHEMA, "command": command, "status": "ok", "data": data})


def failure(command: str, error: PlanError, *, as_json: bool) -> None:
    """Print an error: four lines on stderr, or the JSON document on stdout."""
    if not as_json:
        print(str(error), file=sys.stderr)
        return
    status = "infeasible" if error.code == NOTHING_FITS else "interrupted" if error.code == INTERRUPTED else "error"
    fields = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix, "exit_code": error.code}
    if error.details is not None:
        fields["details"] = error.details
    _print({"schema": SCHEMA, "command": command, "status": status, "error": fields})


def _print(document: dict[str, Any]) -> None:
    print(json.dumps(_finite(document), indent=1, sort_keys=True, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["OK", "document", "failure", "progress", "results"]
