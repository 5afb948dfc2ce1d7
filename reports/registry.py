"""The sections of the page, in the order they are read. The registry is the only list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from reports.report import Report

Body = Callable[[Report], str]


class Section(NamedTuple):
    """A registered section: its anchor, its heading, and the function that writes its HTML ("" = nothing to show)."""

    id: str
    title: str
    body: Body


_REGISTRY: dict[str, Section] = {}


def section(id: str, title: str) -> Callable[[Body], Body]:
    """Register `Report -> HTML` as the section `id`; sections appear in the order they are registered."""

    def register(function: Body) -> Body:
        _REGISTRY[id] = Section(id, title, function)
        return function

    return register


def all_sections() -> tuple[Section, ...]:
    """Every registered section, in page order."""
    return tuple(_REGISTRY.values())
