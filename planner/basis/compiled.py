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

NATURAL = (1 << 62) - 1
"""`i & NATURAL` is i, and tells the compiler so, which else makes every index ready to count from the end: a third of a
tight loop's time. A negative index must never come here."""


def kernel(function: Callable[..., int]) -> Callable[..., int]:
    """Make `function(*arguments)` callable as `(work, *arguments)`, `work` being about how often it will loop.

    It takes numbers, numpy arrays and NamedTuples of them, writes its results into the arrays, and returns a number.
    """

    def call(work: int, *arguments: Any) -> int:
        if work >= WORTH_COMPILING or "numba" in sys.modules:
            return int(_compiled(function)(*arguments))
        lists = [_lists(argument) for argument in arguments]
        result = function(*lists)
        for mine, theirs in zip(arguments, lists, strict=True):
            _write(mine, theirs)
        return result

    return call


def _lists(argument: Any) -> Any:
    """Return what Python's loops read faster: an array as a list, a NamedTuple with its arrays as lists."""
    if isinstance(argument, np.ndarray):
        return argument.tolist()
    return type(argument)(*map(_lists, argument)) if isinstance(argument, tuple) else argument


def _write(mine: Any, theirs: Any) -> None:
    """Write lists back into the arrays that they were."""
    if isinstance(mine, np.ndarray):
        if mine.flags.writeable:
            mine[...] = theirs
    elif isinstance(mine, tuple):
        for own, their in zip(mine, theirs, strict=True):
            _write(own, their)


@cache
def _compiled(function: Callable[..., int]) -> Callable[..., int]:
    import numba

    compiled: Callable[..., int] = numba.njit(cache=True, nogil=True)(function)
    return compiled
