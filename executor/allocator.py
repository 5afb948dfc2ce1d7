"""How many bytes a piece of work allocates, keeps and has live at its worst.

On the CPU from the allocation events of torch's profiler, which sees every tensor; on CUDA from the allocator. It
slows the work down, so times are never taken in the same pass.
"""

from __future__ import annotations

import bisect
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from executor.devices import Backend
from executor.torch_adapter import allocations


class AllocationRecorder:
    """Records allocations while it is entered; `marked(name)` delimits ranges whose names must be unique.

    Afterwards `span(name)` gives a range's (peak, kept) bytes relative to what was live when it began, and `curve`
    the whole recording as (seconds since the first range, bytes relative to the beginning).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.cuda: dict[str, tuple[int, int]] = {}
        self._profiler: profile | None = None

    def __enter__(self) -> AllocationRecorder:
        self.backend.synchronize()
        if self.backend.name == "cpu":
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            changes, self._spans = allocations(self._profiler)
            self._times = [time for time, _ in changes]
            self._levels = list(accumulate((change for _, change in changes), initial=0))
            self._profiler = None

    def marked(self, name: str) -> _Marked:
        """Return a context manager for one range."""
        return _Marked(self, name)

    def span(self, name: str) -> tuple[int, int]:
        """Return (peak, kept) bytes of a range, relative to its beginning."""
        if self.backend.name != "cpu":
            return self.cuda[name]
        start, end = self._spans[name]
        first, last = bisect.bisect_left(self._times, start), bisect.bisect_right(self._times, end)
        levels = self._levels[first : last + 1]
        return max(levels) - levels[0], levels[-1] - levels[0]


class _Marked:
    def __init__(self, recorder: AllocationRecorder, name: str) -> None:
        self.recorder, self.name = recorder, name
        self.range = record_function(f"PP:{name}")

    def __enter__(self) -> None:
        if self.recorder.backend.name != "cpu":
            self.recorder.backend.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.range.__enter__()

    def __exit__(self, *error: object) -> None:
        self.range.__exit__(None, None, None)
        if self.recorder.backend.name != "cpu":
            self.recorder.backend.synchronize()
            peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            self.recorder.cuda[self.name] = (peak - self.before, after - self.before)
