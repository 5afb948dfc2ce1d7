"""Blocks: the runs of layers whose sharded parameters are gathered, and gradients reduced, in one collective.

Users of FSDP2 call `fully_shard` on each block of a model (a transformer's, a residual one), and every call makes one
group of parameters. A profile's blocks are found in the same way; layers without parameters are never alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from planner.basis.memo import memoised
from planner.values.profile import Profile

WORTH_A_COLLECTIVE = 2**20
"""Bytes below which single layers join the next: DDP's first, smallest bucket (torch.distributed, reducer.hpp,
`kDefaultFirstBucketBytes`), the least that its authors found worth a call of its own (Li et al., arXiv 2006.15704)."""

LARGE = 25 * 2**20
"""Bytes above which a run of layers is looked into once more: DDP's other buckets, which keep a network busy."""


class Outline(Protocol):
    """What of a model's layers their blocks follow from."""

    @property
    def layers(self) -> Sequence[Named]:
        """The model's layers."""

    def crossing(self, cut: int) -> Sequence[object]:
        """Return the values alive between layers `cut - 1` and `cut`."""


class Named(Protocol):
    """What of a layer its block follows from."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters."""


def blocks(profile: Profile, layers: range) -> tuple[range, ...]:
    """Cut a stage's layers into blocks, kept with the profile: `blocks_of`."""
    return memoised(profile, ("blocks", layers), lambda: blocks_of(profile, layers))


def blocks_of(outline: Outline, layers: range) -> tuple[range, ...]:
    """Cut a stage's layers into blocks.

    A block ends where the name's module does: `layers.3.attention` and `layers.3.mlp` are of `layers.3`, the first
    number included. Between names that do not tell, it ends where a single value crosses, as a residual block has its
    skip inside; what is then still large (an encoder's output crosses all of a decoder), where the fewest values cross.
    Single layers join their neighbours behind them until they are worth a collective, or the last block at the end.
    """
    return _merged(outline, modules(outline, layers))


def modules(outline: Outline, layers: range) -> list[range]:
    """Cut layers into modules, before any are joined: what a user would wrap into a checkpoint each."""
    homes = _homes(outline, layers)
    return [part for module in _whole(outline, homes, layers) for part in _smaller(outline, homes, module)]


def unjoined(profile: Profile) -> list[tuple[range, bool]]:
    """Return modules of the whole model of which a stage's blocks are made, wherever it begins and ends.

    Of a module that is cut because it is large each layer is returned, marked: how it is cut depends on the stage, into
    parts that are either one layer or not large.
    """
    layers = range(len(profile.layers))
    homes = _homes(profile, layers)
    found: list[tuple[range, bool]] = []
    for module in _whole(profile, homes, layers):
        cut = _is_cut(profile, homes, module)
        found += [(range(i, i + 1), True) for i in module] if cut else [(module, False)]
    return found


def _homes(outline: Outline, layers: range) -> dict[int, str]:
    return {i: _home(outline.layers[i].name) for i in layers}


def _whole(outline: Outline, homes: dict[int, str], layers: range) -> list[range]:
    return _parts(layers, {i for i in layers[1:] if _ends(outline, homes, i)})


def _is_cut(outline: Outline, homes: dict[int, str], module: range) -> bool:
    return len(module) > 1 and not homes[module.start] and _parameters(outline, module) > LARGE


def _ends(outline: Outline, homes: dict[int, str], i: int) -> bool:
    before, here = homes[i - 1], homes[i]
    return before != here if before or here else len(outline.crossing(i)) == 1


def _smaller(outline: Outline, homes: dict[int, str], module: range) -> list[range]:
    if not _is_cut(outline, homes, module):
        return [module]
    crossing = {i: len(outline.crossing(i)) for i in module[1:]}
    cuts = {i for i, values in crossing.items() if values == min(crossing.values())}
    return [part for run in _parts(module, cuts) for part in _smaller(outline, homes, run)]


def _parts(layers: range, cuts: set[int]) -> list[range]:
    return [range(a, b) for a, b in itertools.pairwise([layers.start, *sorted(cuts), layers.stop])]


def _parameters(outline: Outline, layers: range) -> int:
    return sum(outline.layers[i].parameter_bytes for i in layers)


def _home(name: str) -> str:
    """The module that a layer belongs to, as far as its name tells; nothing for one that stands alone.

    >>> _home("encoder.layers.3.attention.query"), _home("layer1.0.conv1"), _home("features.0"), _home("conv1")
    ('encoder.layers.3', 'layer1.0', 'features.0', '')
    """
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if numbered is not None:
        return ".".join(parts[: numbered + 1])
    return ".".join(parts[:-1])


def _merged(outline: Outline, modules: list[range]) -> tuple[range, ...]:
    found: list[range] = []
    begin = modules[0].start
    for module in modules:
        size = _parameters(outline, range(begin, module.stop))
        if size >= WORTH_A_COLLECTIVE or (len(module) > 1 and _parameters(outline, module)):
            found.append(range(begin, module.stop))
            begin = module.stop
    if begin < modules[-1].stop:
        begin = found.pop().start if found else begin
        found.append(range(begin, modules[-1].stop))
    return tuple(found)
