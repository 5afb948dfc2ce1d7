"""Count what a model asks of its device: every ATen operation with its FLOP and bytes, and the bytes that are live.

Works on fake tensors (shapes and dtypes without data) and on real ones alike; nothing here knows a device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from executor.torch_adapter import DispatchMode, operation_name, pytree, storage_of, writes
from profiles.hardware import Kind, Operation

_LOOKUP = ("embedding", "index", "index_select", "gather")
_OVERWRITING = ("copy_", "fill_", "zero_")
_RANDOM = ("native_dropout", "bernoulli", "bernoulli_", "rand_like", "randn_like", "normal_", "uniform_")
_FREE = ("empty", "detach", "new_empty", "set_")


class Counter(DispatchMode):
    """Records operations, and live bytes, while it is entered; `marked(name)` delimits ranges with unique names.

    Afterwards `operations[name]` lists a range's kernels, and `span(name)` gives its (peak, kept) bytes relative to
    what was live when it began. Views and allocations cost nothing. A storage is live from the operation that makes it
    until nobody holds it; what a kernel needs for itself (a workspace) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: dict[str, list[Operation]] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._here: list[Operation] = []
        self._seen: set[int] = set()
        self._live = self._peak = 0

    @contextmanager
    def marked(self, name: str) -> Iterator[None]:
        """Delimit one range. Ranges do not nest."""
        self._here = self.operations.setdefault(name, [])
        before = self._peak = self._live
        yield
        self._spans[name] = (self._peak - before, self._live - before)
        self._here = []

    def span(self, name: str) -> tuple[int, int]:
        """Return (peak, kept) bytes of a range, relative to its beginning. Raises `KeyError` when there was none."""
        return self._spans[name]

    @property
    def here(self) -> int:
        """How many operations the present range has."""
        return len(self._here)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an operation run, and note it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        given = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, torch.Tensor)]
        made = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        held = {storage_of(t) for t in given}
        fresh = [t for t in made if storage_of(t) not in held]
        for tensor in fresh:
            self._born(tensor)
        name = operation_name(func)
        if (fresh or writes(func)) and not name.startswith(_FREE):
            self._here.append(_operation(name, func, args, kwargs, given, made, out))
        return out

    def _born(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_of(tensor), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._live += size
        self._peak = max(self._peak, self._live)

        def freed() -> None:
            self._seen.discard(key)
            self._live -= size

        weakref.finalize(storage, freed).atexit = False


def _operation(
    name: str, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], made: list[torch.Tensor], out: Any
) -> Operation:
    kind, flop = _computed(name, func, args, kwargs, out)
    floating = next((t for t in (*given, *made) if t.is_floating_point()), None)
    return Operation(
        kind=kind,
        dtype=str((floating if floating is not None else torch.empty(0)).dtype).removeprefix("torch."),
        flop=flop,
        bytes=_moved(name, given, made),
    )


def _computed(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Kind, float]:
    """The kind of an operation and its FLOP (two per multiplication); operations bound by memory have none."""
    if "attention" in name:
        return "attention", _attention_flop(args, kwargs, backward=name.endswith("backward"))
    count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    if count is None:
        return "random" if name in _RANDOM else "memory", 0.0
    kind: Kind = "convolution" if "conv" in name else "matmul"
    return kind, float(count(*args, **kwargs, out_val=out))


def _attention_flop(args: Any, kwargs: Any, *, backward: bool) -> float:
    """FLOP of a fused attention, forward 2 and backward 5 matrix products (arXiv 2307.08691, section 4.1).

    A causal one computes half of each, as fused kernels do.
    """
    query, key, value = args[1:4] if backward else args[:3]
    samples, heads, length, width = query.shape
    product = 2.0 * samples * heads * length * int(key.shape[-2])
    flop: float = product * (3 * width + 2 * value.shape[-1]) if backward else product * (width + value.shape[-1])
    causal = kwargs.get("is_causal", False) or any(a is True for a in args)
    return flop / 2 if causal else flop


def _moved(name: str, given: list[torch.Tensor], made: list[torch.Tensor]) -> float:
    """Bytes read and written, each tensor once; a look-up reads as many rows as it writes, not the whole table."""
    written = sum(_bytes(t) for t in made)
    if name in _LOOKUP:
        return float(2 * written + sum(_bytes(t) for t in given if not t.is_floating_point()))
    if name.startswith("new_") or name.endswith("_like"):
        given = []
    if name in _OVERWRITING:
        given = given[1:]
    return float(written + sum({id(t): _bytes(t) for t in given}.values()))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, and of an expanded one those it has."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class AsOnGpu(TorchFunctionMode):
    """Replaces what torch does otherwise on a GPU than on a CPU: there, dropout keeps a mask of one byte per value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, or its replacement."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, True)[0]
