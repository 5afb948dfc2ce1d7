"""How layers divide over devices: what the model file's `splits(model)` says, and what of a block stays whole.

A transformer block is split as Megatron does it (arXiv 1909.08053): a linear by columns, what follows it divided, a
linear by rows, what follows that whole again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import msgspec
import torch
from torch.autograd.graph import saved_tensors_hooks

from executor.torch_adapter import DispatchMode, operation_name, pytree, storage_of
from executor.user_code import explained
from planner.basis.errors import PlanError, unknown
from planner.values.profile import Split
from profiles.chain import Chain

WORDS = {
    "column": Split(forward=0, backward=1),
    "row": Split(forward=1, backward=0),
    "block": Split(forward=2, backward=2),
}


def splits_of(chain: Chain, samples: int, standing: Sequence[tuple[str, int]] | None = None) -> dict[int, Split]:
    """Return how layers divide, by their index, counting what of a block stays whole at one micro-batch size.

    `standing` pairs the name of every layer with the index of the chain's layer that stands for it, where a chain has
    fewer layers than the model. Raises `PlanError` (exit 2) for unknown layers or words.
    """
    file = chain.file
    if file.splits is None:
        return {}
    with explained(file.path, "splits(model)"):
        given = dict(file.splits(chain.layered.model))
    stand = dict(standing or [(layer.name, i) for i, layer in enumerate(chain.layers)])
    names = list(stand)
    found: dict[int, Split] = {}
    blocks: set[int] = set()
    for name, said in given.items():
        if name not in names:
            fix = "return a dict of layer names; plan profile prints them"
            raise unknown("layer", str(name), names, where=f"{file.path}, splits(model)", fix=fix)
        part = names.index(name)
        found[part] = _read(file.path, name, said)
        if said == "block":
            blocks.add(part)
    shares = _whole_shares(chain, {stand[names[part]] for part in blocks}, samples) if blocks else {}
    return {
        part: msgspec.structs.replace(split, whole=shares[stand[names[part]]]) if part in blocks else split
        for part, split in found.items()
    }


def _read(path: str, name: str, said: Any) -> Split:
    """A word, or a dict of the fields of `Split`."""
    fix = 'use "column", "row", "block" or {"forward": 1, "backward": 1, "whole": 0.0}'
    where = f"{path}, splits(model)['{name}']"
    if isinstance(said, str):
        if said not in WORDS:
            raise unknown("split", said, WORDS, where=where, fix=fix)
        return WORDS[said]
    try:
        split = msgspec.convert(said, Split)
        extra = set(said) - set(Split.__struct_fields__)
        if extra or min(split.forward, split.backward) < 0 or not 0 <= split.whole <= 1:
            raise msgspec.ValidationError(f"unknown fields {sorted(extra)}" if extra else f"out of range: {said}")
    except msgspec.ValidationError as error:
        raise PlanError(what="the split cannot be read", where=where, why=str(error), fix=fix) from error
    return split


def _whole_shares(chain: Chain, blocks: set[int], samples: int) -> dict[int, float]:
    """The share of each block's saved bytes that is not divided."""
    parameters = {storage_of(t) for t in chain.whole.parameters()}
    shares: dict[int, float] = {}

    @contextmanager
    def around(part: int, kind: str) -> Iterator[None]:
        tracer = _Tracer(parameters) if part in blocks else None
        hooks: AbstractContextManager[Any] = nullcontext()
        if tracer is not None:
            hooks = saved_tensors_hooks(tracer.keep, lambda tensor: tensor)
        with tracer or nullcontext(), hooks:
            yield
        if tracer is not None:
            shares[part] = tracer.share

    inputs, targets = chain.draw(samples)
    with torch.random.fork_rng(devices=[]), chain.eager():
        chain.forward(inputs, targets, around)
    return shares


class _Tracer(DispatchMode):
    """Follows which tensors are divided: from one product with a parameter to the next."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = parameters
        self.divided: dict[int, bool] = {}
        self.saved: dict[int, torch.Tensor] = {}
        self.alive: list[torch.Tensor] = []

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd saves."""
        self.saved.setdefault(storage_of(tensor), tensor)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an operation run, and mark what it makes."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        given = [storage_of(t) for t in pytree.arg_tree_leaves(*args, **(kwargs or {})) if isinstance(t, torch.Tensor)]
        divided = any(self.divided.get(storage, False) for storage in given)
        name = operation_name(func)
        if name in ("mm", "addmm", "bmm", "baddbmm") and self.parameters.intersection(given):
            divided = not divided
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in given:
                self.divided[storage_of(tensor)] = divided
                self.alive.append(tensor)  # so that no other storage gets its identity
        return out

    @property
    def share(self) -> float:
        """Whole bytes over all saved bytes that were made inside."""
        mine = {key: t.untyped_storage().nbytes() for key, t in self.saved.items() if key in self.divided}
        total = sum(mine.values())
        return sum(size for key, size in mine.items() if not self.divided[key]) / total if total else 0.0
