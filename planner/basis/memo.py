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
    if key not in keeper.tables:
        keeper.tables[key] = make()
    return cast("T", keeper.tables[key])
