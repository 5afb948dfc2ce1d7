"""The flows of a transfer: which links its bytes pass, for whoever simulates how transfers share hardware."""

from __future__ import annotations

from typing import NamedTuple

from planner.values.routes import Path


class Flow(NamedTuple):
    """Bytes that pass one path of directed links while a transfer runs.

    All flows of a transfer run at the same time, in step, and it is done when they are. A ring has one flow per hop,
    with the bytes that the hop carries in all rounds.
    """

    path: Path
    bytes: float
