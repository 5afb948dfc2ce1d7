"""A batch as a model file draws it: inputs of any structure, and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from executor.torch_adapter import pytree


def tensors(tree: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors of a structure, in its order."""
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A batch of `samples`: the inputs as `batch()` gave them (a tensor, a tuple, a dict), and the targets."""

    samples: int
    given: Any
    targets: Any

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the inputs, in the order of their structure."""
        return tensors(self.given)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of these tensors: the keys of a dict, else numbers."""
        if isinstance(self.given, dict) and all(isinstance(value, torch.Tensor) for value in self.given.values()):
            return tuple(map(str, pytree.tree_structure(self.given).context))
        return tuple(f"input{i}" for i in range(len(self.inputs)))

    @property
    def form(self) -> tuple[Any, ...]:
        """What batches of one plan have in common: their structure, and every tensor's dtype and shape per sample."""
        leaves, structure = pytree.tree_flatten((self.given, self.targets))
        return structure, *((t.dtype, tuple(t.shape[1:])) for t in leaves if isinstance(t, torch.Tensor))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Drawn:
        """Return the batch with every tensor changed."""
        return Drawn(
            samples=self.samples,
            given=pytree.tree_map_only(torch.Tensor, change, self.given),
            targets=pytree.tree_map_only(torch.Tensor, change, self.targets),
        )

    def pin_memory(self) -> Drawn:
        """Return the batch in memory that a GPU can copy from by itself; torch's DataLoader asks for it so."""
        return self.each(torch.Tensor.pin_memory)

    def distinct(self) -> Drawn:
        """Return the batch with a tensor of its own in every place: inputs that are targets, too, are told apart."""
        seen: set[int] = set()

        def own(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or id(leaf) not in seen:
                seen.add(id(leaf))
                return leaf
            return leaf.clone()

        given, targets = pytree.tree_map(own, (self.given, self.targets))
        return Drawn(samples=self.samples, given=given, targets=targets)

    def on(self, device: torch.device) -> Drawn:
        """Return the batch on a device."""
        return self.each(lambda tensor: tensor.to(device))

    def with_samples(self, samples: int) -> Drawn:
        """Return a batch of the same kind with more samples: the first again, as often as is needed."""

        def longer(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != self.samples:
                return leaf
            return torch.cat([leaf, *[leaf[:1]] * (samples - self.samples)])

        given, targets = pytree.tree_map(longer, (self.given, self.targets))
        return Drawn(samples=samples, given=given, targets=targets)

    def split(self, parts: int) -> list[Drawn]:
        """Return equal parts of the batch, one behind the other: its micro-batches."""

        def chunk(leaf: Any, part: int) -> Any:
            return leaf.chunk(parts)[part] if isinstance(leaf, torch.Tensor) else leaf

        whole = self.given, self.targets
        found = [pytree.tree_map(lambda leaf, part=part: chunk(leaf, part), whole) for part in range(parts)]
        return [Drawn(samples=self.samples // parts, given=given, targets=targets) for given, targets in found]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: a dict's entries by keyword, a tuple's or a single tensor by position."""
        if isinstance(self.given, dict):
            return (), dict(self.given)
        return (tuple(self.given) if isinstance(self.given, (tuple, list)) else (self.given,)), {}
