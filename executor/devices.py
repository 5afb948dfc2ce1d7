"""CPU and CUDA behind one face: time stamps, synchronisation, memory, backend. No other file asks which it is."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from planner.basis.errors import DEVICE, PlanError
from planner.programs.proof import InTurn


class Backend(Protocol):
    """What a rank needs to know about its device."""

    name: str
    communication: str
    in_turn: InTurn
    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it."""

    def stamp(self) -> Any:
        """Note the present in the device's own order of work, without waiting for it."""

    def seconds(self, stamp: Any) -> float:
        """Seconds of a stamp on the host's monotonic clock; only after `synchronize`."""


class Cpu:
    """The host's cores: work is done when the call returns."""

    name, communication = "cpu", "gloo"
    in_turn: InTurn = "per pair"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        _keep_freed_memory()

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""

    def stamp(self) -> int:
        """Nanoseconds of the monotonic clock, which all processes of a host share."""
        return time.monotonic_ns()

    def seconds(self, stamp: int) -> float:
        """Convert to seconds."""
        return stamp / 1e9


def _keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed instead of returning it to the kernel.

    Otherwise a step that frees its activations pays for them again, page by page, in the next one, and by how much
    depends on the largest tensors a process has ever had: a run would not cost what was profiled. Other C libraries
    are left as they are.
    """
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        _MALLOPT(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def own_mapping() -> Iterator[None]:
    """Let what is allocated inside have pages of its own, which are given back when it is freed."""
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_THRESHOLD, 1)
    try:
        yield
    finally:
        if _MALLOPT is not None:
            _MALLOPT(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


_MALLOPT = getattr(ctypes.CDLL(None), "mallopt", None)


# From malloc.h; the threshold's largest value on 64 bits is 4 MiB times the size of a long.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 2**25


class Cuda:
    """One GPU: stamps are events on the current stream, tied to the host's clock by a first synchronised one."""

    name, communication = "cuda", "nccl"
    in_turn: InTurn = "per device"  # batched point-to-point operations on the pipeline's one communicator

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize()
        self._base = torch.cuda.Event(enable_timing=True)
        self._base.record()
        torch.cuda.synchronize()
        self._host = time.monotonic_ns() / 1e9

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def stamp(self) -> torch.cuda.Event:
        """Record an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamp: torch.cuda.Event) -> float:
        """Seconds since the base event, put on the host's clock."""
        return self._host + float(self._base.elapsed_time(stamp)) / 1e3


def kinds() -> tuple[str, ...]:
    """Kinds of devices this machine has, the one to prefer first."""
    return ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)


def open_device(kind: str, index: int = 0) -> Backend:
    """Open a device. Raises `PlanError` (exit 5) when this machine has none of its kind or too few."""
    if kind == "cpu":
        return Cpu()
    if kind not in kinds() or index >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise PlanError(
            what=f"there is no device {kind}:{index}",
            where="this machine",
            why=f"torch {torch.__version__} finds {found}",
            fix="use --device cpu",
            code=DEVICE,
        )
    return Cuda(index)


def describe(kind: str) -> str:
    """The device as it is named in a profile: its model and no host name."""
    if kind == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes(kind: str) -> int:
    """Memory of one device: of the host for the CPU, within the limit of its control group."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        return min(total, int(limit)) if limit != "max" else total
    except OSError:
        return total


def free_bytes(kind: str) -> int:
    """Memory of one device that nobody uses now: of the host for the CPU, within the limit of its control group."""
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = memory_bytes("cpu")
    try:
        with open("/proc/meminfo") as file:
            known = dict(line.split(":") for line in file)
        free = min(free, 1024 * int(known["MemAvailable"].split()[0]))
        with open("/sys/fs/cgroup/memory.current") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat") as file:
            used -= sum(int(line.split()[1]) for line in file if line.startswith("inactive_file "))
        return min(free, memory_bytes("cpu") - used)
    except (OSError, KeyError, ValueError):
        return free
