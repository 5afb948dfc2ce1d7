"""A micro-batch that nobody measured is said, with numbers."""

from __future__ import annotations

import msgspec

from planner.basis.errors import INTERRUPTED
from planner.cli.measured import beyond, interrupted, notes, timed
from planner.values.profile import Measuring
from tests import factory


def test_beyond() -> None:
    profile = factory.profile([1.0] * 2)
    first, last = timed(profile)[0], timed(profile)[-1]
    assert beyond(profile, [first, last]) == ""
    words = beyond(profile, [last, 1024 * last, 1024 * last])
    assert f"{1024 * last:,} samples lie outside" in words
    assert str(last) in words
    many = beyond(profile, [last + n for n in range(1, 9)])
    assert f"{last + 1:,}, {last + 2:,} … {last + 8:,} samples" in many
    assert beyond(msgspec.structs.replace(profile, estimated=True), [1024 * last]) == ""


def test_notes() -> None:
    """All that a budget leaves out is said; nothing where there is nothing to say."""
    profile = factory.profile([1.0] * 3)
    assert list(notes(profile, 30.0)) == []
    assert list(notes(msgspec.structs.replace(profile, measuring=Measuring(rounds=3)), 30.0)) == []
    how = Measuring(rounds=1, between=(4, 8), beyond=(64,), unlike=0.02, derived=("halves follow",), one_by_one=True)
    layers = (*profile.layers[:2], msgspec.structs.replace(profile.layers[2], like=profile.layers[1].name))
    said = list(notes(msgspec.structs.replace(profile, measuring=how, layers=layers), 30.0))
    for words, expected in zip(
        said, ("one layer at a time", "stands for", "4 or 8", "64 samples", "halves"), strict=True
    ):
        assert expected in words
    error = interrupted(msgspec.structs.replace(profile, measuring=how), "here")
    assert "1 round of" in error.what
    assert error.code == INTERRUPTED
