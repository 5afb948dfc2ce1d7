"""What is derived from a profile or a cluster is kept with it, so that it lives as long and is made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, cast

T = TypeVar("T")


class Keeper(Protocol):
    """A profile or a cluster."""

    @property
    def tables(self) -> dict[object, object]:
        """What has been derived from it, by key."""


def memoised(keeper: Keeper, key: Hashable, make: Callable[[], T]) -> T:
    """Return what has been derived before under `key`, or make it now."""
    tables = keeper.tables
    found = tables.get(key, tables)  # asked once: to hash the names of a thousand devices takes long
    if found is tables:
        found = tables[key] = make()
    return cast("T", found)
