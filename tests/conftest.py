"""Settings of all tests: no deadlines (nothing here asserts times), and the same examples on every CI run."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("foreplan", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("foreplan")
