"""Who holds what: stages' devices dealt to the rows of a program, and the rows that hold a stage."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from planner.orders import schedules


class Dealt(NamedTuple):
    """The devices behind each row, all of them, and whether each is there only once."""

    groups: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    once: bool


@functools.lru_cache(maxsize=64)
def dealt(name: str, own: tuple[tuple[str, ...], ...], depth: int, tensor: int, uneven: bool) -> Dealt:
    """Deal stages' devices to rows: kept, as a search makes many plans for the same ones."""
    groups = _rows(name, own, depth, tensor, uneven)
    names = tuple(itertools.chain.from_iterable(groups))
    return Dealt(groups, names, len(set(names)) == len(names))


def _rows(
    name: str, own: tuple[tuple[str, ...], ...], depth: int, tensor: int, uneven: bool
) -> tuple[tuple[str, ...], ...]:
    if uneven:
        return tuple(group for devices in own for group in in_groups(devices, tensor))
    schedule = schedules.get(name)
    if schedule.copies == 1:  # device d's first stage is stage d, wherever its others come from
        for s, devices in enumerate(own[depth:], depth):
            (home,) = schedule.homes(s, depth)
            if devices != own[home]:
                raise ValueError(f"stages: the schedule {name} places stage {s} with stage {home}")
        return tuple(
            group for row in zip(*(in_groups(one, tensor) for one in own[:depth]), strict=True) for group in row
        )
    rows: dict[int, tuple[str, ...]] = {}
    for s, devices in enumerate(own):
        homes = schedule.homes(s, depth)
        for index, group in enumerate(in_groups(devices, tensor)):
            replica, copy = divmod(index, len(homes))
            row = replica * depth + homes[copy]
            if rows.setdefault(row, group) != group:
                raise ValueError(f"stages: the schedule {name} places stage {s} with {rows[row]}")
    return tuple(rows[row] for row in sorted(rows))


def in_groups(devices: tuple[str, ...], tensor: int) -> list[tuple[str, ...]]:
    """Return a stage's devices in groups of those that split its tensors."""
    if tensor == 1:
        return [(name,) for name in devices]
    return [devices[i : i + tensor] for i in range(0, len(devices), tensor)]


@functools.lru_cache(maxsize=64)
def holders(stages_of: tuple[tuple[int, ...], ...], stages: int) -> tuple[tuple[int, ...], ...]:
    """Return the rows that hold each stage, in their order."""
    found: list[list[int]] = [[] for _ in range(stages)]
    for row, held in enumerate(stages_of):
        for stage in held:
            found[stage].append(row)
    return tuple(map(tuple, found))


def replicas_of(holders: Sequence[tuple[int, ...]], rows: int) -> tuple[int, ...]:
    """Return which replica of the pipeline each row belongs to: its place among the holders of its stages.

    Of a stage that a pipeline holds twice, both copies count. Rows of stages with different numbers of replicas are all
    of one, the first.

    >>> replicas_of([(0, 2), (1, 3)], 4)
    (0, 0, 1, 1)
    """
    found = [0] * rows
    if len({len(own) for own in holders}) == 1:
        for own in holders:
            for place, row in enumerate(own):
                found[row] = place
    return tuple(found)
