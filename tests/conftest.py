"""Settings of all tests: no deadlines (nothing here asserts times), and the same examples on every CI run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("foreplan", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("foreplan")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept of this machine: measured once for all tests, and nothing of the user's own is read or changed."""
    before = os.environ.get("FOREPLAN_CACHE")
    os.environ["FOREPLAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["FOREPLAN_CACHE"]
    else:
        os.environ["FOREPLAN_CACHE"] = before
