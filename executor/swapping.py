"""What autograd keeps of a micro-batch, copied to the host and back beside computing: OFFLOAD, RELEASE, FETCH.

    forward   every tensor that autograd keeps ──► a view of a `_Block`, one for each storage
    OFFLOAD   the copies of its blocks to the host begin
    RELEASE   they are over: blocks let go of the device's memory
    FETCH     memory is got again, the copies back begin
    backward  asks for views: each waits for its block; a block goes with the last node that keeps a view of it

Parameters, buffers, inputs and targets are not moved: they stay anyway. On CUDA copies are made by streams of their own
from and to pinned memory; on a CPU by a thread from and to a file without a name, so that the host's tier is another
one there, too.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks

from executor.torch_adapter import storage_of

Done = Callable[[], object]
"""Waits until a copy is over, or lets the device wait."""


class Tier(Protocol):
    """The host's memory as one rank uses it."""

    def take(self, nbytes: int) -> Any:
        """Return room for so many bytes."""

    def give(self, room: Any) -> None:
        """Take room back."""

    def out(self, device: torch.Tensor, room: Any) -> Done:
        """Begin to copy a device's bytes into room."""

    def back(self, room: Any, device: torch.Tensor) -> Done:
        """Begin to copy them back."""


class FileTier:
    """The host's tier of a CPU: one file that is mapped into memory, and a thread that copies."""

    def __init__(self) -> None:
        self.copying = ThreadPoolExecutor(1, thread_name_prefix="swap")
        self.free: dict[int, list[torch.Tensor]] = {}

    def take(self, nbytes: int) -> Any:
        """Return room for so many bytes: some that was used before, or a new file."""
        if self.free.get(nbytes):
            return self.free[nbytes].pop()
        with tempfile.TemporaryFile(prefix="foreplan-swap-") as file:
            file.truncate(nbytes)
            return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)

    def give(self, room: Any) -> None:
        """Take room back."""
        self.free.setdefault(room.nbytes, []).append(room)

    def out(self, device: torch.Tensor, room: Any) -> Done:
        """Begin to copy a device's bytes into room."""
        return self._copy(device, room)

    def back(self, room: Any, device: torch.Tensor) -> Done:
        """Begin to copy them back."""
        return self._copy(room, device)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Done:
        copied: Future[torch.Tensor] = self.copying.submit(target.copy_, source)
        return copied.result


class PinnedTier:
    """The host's tier of a GPU: pinned memory, and a stream each way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.leaving, self.returning = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.free: dict[int, list[torch.Tensor]] = {}

    def take(self, nbytes: int) -> Any:
        """Return pinned room for so many bytes."""
        if self.free.get(nbytes):
            return self.free[nbytes].pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def give(self, room: Any) -> None:
        """Take room back; who gives it has let the device wait for what is copied from it, and copies wait for that."""
        self.free.setdefault(room.nbytes, []).append(room)

    def out(self, device: torch.Tensor, room: Any) -> Done:
        """Begin to copy a device's bytes into room."""
        return self._copy(self.leaving, device, room)

    def back(self, room: Any, device: torch.Tensor) -> Done:
        """Begin to copy them back."""
        return self._copy(self.returning, room, device)

    def _copy(self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor) -> Done:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            for own in (source, target):
                if own.is_cuda:
                    own.record_stream(stream)
            over = torch.cuda.Event()
            over.record(stream)
        return lambda: torch.cuda.current_stream(self.device).wait_event(over)


class _Block:
    """The bytes of one storage, on the device, on the host, or on their way."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.device: torch.Tensor | None = _bytes_of(storage)
        self.kind, self.nbytes = storage.device, storage.nbytes()
        self.room: Any = None
        self.done: Done | None = None

    def offload(self, tier: Tier) -> None:
        assert self.device is not None
        self.room = tier.take(self.nbytes)
        self.done = tier.out(self.device, self.room)

    def release(self) -> None:
        self.wait()
        self.device = None

    def fetch(self, tier: Tier) -> None:
        self.device = torch.empty(self.nbytes, dtype=torch.uint8, device=self.kind)
        self.done = tier.back(self.room, self.device)

    def wait(self) -> None:
        """Wait for the copy that is under way."""
        if self.done is not None:
            self.done()
            self.done = None


class _View(NamedTuple):
    """A tensor that autograd keeps: a part of a block."""

    block: _Block
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Swapped:
    """What autograd keeps of one micro-batch's forward on a stage. What is in `staying` is not moved."""

    def __init__(self, tier: Tier, staying: Iterable[torch.Tensor], *, compiled: bool = False) -> None:
        self.tier, self.compiled = tier, compiled
        self.staying = {storage_of(tensor) for tensor in staying}
        self.blocks: dict[int, _Block] = {}
        self.fetched = False

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While inside, keep what autograd would."""
        pack, unpack = self._pack, self._unpack
        if self.compiled:
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        with saved_tensors_hooks(pack, unpack):
            yield

    def hold(self, tensors: Iterable[torch.Tensor]) -> list[_Block]:
        """Keep some tensors that no graph does: their bytes live as long as what is returned."""
        own = {storage_of(tensor): _Block(tensor.untyped_storage()) for tensor in tensors}
        self.blocks |= own
        return list(own.values())

    def _pack(self, tensor: torch.Tensor) -> Any:
        if storage_of(tensor) in self.staying or not tensor.numel() or tensor.layout is not torch.strided:
            return tensor.detach()
        block = self.blocks.get(storage_of(tensor))
        if block is None:  # while it is on the device its storage lives, so that nothing else has its identity
            block = self.blocks[storage_of(tensor)] = _Block(tensor.untyped_storage())
        return _View(block, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, _View):
            own: torch.Tensor = kept
            return own
        assert kept.block.device is not None, "a backward stands behind its FETCH"
        whole = torch.empty(0, dtype=kept.dtype, device=kept.block.kind)
        return whole.set_(kept.block.device.untyped_storage(), kept.offset, kept.size, kept.stride)

    def offload(self) -> None:
        """Begin to copy everything to the host."""
        for block in self.blocks.values():
            block.offload(self.tier)

    def wait(self) -> None:
        """Wait until what is under way has come; what is back lives as long as autograd needs it."""
        for block in self.blocks.values():
            block.wait()
            if self.fetched:
                self.tier.give(block.room)
        if self.fetched:
            self.blocks = {}

    def release(self) -> None:
        """Let go of the device's memory."""
        for block in self.blocks.values():
            block.release()

    def fetch(self) -> None:
        """Begin to copy it back."""
        for block in self.blocks.values():
            block.fetch(self.tier)
        self.fetched = True


def let_go(outputs: Iterable[torch.Tensor], staying: Iterable[torch.Tensor]) -> None:
    """Let go of the memory of what has been sent on: its backward needs the graph behind it, not its values."""
    kept = {storage_of(tensor) for tensor in staying}
    for output in outputs:
        if output.grad_fn is not None and storage_of(output) not in kept:
            output.untyped_storage().resize_(0)


def open_tier(device: torch.device) -> Tier:
    """Return the host's tier of a device."""
    return PinnedTier(device) if device.type == "cuda" else FileTier()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
