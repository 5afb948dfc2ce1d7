"""A profile is of the model file and of all that it imports; two files of one name have two profiles."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from planner.basis import sources
from planner.store import Store
from tests.factory import profile


def test_what_a_model_imports_from_its_folder_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, beside = tmp_path / "model.py", tmp_path / "blocks_of_a_test.py"
    model.write_text("import blocks_of_a_test\n")
    beside.write_text("WIDTH = 4\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("blocks_of_a_test")
    try:
        assert sources.imported(model) == ("blocks_of_a_test.py",)
    finally:
        del sys.modules["blocks_of_a_test"]
    assert sources.imported(model) == ()
    before = sources.digest(model, ["blocks_of_a_test.py"])
    assert before != sources.digest(model)
    beside.write_text("WIDTH = 8\n")
    changed = sources.digest(model, ["blocks_of_a_test.py"])
    assert changed != before
    beside.unlink()
    assert sources.digest(model, ["blocks_of_a_test.py"]) not in (before, changed)


def test_models_of_one_name_in_two_folders_have_two_profiles(tmp_path: Path) -> None:
    store = Store(tmp_path / ".plan")
    one, other = (
        msgspec.structs.replace(profile([1.0]), model_path=str(tmp_path / folder / "model.py")) for folder in "ab"
    )
    first, second, again = store.save_profile(one), store.save_profile(other), store.save_profile(one)
    assert first == again != second
    assert second.name == f"b-{first.name}"
    assert store.load_profile(first).model_path == one.model_path
