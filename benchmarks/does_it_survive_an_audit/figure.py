"""The registry of audited figures: each is predicted by the program and derived by hand, and the two must agree.

A figure is a function under `@figure`; it returns what the program predicts and what the derivation in its docstring
gives. The registry is the only list: the table of `run.py` and `tests/test_audit.py` derive from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple


class Found(NamedTuple):
    """What the program predicts, and what was derived by hand, in the figure's unit."""

    predicted: float
    derived: float


class Figure(NamedTuple):
    """A registered figure. `tolerance` is relative; `before` is what the program said when the audit was made."""

    name: str
    section: str
    unit: str
    tolerance: float
    before: str
    compute: Callable[[], Found]

    @property
    def derivation(self) -> str:
        """How the figure is derived."""
        return inspect.cleandoc(self.compute.__doc__ or "")

    def met(self, found: Found) -> bool:
        """Whether the prediction is within the tolerance."""
        return abs(found.predicted - found.derived) <= self.tolerance * abs(found.derived) + 1e-12


FIGURES: list[Figure] = []


def figure(
    name: str, *, section: str, unit: str = "s", tolerance: float = 0.02, before: str = ""
) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    """Register `() -> Found`; its docstring is the derivation."""

    def register(compute: Callable[[], Found]) -> Callable[[], Found]:
        FIGURES.append(Figure(name, section, unit, tolerance, before, compute))
        return compute

    return register
