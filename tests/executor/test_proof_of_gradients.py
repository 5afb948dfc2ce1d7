"""A part of the proof of gradients; all of it is `benchmarks/are_the_gradients_right`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.executor.proof import SAVINGS, prove, some, synchronous


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_synchronous_schedule_has_the_gradients_of_one_process(k: int, tmp_path: Path) -> None:
    found = prove(some(k), k, tmp_path)
    assert not [f"{one.case.name}: {one.difference} {one.why}" for one in found if not one.right]
    assert any(one.equal for one in found)


def test_the_part_has_every_schedule_and_every_saving() -> None:
    names = [case.name for k in (1, 2, 4) for case in some(k)]
    assert all(any(f"-{schedule}-" in name for name in names) for schedule in synchronous())
    assert all(any(name.endswith(f"-{saving}") for name in names) for saving in SAVINGS)
