"""What layers draw while they train (dropout, noise): by run, step, micro-batch and layer, wherever they run.

So the same micro-batch drops out the same units on one device and on eight, when its forward is repeated, and in a run
that is taken up again; other micro-batches, of other replicas too, drop out others.
"""

from __future__ import annotations

import torch

from executor.seeding import mixed

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
UPDATE = 1 << 31
"""In the place of a micro-batch: what the optimizer draws."""


class Noise:
    """The draws of one micro-batch on a device; `at(layer)` begins those of a layer, numbered within the model."""

    def __init__(self, seed: int, step: int, microbatch: int, device: torch.device) -> None:
        self.key = mixed(seed, step, microbatch)
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index])

    def at(self, layer: int) -> None:
        """Seed the generators from which torch's functions draw, for a layer."""
        seed = _spread(self.key + (layer + 1) * _GOLDEN)
        for generator in self.generators:
            generator.manual_seed(seed)


def _spread(number: int) -> int:
    """Spread a number over 64 bits: splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014)."""
    number &= _MASK
    number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ number >> 27) * 0x94D049BB133111EB) & _MASK
    return number ^ number >> 31
