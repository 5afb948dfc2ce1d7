"""Random draws that depend on a number alone: torch's, Python's and numpy's global generators, seeded for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (on the host), random and numpy, and leave them as they were behind it."""
    import numpy as np

    state, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)


def mixed(*numbers: int) -> int:
    """Return one seed of several numbers; other numbers have another one (as far as 32 bits go)."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def begin(seed: int) -> None:
    """Seed what Python and numpy draw from in this process, which nobody else does: runs would differ."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
