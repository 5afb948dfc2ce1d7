"""Loops that numba compiles when there is enough to do, and Python runs as they are when there is not.

One text for both: a plan of a few thousand actions does not wait for a compiler, a search over millions does not
wait for Python. Compiled code is kept between processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

WORTH_COMPILING = 40_000
"""Loop rounds above which compiled code pays: below, Python needs less time than loading numba."""


def kernel(function: Callable[..., int]) -> Callable[..., int]:
    """Make `function(*arguments)` callable as `(work, *arguments)`, `work` being about how often it will loop.

    It takes numbers and numpy arrays, writes its results into the arrays, and returns a number.
    """

    def call(work: int, *arguments: Any) -> int:
        if work >= WORTH_COMPILING or "numba" in sys.modules:
            return int(_compiled(function)(*arguments))
        lists = [a.tolist() if isinstance(a, np.ndarray) else a for a in arguments]
        result = function(*lists)
        for mine, theirs in zip(arguments, lists, strict=True):
            if isinstance(mine, np.ndarray):
                mine[...] = theirs
        return result

    return call


@cache
def _compiled(function: Callable[..., int]) -> Callable[..., int]:
    import numba

    compiled: Callable[..., int] = numba.njit(cache=True, nogil=True)(function)
    return compiled
