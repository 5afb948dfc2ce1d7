"""A batch as a model file draws it: inputs of any structure, and targets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from executor.torch_adapter import pytree
from planner.basis.errors import PlanError


def to(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device, anything else as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


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

    def clone(self) -> Drawn:
        """Return the batch with tensors of its own: a model may write into its inputs."""
        copied = pytree.tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (self.given, self.targets)
        )
        return Drawn(samples=self.samples, given=copied[0], targets=copied[1])

    def digest(self) -> str:
        """Return a hash of all tensors' values."""
        found = hashlib.sha256()
        for tensor in tensors((self.given, self.targets)):
            found.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
        return found.hexdigest()

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: a dict's entries by keyword, a tuple's or a single tensor by position."""
        if isinstance(self.given, dict):
            return (), dict(self.given)
        return (tuple(self.given) if isinstance(self.given, (tuple, list)) else (self.given,)), {}


def checked_batch(path: str, call: str, samples: int, drawn: Any) -> Drawn:
    """Return what a `call` of the user's has returned as a batch of so many samples.

    A mapping alone is the inputs of a model that returns its own loss. Raises `PlanError` for what is no batch, or one
    of another size: it could not be divided into micro-batches.
    """
    if isinstance(drawn, Mapping):
        drawn = dict(drawn), None
    if not isinstance(drawn, (tuple, list)) or len(drawn) != 2:
        raise PlanError(
            what=f"{call} does not return (inputs, targets)",
            where=path,
            why=f"it returns {_words(drawn)}",
            fix="return a tuple of two: inputs and targets; or a dict, for a model that returns its own loss",
        )
    given, targets = (pytree.tree_map(_free, part) for part in drawn)
    for of, part in (("an input", given), ("a target", targets)):
        for leaf in pytree.tree_leaves(part):
            _check_leaf(path, call, samples, of, leaf)
    if not tensors(given):
        raise PlanError(
            what=f"{call} returns inputs without a tensor",
            where=path,
            why=f"the inputs are {_words(given)}",
            fix="return a tensor whose first dimension is n, a tuple of such, or a dict of the model's keywords",
        )
    if isinstance(given, dict) and not all(isinstance(key, str) for key in given):
        raise PlanError(
            what=f"{call} returns a dict whose keys are no names",
            where=path,
            why=f"a key is {next(key for key in given if not isinstance(key, str))!r}",
            fix="name the arguments of the model's forward: a dict is given by keyword",
        )
    return Drawn(samples=samples, given=given, targets=targets)


def _free(leaf: Any) -> Any:
    """A batch's tensor without a gradient of its own: nobody trains it."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


def _words(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        kinds = sorted({type(entry).__name__ for entry in value})
        return f"a {type(value).__name__} of {len(value)}" + (f" ({', '.join(kinds[:3])})" if kinds else "")
    return "nothing" if value is None else f"{type(value).__name__}"


def _check_leaf(path: str, call: str, samples: int, of: str, leaf: Any) -> None:
    if type(leaf).__module__ == "numpy":
        raise PlanError(
            what=f"{call} returns numpy's arrays",
            where=path,
            why=f"{of} is a {type(leaf).__name__}",
            fix="make it a tensor: torch.from_numpy(array)",
        )
    if not isinstance(leaf, torch.Tensor):
        return
    if leaf.layout != torch.strided:
        raise PlanError(
            what=f"{call} returns a tensor that cannot be divided into micro-batches",
            where=path,
            why=f"{of} is of {leaf.layout}",
            fix="make it an ordinary tensor: tensor.to_dense()",
        )
    if leaf.dim() == 0 or leaf.shape[0] != samples:
        raise PlanError(
            what=f"{call} does not return {samples} samples",
            where=path,
            why=f"{of} is a tensor of {' x '.join(map(str, leaf.shape)) or 'one number'}",
            fix="make every input and target a tensor whose first dimension is n",
        )
